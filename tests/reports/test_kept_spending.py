"""Spending that was counted is kept by ledger: only new posts are counted, a changed ledger anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from job_runs import make_job, questions
from ledger_calls import CALL, PRICES, USED, Clock

import viaticum
from viaticum.budgets import Entry, Ledger
from viaticum.reports.kept_spending import KeptSpending
from viaticum.reports.site import COUNTED, SPENDING_CSV, build_site
from viaticum.reports.spending import SpendingCounter, read_tables
from viaticum.types import TokenCount

BY = (("week", "model"), ("team",), ("root",), ("tag:customer",), ("week", "team", "key", "budget", "model"))
PAIR = {"small": TokenCount(10, 5), "large": TokenCount(20, 10)}
Taken = list[tuple[tuple[str, ...], str | None]]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """(dimensions, key) of each post that a counter was given."""
    found: Taken = []
    take = SpendingCounter.take

    def noted(self: SpendingCounter, entry: Entry) -> None:
        found.append((self.by, entry.key))
        take(self, entry)

    monkeypatch.setattr(SpendingCounter, "take", noted)
    return found


def write_calls(path: Path, *keys: str, root: str = "org") -> Path:
    """Post a call for each key, every other one of two models."""
    with Ledger(path, clock=Clock("2026-11-02T00:30:00")) as ledger:
        names = [each.name for each in ledger.budgets()]
        if root not in names:
            ledger.create(root, limit_nanousd=1_000_000)
            ledger.create(f"{root}/run", parent=root)
        for number, key in enumerate(keys):
            used = PAIR if number % 2 else USED
            with viaticum.tagged(team=f"team{number % 3}", customer="=acme"):
                ledger.reserve(f"{root}/run", key, PAIR if number % 2 else CALL, PRICES)
            ledger.settle(key, used)
    return path


def counted(file: Path, *paths: Path) -> None:
    """Count with what is kept, and compare with counting everything."""
    ledgers = {str(path): Ledger(path, read_only=True) for path in paths}
    try:
        kept = KeptSpending(file, ledgers)
        assert kept.tables(BY) == read_tables([*ledgers.values()], BY)
        kept.save()
    finally:
        for ledger in ledgers.values():
            ledger.close()


def test_only_new_posts_are_counted(tmp_path: Path, taken: Taken) -> None:
    file, path = tmp_path / "kept.json", write_calls(tmp_path / "ledger.db", "a", "b", "c")

    def kept(*paths: Path) -> set[str | None]:
        taken.clear()
        counted(file, *paths)
        keys = [key for _, key in taken]
        assert all(keys.count(key) in (len(BY), 2 * len(BY)) for key in keys)
        return {key for key in keys if keys.count(key) > len(BY)}  # beside the count of everything

    assert kept(path) == {"a", "b", "c"}
    assert kept(path) == set()
    write_calls(path, "d")
    assert kept(path) == {"d"}
    other = write_calls(tmp_path / "other.db", "e", "f", root="else")
    assert kept(path, other) == {"e", "f"}
    assert kept(path, other) == set()
    write_calls(path, "g", root="new")
    assert kept(path, other) == {"g"}
    assert kept(path) == set()
    assert kept(path, other) == {"e", "f"}, "what was left out in between is not kept"


def test_a_ledger_that_is_another_one_is_counted_anew(tmp_path: Path) -> None:
    file, path = tmp_path / "kept.json", write_calls(tmp_path / "ledger.db", "a", "b", "c")
    counted(file, path)
    earlier = tmp_path / "earlier.db"
    shutil.copy(path, earlier)
    write_calls(path, "d")
    counted(file, path)
    for name in ("", "-wal", "-shm"):
        Path(f"{path}{name}").unlink(missing_ok=True)
    shutil.copy(earlier, path)  # a backup is put back
    counted(file, path)
    path.unlink()
    write_calls(path, *"uvwxyz")  # more entries than before, and others
    counted(file, path)
    path.unlink()
    write_calls(path, "one", root="else")
    counted(file, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "{",
        lambda text: "[]",
        lambda text: json.dumps(json.loads(text) | {"version": "0"}),
        lambda text: json.dumps(json.loads(text) | {"counted": [{"ledger": 1}]}),
        lambda text: text.replace('"sums":[[', '"sums":[[1],['),
        lambda text: text.replace('"week"', '"nothing"'),
        lambda text: text.replace('"heads":{', '"heads":{"gone":[3,"0"],'),
        lambda text: text.replace('"heads":{"org":[', '"heads":{"org":[99999999999999999999'),
        lambda text: text.replace('"heads":{"org":[', '"heads":{"org":[-'),
        lambda text: text.replace('"nanousd":', '"nanousd":1e999,"was":'),
        lambda text: text.replace('"calls":', '"calls":1'),
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_file_is_counted_anew(tmp_path: Path, damage: object) -> None:
    file, path = tmp_path / "kept.json", write_calls(tmp_path / "ledger.db", "a", "b", "c")
    counted(file, path)
    text = damage(file.read_text())  # type: ignore[operator]
    assert text != file.read_text()
    file.write_text(text)
    counted(file, path)


def test_no_address_and_no_password_is_kept(tmp_path: Path) -> None:
    file, path = tmp_path / "kept.json", write_calls(tmp_path / "ledger.db", "a")
    with Ledger(path, read_only=True) as ledger:
        kept = KeptSpending(file, {"postgresql://me:secret@host/db": ledger})
        kept.tables(BY)
        kept.save()
    assert "secret" not in file.read_text()


def test_a_site_counts_what_is_new_alone(tmp_path: Path, taken: Taken) -> None:
    work, site = tmp_path / "work", tmp_path / "site"
    work.mkdir()
    make_job(work, questions(12), name="one")
    build_site([work], site)
    assert taken
    first = (site / SPENDING_CSV).read_text(encoding="utf-8")
    taken.clear()
    build_site([work], site)
    assert taken == []
    assert (site / SPENDING_CSV).read_text(encoding="utf-8") == first
    make_job(work, questions(12), name="two", seed=1)
    build_site([work], site)
    new = len(taken)
    assert new > 0
    taken.clear()
    build_site([work], site, force=True)
    assert len(taken) > new, "--force counts all anew"
    assert (site / COUNTED).is_file()
