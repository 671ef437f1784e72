"""The architecture, read from the syntax trees: who may import whom, and how the folders join the package.

Nothing is imported to find this out, but for the last tests, which start a Python of their own.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import viaticum

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("agents", "budgets", "decoders", "models", "reports", "routers", "strategies", "training")
# In viaticum/, the files that may import everything; the others are the ground floor.
FRONT_DOOR = ("__init__", "__main__", "cli", "commands", "demo")

# Rooms, each with what it may import besides itself. `agents.x` is a package or a module of agents/.
CORE = {"ground", "budgets", "strategies", "routers"}
LOCAL = {"ground", "strategies", "routers", "decoders", "models"}
WORKFLOW = CORE | {"models", "agents.workflow"}
CLIENT = WORKFLOW | {
    "agents.build",
    "agents.cancellation",
    "agents.draining",
    "agents.question_runs",
    "agents.client",
}
MAY_IMPORT: dict[str, set[str]] = {
    "ground": set(),
    "budgets": {"ground"},
    "strategies": {"ground"},
    "routers": {"ground"},
    "decoders": {"ground", "routers"},
    "models": {"ground", "strategies", "routers", "decoders"},
    "training": LOCAL,
    "agents.workflow": CORE | {"models"},
    "agents.cancellation": {"ground", "models", "agents.workflow"},
    "agents.draining": {"ground", "agents.workflow"},
    "agents.build": WORKFLOW,
    "agents.question_runs": WORKFLOW | {"agents.draining"},
    "agents.client": CLIENT,
    "agents.capable": CLIENT,
    "agents.integrations": CLIENT | {"agents.capable", "agents.instrumentation"},
    "agents.completions": CLIENT | {"agents.capable"},
    "agents.openai_api": CLIENT | {"agents.completions"},
    "agents.anthropic_api": CLIENT | {"agents.completions", "agents.openai_api"},
    "agents.responses_api": CLIENT | {"agents.completions", "agents.openai_api"},
    "agents.server": CLIENT
    | {"agents.completions", "agents.openai_api", "agents.anthropic_api", "agents.responses_api"},
    "agents.instrumentation": CLIENT,
    "agents.batch": WORKFLOW | {"agents.build", "agents.openai_api"},
    "reports": CORE | {"reports"},
    "front door": CORE
    | {
        *FOLDERS,
        "agents.client",
        "agents.integrations",
        "agents.completions",
        "agents.server",
        "agents.responses_api",
        "agents.batch",
        "agents.instrumentation",
    }
    | {"agents.build", "agents.workflow", "agents.cancellation"},
}

# decoders/ and routers/token run on a bare CUDA image. viaticum.gguf reads headers and blocks with numpy
# alone; viaticum.files imports filelock only where a run is locked.
BARE_PACKAGES = {"torch", "transformers", "safetensors", "numpy"}
# What a back end of its own needs, imported where it is used.
BACKEND_PACKAGES = {("viaticum.decoders.served_connection", "httpx")}
BARE_MODULES = (
    "viaticum.types",
    "viaticum.errors",
    "viaticum.files",
    "viaticum.gguf",
    "viaticum.stop_strings",
    "viaticum.thinking",
    "viaticum.routers.token",
    "viaticum.decoders",
)

PUBLIC = [
    "Allowance",
    "Answer",
    "BudgetExceeded",
    "ChatViaticum",
    "Completion",
    "DecisionNeeded",
    "Draining",
    "FakeRouter",
    "InputError",
    "Outcome",
    "Pair",
    "Query",
    "Route",
    "RoutingTable",
    "ScriptedModel",
    "Usage",
    "Viaticum",
    "ViaticumError",
    "__version__",
    "as_tool",
    "budget",
    "build_graph",
    "priced",
    "tagged",
]


class Import(NamedTuple):
    """An import: where (`file:line`, name of the importer), which module, and whether it waits for a call."""

    where: str
    importer: str
    module: str
    lazy: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.where}: {self.module}"


def python_files(*folders: str) -> Iterator[Path]:
    """The files of these folders, the links in viaticum/ not followed."""
    for folder in folders:
        for parent, _, names in os.walk(ROOT / folder):
            yield from (Path(parent, name) for name in sorted(names) if name.endswith(".py"))


def name_of(path: Path) -> str:
    """viaticum.routers.token for routers/token/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in FOLDERS:
        parts = ("viaticum", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def layer(module: str) -> str:
    """The room of a module: a root folder, a room of agents/, the ground floor or the front door."""
    parts = module.split(".")[1:]
    if not parts or parts[0] in FRONT_DOOR:
        return "front door"
    if parts[0] == "agents":
        return ".".join(parts[:2])
    return parts[0] if parts[0] in FOLDERS else "ground"


@cache
def our_modules() -> frozenset[str]:
    return frozenset(name_of(path) for path in python_files("viaticum", *FOLDERS))


def imported_from(node: ast.ImportFrom, importer: str, is_package: bool) -> Iterator[str]:
    """The modules that `from X import a, b` loads: X.a where that is a module of ours, else X."""
    base = node.module or ""
    if node.level:
        parts = importer.split(".")
        parents = parts[: len(parts) - node.level + is_package]
        base = ".".join([*parents, *filter(None, [node.module])])
    for alias in node.names:
        full = f"{base}.{alias.name}"
        if full in our_modules():
            yield full
        elif base == "viaticum" and alias.name != "__version__":
            # A public name is loaded from its home.
            yield viaticum._HOME.get(alias.name, base)
        elif full != "viaticum.__version__":
            yield base


def imports_in(source: str, where: str, importer: str, is_package: bool = False) -> Iterator[Import]:
    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = list(imported_from(node, importer, is_package))
        for module in modules:
            yield Import(f"{where}:{node.lineno}", importer, module, lazy)
        waits = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy or waits)

    yield from walk(ast.parse(source), False)


@cache
def all_imports() -> tuple[Import, ...]:
    """Every import of the package."""
    return tuple(
        found
        for path in python_files("viaticum", *FOLDERS)
        for found in imports_in(
            path.read_text(encoding="utf-8"),
            str(path.relative_to(ROOT)),
            name_of(path),
            path.name == "__init__.py",
        )
    )


def test_the_reader_of_imports_sees_what_python_would_load() -> None:
    source = (
        "import os.path\nfrom viaticum import errors, Viaticum, __version__\n"
        "from . import entropy\nfrom .base import Step\nfrom ..query import x\n"
        "def f():\n    import torch\n"
    )
    found = list(imports_in(source, "x.py", "viaticum.routers.token", is_package=True))
    assert [(one.module, one.lazy) for one in found] == [
        ("os.path", False),
        ("viaticum.errors", False),
        ("viaticum.agents.client", False),
        ("viaticum.routers.token", False),
        ("viaticum.routers.token.base", False),
        ("viaticum.routers.query", False),
        ("torch", True),
    ]
    assert len(all_imports()) > 100


@pytest.mark.parametrize("floor", MAY_IMPORT)
def test_imports_run_one_way(floor: str) -> None:
    ours = [one for one in all_imports() if layer(one.importer) == floor and one.package == "viaticum"]
    assert not [str(one) for one in ours if layer(one.module) not in MAY_IMPORT[floor] | {floor}]


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or indirectly: strongly connected components."""
    imported: dict[str, set[str]] = {}
    for importer, module in edges:
        imported.setdefault(importer, set()).add(module)
    reached = {start: reachable(start, imported) for start in imported}
    groups = {tuple(sorted({a} | {b for b in reached[a] if a in reached.get(b, ())})) for a in imported}
    return [list(group) for group in sorted(groups) if len(group) > 1 or group[0] in reached[group[0]]]


def reachable(start: str, imported: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [*imported.get(start, ())]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += imported.get(module, ())
    return found


def test_circles_are_found() -> None:
    assert circles([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "e")]) == [["a", "b", "c"], ["e"]]
    assert circles([("a", "b"), ("a", "c"), ("b", "c")]) == []


def test_no_modules_import_each_other() -> None:
    """Late imports and those under TYPE_CHECKING count too."""
    ours = our_modules() - {"viaticum"}  # public names are loaded late, from their homes
    assert not circles(
        (one.importer, one.module) for one in all_imports() if {one.importer, one.module} <= ours
    )


def test_every_module_has_a_room() -> None:
    assert {layer(module) for module in our_modules()} - {"agents"} == set(MAY_IMPORT)


def test_types_and_errors_use_the_standard_library_alone() -> None:
    files = ("viaticum.types", "viaticum.errors", "viaticum.checks", "viaticum.display", "viaticum.money")
    found = [one for one in all_imports() if one.importer in files]
    assert found
    assert not [
        str(one) for one in found if one.module not in files and one.package not in sys.stdlib_module_names
    ]


def test_decoders_and_token_routers_run_on_a_bare_cuda_image() -> None:
    found = [
        one for one in all_imports() if is_within(one.importer, "viaticum.decoders", "viaticum.routers.token")
    ]
    assert found
    allowed = BARE_PACKAGES | sys.stdlib_module_names
    assert not [
        str(one)
        for one in found
        if one.package not in allowed
        and not is_within(one.module, *BARE_MODULES)
        and not (one.lazy and (one.importer, one.package) in BACKEND_PACKAGES)
    ]


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        (
            "torch",
            (
                "viaticum.routers",
                "viaticum.decoders",
                "viaticum.models",
                "viaticum.training",
                # compares the tensors of a file with those of the model class
                "viaticum.gguf.conversion",
            ),
        ),
        ("langgraph", ("viaticum.agents",)),
        ("litellm", ("viaticum.models.remote", "viaticum.agents.integrations")),
        ("openai", ("viaticum.models.remote",)),
        ("anthropic", ("viaticum.models.remote",)),
        (
            "langchain",
            (
                "viaticum.agents.integrations.middleware",
                "viaticum.agents.integrations.router_middleware",
                # whose parts these are
                "viaticum.agents.integrations.call_approval",
                "viaticum.agents.integrations.call_bounds",
                "viaticum.agents.integrations.held_calls",
                "viaticum.agents.integrations.last_calls",
                "viaticum.agents.integrations.run_deadlines",
            ),
        ),
        (
            "langchain_core",
            ("viaticum.agents.integrations", "viaticum.agents.workflow"),
        ),
        (
            "psycopg",
            (
                "viaticum.budgets.postgres",
                "viaticum.budgets.postgres_calls",
                "viaticum.budgets.postgres_objects",
                "viaticum.agents.workflow.checkpoints",
            ),
        ),
        ("psycopg_pool", ("viaticum.agents.workflow.checkpoints",)),
        ("starlette", ("viaticum.agents.server",)),
        ("uvicorn", ("viaticum.agents.server.process", "viaticum.agents.server.connections")),
        ("prometheus_client", ("viaticum.agents.server.metrics",)),
        ("altair", ("viaticum.reports.chart_rendering",)),
        ("vl_convert", ("viaticum.reports.chart_rendering",)),
        ("jinja2", ("viaticum.reports.page",)),
        ("ray", ("viaticum.agents.batch.ray_workers",)),
        # models.local reads the tokenizer; viaticum.gguf writes the folder that transformers reads.
        (
            "transformers",
            ("viaticum.routers", "viaticum.decoders", "viaticum.models.local", "viaticum.gguf"),
        ),
    ],
)
def test_heavy_packages_stay_in_their_homes(package: str, homes: tuple[str, ...]) -> None:
    found = [one for one in all_imports() if one.package == package]
    assert not [str(one) for one in found if not is_within(one.importer, *homes)]


def test_what_an_extra_brings_is_imported_late_outside_routers_and_decoders() -> None:
    extras = {
        "torch",
        "transformers",
        "litellm",
        "openai",
        "anthropic",
        "psycopg",
        "psycopg_pool",
        "gguf",
        "safetensors",
        "sentence_transformers",
        "sklearn",
        "altair",
        "vl_convert",
        "jinja2",
        "pyarrow",
    }
    found = [one for one in all_imports() if one.package in extras]
    assert found
    assert not [
        str(one)
        for one in found
        # The last is imported late as a whole: it is a subclass of what Ray brings.
        if not one.lazy
        and not is_within(
            one.importer, "viaticum.routers", "viaticum.decoders", "viaticum.agents.batch.ray_workers"
        )
    ]


def test_what_the_server_and_ray_need_is_imported_by_them_alone() -> None:
    """`viaticum serve` and `--engine ray` name the extra where it is missing; nothing else asks for it."""
    homes = {
        "viaticum.agents.server.app",
        "viaticum.agents.server.service",
        "viaticum.agents.server.process",
        "viaticum.agents.server.connections",
        "viaticum.agents.server.body",
        "viaticum.agents.server.request_ids",
        "viaticum.agents.server.completion_route",
        "viaticum.agents.server.completion_run",
        "viaticum.agents.server.batch_lines",
        "viaticum.agents.server.batch_routes",
        "viaticum.agents.server.batch_run",
        "viaticum.agents.server.batch_runner",
        "viaticum.agents.server.file_routes",
        "viaticum.agents.server.uploads",
        "viaticum.agents.server.embeddings",
        "viaticum.agents.server.run",
        "viaticum.agents.server.auth",
        "viaticum.agents.server.metrics",
        "viaticum.agents.batch.ray_workers",
    }
    wanted = {"starlette", "uvicorn", "prometheus_client", "ray", *homes}
    others = [one for one in all_imports() if one.importer not in homes and not one.lazy]
    assert not [str(one) for one in others if one.package in wanted or one.module in homes]


def test_no_folder_is_imported_by_its_bare_name() -> None:
    others = [
        found
        for path in python_files("tests", "examples", "benchmarks")
        for found in imports_in(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)), path.stem)
    ]
    assert others
    assert not [str(one) for one in [*all_imports(), *others] if one.package in FOLDERS]


def test_every_folder_is_linked_into_the_package() -> None:
    links = {path.name: os.readlink(path) for path in (ROOT / "viaticum").iterdir() if path.is_symlink()}
    assert links == {name: f"../{name}" for name in FOLDERS}
    assert {file.parent.name for file in ROOT.glob("*/__init__.py")} == {"viaticum", *FOLDERS}


def test_the_build_and_the_tools_know_every_folder() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    build = tool["hatch"]["build"]
    wheel = build["targets"]["wheel"]
    assert set(build["exclude"]) == {f"/viaticum/{name}" for name in FOLDERS}
    assert wheel["sources"] == {name: f"viaticum/{name}" for name in FOLDERS}
    assert set(wheel["only-include"]) == {"viaticum", *FOLDERS}
    assert set(tool["ruff"]["extend-exclude"]) == {f"viaticum/{name}" for name in FOLDERS}
    assert set(tool["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]) == set(FOLDERS)


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    """450 lines; tests, of which one reads a single one, may be longer."""
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(*FOLDERS, "viaticum", "examples", "benchmarks")
    }
    assert len(lengths) > 300
    assert not [f"{path.relative_to(ROOT)}: {length}" for path, length in lengths.items() if length > 450]


def python(program: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_viaticum_is_cheap() -> None:
    loaded = set(python("import sys, viaticum; print(*sys.modules)").split())
    assert "viaticum" in loaded
    heavy = {"torch", "transformers", "langgraph", "langchain_core", "litellm", "pydantic", "numpy"}
    assert not heavy & loaded


def test_the_public_names_are_these_and_each_one_loads() -> None:
    assert viaticum.__all__ == PUBLIC
    assert dir(viaticum) == PUBLIC
    printed = python("import viaticum\nfor name in viaticum.__all__: getattr(viaticum, name); print(name)")
    assert printed.split() == PUBLIC


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        viaticum.nothing  # noqa: B018
