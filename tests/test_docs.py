"""Every page of the documentation runs, or is read by the parser that would run it.

Python blocks run, of every page. Shell runs where a page is a tutorial; elsewhere each command is parsed by
the command line itself, with its options. Catalogues are loaded. A page runs in a folder of its own, as a new
user of one shared machine (`doc_machine`): its models are a few kilobytes, its provider is on loopback.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from doc_commands import every_command, find_problem, find_unknown
from doc_machine import arrive, furnish
from doc_pages import ROOT, Block, blocks, commands, inline_commands, program
from openai_server import KEY, running_server

DOCS = ROOT / "docs"
MADE = ("cli.md", "log.md")  # from the code; of dates that are past
PAGES = [page for page in sorted(DOCS.glob("**/*.md")) if page.name not in MADE]
READ = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PATIENCE = 500  # seconds for a page: mostly 10 to 60, several times that on busy cores
TUTORIALS = [page for page in PAGES if page.parent.name == "tutorials" or page.name == "index.md"]
NOT_OURS = ("viaticum.apply_calls", "viaticum.reason", "viaticum.cost", "viaticum.answers")  # SQL, spans
# Options of other programs, and of this project's benchmarks.
FOREIGN = {"--max-logprobs", "--log_samples", "--output", "--security-opt", "--stop-timeout", "--read-only"}
FOREIGN |= {
    found
    for file in (ROOT / "benchmarks").glob("*.py")
    for found in re.findall(r"\"(--[a-z-]+)\"", file.read_text(encoding="utf-8"))
}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def of_language(page: Path, *languages: str) -> list[Block]:
    return [block for block in blocks(text_of(page)) if block.language in languages]


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machine")
    furnish(folder)
    return folder


@pytest.fixture(scope="session")
def provider() -> Iterator[str]:
    """The address of a server that answers as a provider would."""
    with running_server() as server:
        server.text = "17 * 23 = 391. The answer is 391."
        yield server.url


def setup_of(page: Path) -> str:
    """The module with what a page takes as given; empty where it needs nothing."""
    name = f"{page.parent.name}_{page.stem}".replace("-", "_")
    return f"doc_setup.{name}" if find_spec(f"doc_setup.{name}") is not None else ""


def run_page(page: Path, home: Path, machine: Path, provider: str, *, shell: bool) -> None:
    environment = arrive(home, machine, provider, KEY)
    setup = setup_of(page)
    source = program(text_of(page), shell=shell, before=f"from {setup} import *" if setup else "")
    source = source.replace("127.0.0.1:8000", f"127.0.0.1:{environment['DOC_PORT']}")
    file = home / f"page_{page.stem}.py"  # langgraph.py would hide the library
    file.write_text(source, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(file)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=home,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr.replace(str(file), str(page))[-6000:]


@pytest.mark.timeout(PATIENCE + 60)
@pytest.mark.parametrize("page", TUTORIALS, ids=named)
def test_a_tutorial_runs_from_top_to_bottom(page: Path, tmp_path: Path, machine: Path, provider: str) -> None:
    run_page(page, tmp_path, machine, provider, shell=True)


@pytest.mark.timeout(PATIENCE + 60)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in TUTORIALS and of_language(page, "python")], ids=named
)
def test_every_python_block_runs(page: Path, tmp_path: Path, machine: Path, provider: str) -> None:
    run_page(page, tmp_path, machine, provider, shell=False)


def test_the_first_lines_of_the_readme_run(tmp_path: Path, machine: Path, provider: str) -> None:
    run_page(ROOT / "README.md", tmp_path, machine, provider, shell=False)


@pytest.mark.parametrize("page", READ, ids=named)
def test_blocks_say_what_they_are(page: Path) -> None:
    """With nothing behind the language, so that none is left out and every renderer takes it."""
    for block in blocks(text_of(page)):
        assert block.language in ("python", "sh", "toml", "text", "diff", ""), block
        assert not block.info, block


def imported(block: str) -> list[tuple[str, str]]:
    """(module, name) of what a block imports from this package."""
    return [
        (node.module or "", alias.name)
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("viaticum")
        for alias in node.names
    ]


@pytest.mark.parametrize("page", READ, ids=named)
def test_every_python_block_imports_what_exists(page: Path) -> None:
    missing = [
        f"{module}.{name}"
        for block in of_language(page, "python")
        for module, name in imported(block.text)
        if not hasattr(import_module(module), name) and find_spec(f"{module}.{name}") is None
    ]
    assert not missing


def ours(line: str) -> list[str]:
    """The commands of `viaticum` in a line of shell; of `docker run` what follows the image."""
    if line.startswith("docker run"):
        _, *arguments = re.split(r"\sviaticum(?=\s|$)", line)
        return [f"viaticum {arguments[-1].strip()}"] if arguments[-1].strip() else []
    plain = re.sub(r"\$\([^()]*(?:\([^()]*(?:\([^()]*\))?[^()]*\)[^()]*)*\)", "WORD", line)
    return re.findall(r"(?:^|[|;&] )(viaticum [^|;>]*)", plain)


@pytest.mark.parametrize("page", READ, ids=named)
def test_every_command_is_one(page: Path) -> None:
    problems = [
        problem
        for block in of_language(page, "sh")
        for line in commands(block.text)
        for command in ours(line)
        if (problem := find_problem(command))
    ]
    problems += [
        problem
        for text in inline_commands(text_of(page))
        if text.split()[0] not in FOREIGN and (problem := find_unknown(text))
    ]
    assert not problems


def test_a_command_that_does_not_exist_is_found() -> None:
    assert find_problem("viaticum solve '1 + 1' --budget 1") == ""
    assert "--budgett" in find_problem("viaticum solve '1 + 1' --budgett 1")
    assert "no command fetch" in find_problem("viaticum models fetch")
    assert "Missing" in find_problem("viaticum trace")
    assert all(map(find_unknown, ("viaticum models pul", "viaticum batch --dry", "--dry-runn")))
    assert find_unknown("--dry-run") == ""


def test_every_command_is_in_the_documentation() -> None:
    pages = "\n".join(map(text_of, READ))
    missing = [words for each in every_command() if (words := " ".join(each)) not in pages]
    assert not missing


@pytest.mark.parametrize("page", READ, ids=named)
def test_what_is_installed_and_made_exists(page: Path) -> None:
    extras = set(metadata.metadata("viaticum").get_all("Provides-Extra") or [])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in (each for block in of_language(page, "sh") for each in commands(block.text)):
        words = line.split()
        if words[0] == "pip":
            wanted = re.findall(r"(?:viaticum|\.)\[([a-z0-9,]+)\]", line)
            assert set(",".join(wanted).split(",")) - {""} <= extras, line
            assert all((ROOT / file).is_file() for file in re.findall(r"-c (\S+)", line)), line
        elif words[0] == "make":
            for target in words[1:]:
                assert "=" in target or re.search(rf"^(?:\S+ )*{target}(?: \S+)*:", makefile, re.M), line
        elif words[0] == "python" and words[1].endswith(".py") and "/" in words[1]:
            assert (ROOT / words[1]).is_file(), line


@pytest.mark.parametrize("page", READ, ids=named)
def test_every_variable_is_read_somewhere(page: Path, read_variables: set[str]) -> None:
    given = {"VIATICUM_KEY"}  # of a reader's own choice
    assert set(re.findall(r"VIATICUM_[A-Z_]+", text_of(page))) - given <= set(read_variables)


@pytest.fixture(scope="session")
def read_variables() -> set[str]:
    folders = ("agents", "budgets", "decoders", "models", "reports", "routers", "strategies", "training")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    files += [*(ROOT / "viaticum").glob("*.py"), *(ROOT / "viaticum" / "commands").glob("*.py")]
    text = "\n".join(map(text_of, [*files, ROOT / "Makefile", *(ROOT / "tests").rglob("*.py")]))
    return set(re.findall(r"VIATICUM_[A-Z_]+", text))


@pytest.mark.parametrize("page", READ, ids=named)
def test_every_file_and_name_of_the_code_exists(page: Path) -> None:
    """Names as `viaticum.errors.InputError`, files as `budgets/store.py`."""
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text_of(page))
    files = [each for each in spans if re.fullmatch(r"[\w.]+(?:/[\w.*-]+)+\.(?:py|toml|md|yml|svg)", each)]
    assert all(list(ROOT.glob(each)) for each in files), files
    names = [name for each in spans for name in re.findall(r"(?<![\w/.-])viaticum(?:\.[A-Za-z_]\w*)+", each)]
    assert not [name for name in names if name not in NOT_OURS and not is_there(name)]


def is_there(name: str) -> bool:
    """Whether a dotted name is a module of this package, or in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if find_module(".".join(parts[:count])):
            found: object = import_module(".".join(parts[:count]))
            for part in parts[count:]:
                found = getattr(found, part, None)
            return found is not None
    return False


def find_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", [page for page in PAGES if of_language(page, "toml")], ids=named)
def test_every_catalogue_loads(page: Path, tmp_path: Path) -> None:
    """All of a page together, over the packaged one."""
    from viaticum.catalogue import Catalogue

    shown = [block.text for block in of_language(page, "toml") if "[models" in block.text]
    (tmp_path / "catalogue.toml").write_text("\n".join(shown))
    Catalogue.load(tmp_path / "catalogue.toml")


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading, and the site too."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """Of the headings of a page; a second heading of the same words has a number."""
    found, text = dict[str, int](), re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)
    names = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        name = slug(heading)
        count = found[name] = found.get(name, -1) + 1
        names.add(f"{name}-{count}" if count else name)
    return names


LINKING = [*sorted(DOCS.glob("**/*.md")), *sorted(ROOT.glob("*.md"))]


@pytest.mark.parametrize("page", LINKING, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\s\"]+)", text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-q",
            "-f",
            "docs/site/mkdocs.yml",
            "-d",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    pages = {str(page.relative_to(DOCS).with_suffix(".html")) for page in DOCS.glob("**/*.md")}
    assert pages <= {str(page.relative_to(tmp_path)) for page in tmp_path.glob("**/*.html")}
    home = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://", home), (
        "the site needs no other"
    )


def test_blocks_keep_their_lines() -> None:
    page = (
        "a\n\n```python\nx = 1\n```\n\n    viaticum doctor  # looks\n\n    no command\n\n```python\ny\n```\n"
    )
    lines = program(page).splitlines()
    assert (lines[3], lines[11]) == ("x = 1", "y")
    assert lines[6] == r"doc_machine.sh('viaticum doctor  # looks\n\nno command\n')"
    assert commands("a b \\\n  c  # d\n\n# e\nf '#g'\n") == ["a b    c", "f '#g'"]
