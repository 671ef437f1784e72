"""Every python block of the pages that opt in runs, one after the other, in a folder of its own.

A page opts in with the comment in `MARK`. Blocks of one page share their names. What they print is discarded.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
MARK = "<!-- every python block of this page runs in a test -->"
PAGES = [page for page in sorted(DOCS.glob("**/*.md")) if MARK in page.read_text(encoding="utf-8")]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def program(page: str) -> str:
    """All blocks, each at the line where it stands in the page, so that a traceback names that line."""
    lines = [""] * page.count("\n")
    for found in BLOCK.finditer(page):
        first = page.count("\n", 0, found.start(1))
        block = found[1].splitlines()
        lines[first : first + len(block)] = block
    return "\n".join(lines)


def test_blocks_keep_their_lines() -> None:
    assert program("a\n```python\nx = 1\n```\nb\n```python\ny\n```\n").splitlines()[2:7] == [
        "x = 1",
        "",
        "",
        "",
        "y",
    ]
    assert PAGES


def imported(block: str) -> list[tuple[str, str]]:
    """(module, name) of what a block imports from this package."""
    return [
        (node.module or "", alias.name)
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("viaticum")
        for alias in node.names
    ]


@pytest.mark.parametrize("page", sorted(DOCS.glob("**/*.md")), ids=lambda page: page.name)
def test_every_python_block_imports_what_exists(page: Path) -> None:
    """Of the pages too whose blocks are not run, because they need weights, keys or a GPU."""
    blocks = re.findall(
        r"^```python.*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    missing = [
        f"{module}.{name}"
        for block in blocks
        for module, name in imported(block)
        if not hasattr(import_module(module), name) and find_spec(f"{module}.{name}") is None
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    file = tmp_path / f"page_{page.stem}.py"  # langgraph.py would hide the library
    file.write_text(program(page.read_text(encoding="utf-8")), encoding="utf-8")
    command = [sys.executable, "-W", "error", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr.replace(str(file), str(page))
