"""Files of routers that are damaged, of two fits, or written while they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_outcomes import Words, outcomes

from viaticum.errors import DataError, InputError
from viaticum.routers.query import StaticRouter, storage
from viaticum.routers.query.fit import fit
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.rtr import RTRRouter
from viaticum.types import Pair, Query

pytestmark = pytest.mark.usefixtures("one_thread")


def a_router(seed: int = 0, *left_out: Pair) -> RTRRouter:
    rows = [row for row in outcomes(60, seed) if row.pair not in left_out]
    return fit(OutcomeMatrix.from_outcomes(rows), Words())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def routers() -> tuple[RTRRouter, RTRRouter]:
    """Of three pairs each, which are not the same."""
    return a_router(0, Pair("big", "cot")), a_router(1, Pair("mid", "cot"))


def load(folder: Path) -> RTRRouter:
    return RTRRouter.load(folder, Words())  # type: ignore[arg-type]


def tables(router: RTRRouter) -> Any:
    return router.table(Query("add plus total name1"))


def test_files_of_two_routers_are_refused(
    routers: tuple[RTRRouter, RTRRouter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a process was killed between writing one and the other."""
    monkeypatch.setattr(storage, "READS", 2)
    first, second = routers
    first.save(tmp_path)
    before = (tmp_path / "router.json").read_bytes()
    second.save(tmp_path)
    (tmp_path / "router.json").write_bytes(before)
    with pytest.raises(DataError, match=r"of two routers.*previous"):
        load(tmp_path)
    assert tables(load(tmp_path / "previous")) == tables(first)


def test_a_router_that_is_written_while_it_is_read_is_read_whole(
    routers: tuple[RTRRouter, RTRRouter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = routers
    first.save(tmp_path)
    read_text, reads = Path.read_text, []

    def read_and_write(path: Path, *args: Any, **more: Any) -> str:
        text = read_text(path, *args, **more)
        if not reads:
            second.save(tmp_path)
        reads.append(path)
        return text

    monkeypatch.setattr(Path, "read_text", read_and_write)
    assert tables(load(tmp_path)) == tables(second)
    assert len(reads) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda document: [document],
        lambda document: document | {"pairs": document["pairs"][::-1]},
        lambda document: document | {"plans": document["plans"][:-1]},
        lambda document: document | {"pairs": ["nothing", *document["pairs"][1:]]},
        lambda document: document | {"facts": None},
        lambda document: document | {"facts": {}},
        lambda document: document | {"settings": document["settings"] | {"heads": ["oracle"]}},
    ],
)
def test_a_damaged_description_is_refused(
    routers: tuple[RTRRouter, RTRRouter], tmp_path: Path, change: Callable[[Any], Any]
) -> None:
    routers[0].save(tmp_path)
    path = tmp_path / "router.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=r"is damaged.*fit it again"):
        load(tmp_path)


def test_another_encoder_than_it_was_fitted_with_is_told(
    routers: tuple[RTRRouter, RTRRouter], tmp_path: Path
) -> None:
    class Shorter(Words):
        name = "shorter"

        def __call__(self, texts: Any, progress: object = None) -> Any:
            return super().__call__(texts)[:, :32]

    routers[0].save(tmp_path)
    with pytest.raises(InputError, match=r"shorter gives 32 numbers.*fitted on 64 of words"):
        RTRRouter.load(tmp_path, Shorter()).table(Query("add plus"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", "0.5"),
        ("accuracy", math.nan),
        ("accuracy", 2),
        ("accuracy", None),
        ("average", 1.5),
        ("tokens_p50", None),
        ("cost_p50", -5),
        ("cost_p90", 1.5),
        ("cost_mean", "5"),
        ("seconds", math.inf),
        ("seconds", "1"),
    ],
)
def test_a_static_router_with_figures_that_are_none_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "static.json"
    StaticRouter.fit(outcomes(30)).save(path)
    document = json.loads(path.read_text())
    document["rows"][1][name] = value
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"is not a static router .*mid\+cot"):
        StaticRouter.load(path)


def test_a_static_router_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "static.json").write_text('{"rows": []}')
    with pytest.raises(DataError, match="no rows"):
        StaticRouter.load(tmp_path / "static.json")
