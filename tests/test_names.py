"""Names that were given up for standard ones do not come back where they stood.

Read from the syntax trees: definitions, variables, parameters, attributes, keywords and imports. Many of
these words are good names elsewhere, so each has a scope.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = (
    "viaticum",
    "agents",
    "budgets",
    "decoders",
    "models",
    "reports",
    "routers",
    "strategies",
    "training",
)
EVERYWHERE = "*"

# Scope (a pattern over the paths from the root) -> names that do not stand there any more.
GONE: dict[str, str] = {
    EVERYWHERE: "Doorman TooFast Refusal OnePair Gone Telling went_away Desk Habits Turns Wish Aside "
    "Expectations Recipe Parting Seats Lesson foresee Gathered told dice",
    "*/server/*": "Places Full Rates Bill _no_such_door admit vanished",
    "agents/*": "Ask Chosen Watched Guard Asked Paid Writing Tools Gate Written",
    "agents/workflow/graph.py": "begin ask",
    "agents/batch/*": "Planned Pieces Steps Tell",
    "agents/batch/folder.py": "alone",
    "models/*": "Bench Ticket Letter Way",
    "training/*": "Bench Branch Settings",
    "decoders/*": "pen Writing Heads lean Patience Way",
    "routers/*": "Grid play Entropy Chance Replay",
    "budgets/*": "heads lapse",
    "budgets/planner.py": "Plan",
    "strategies/sandbox/*": "walls inside keeper",
    "reports/*": "trail words",
    **{f"{folder}/*": "said place dear books" for folder in PRODUCT},
}

# Columns of stored labels keep the names that their files have.
STORED = {
    ("routers/token/labels.py", "place"),
    ("training/label_export.py", "place"),
    ("training/label_folder.py", "place"),
}


@cache
def files() -> tuple[Path, ...]:
    """The product's files, the links in viaticum/ not followed."""
    return tuple(
        path
        for folder in PRODUCT
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not any(parent.is_symlink() for parent in path.parents)
    )


def names_in(source: str) -> Iterator[tuple[int, str]]:
    """Every identifier of a module, with its line."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.keyword(arg=str(name)):
                yield node.value.lineno, name
            case ast.alias(name=name, asname=alias):
                yield node.lineno, name.rpartition(".")[2]
                if alias:
                    yield node.lineno, alias


def test_every_kind_of_name_is_seen() -> None:
    source = (
        "import a.b as c\nfrom d import e\nclass F:\n    def g(self, h): ...\n"
        "async def i(): ...\nj = k(l=m.n)\n"
    )
    assert {name for _, name in names_in(source)} == {*"bceFghijklmn", "self"}
    assert len(files()) > 150


@pytest.mark.parametrize("scope", GONE)
def test_old_names_are_gone(scope: str) -> None:
    old = set(GONE[scope].split())
    assert not [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files()
        if scope == EVERYWHERE or fnmatch(str(path.relative_to(ROOT)), scope)
        for line, name in names_in(path.read_text(encoding="utf-8"))
        if name in old and (str(path.relative_to(ROOT)), name) not in STORED
    ]


def test_agents_holds_rooms_and_the_way_in_alone() -> None:
    names = {path.stem for path in (ROOT / "agents").glob("*.py")}
    assert names == {
        "__init__",
        "build",
        "cancellation",
        "capable",
        "client",
        "completions",
        "draining",
        "question_runs",
    }
