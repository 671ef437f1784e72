"""A batch job that commit 0ee2f32 ran, and that SIGKILL ended in the middle, goes on with today's code.

It was made by `tests/support/batch_jobs.py` with the imports of that commit: 20 rows, 0.02 dollars, 8 calls
at once. Its fingerprint holds the names of the scripted models and of the router's class.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from batch_jobs import OLD_ROWS, check_ledger, main, old_job, read_lines

from viaticum.budgets import Ledger
from viaticum.jobs import ROWS, Job, read_rows


def test_a_killed_job_of_an_older_version_goes_on(tmp_path: Path) -> None:
    folder = old_job(tmp_path)
    before = Job.load(folder)
    done_before = {row.id: row for row in read_rows(folder)}
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.check() == []
        paid_before = {hold.key for hold in ledger.holds(before.budget) if hold.state == "posted"}
        cut = {hold.key for hold in ledger.holds(before.budget) if hold.state == "dispatched"}
    calls_before = (tmp_path / "calls.txt").read_text().splitlines()
    assert before.ending == "running"
    assert 0 < len(done_before) < OLD_ROWS
    assert len(paid_before) == len(calls_before)
    assert len(cut) == 8, "calls that ran when it was killed"

    main(tmp_path, "0.02", str(tmp_path / "ledger.db"), 0.0)

    rows, posts = check_ledger(tmp_path, str(tmp_path / "ledger.db"), OLD_ROWS)
    after = Job.load(folder)
    assert (after.ending, after.budget, after.began) == ("completed", before.budget, before.began)
    assert [each["id"] for each in read_lines(tmp_path / "out.jsonl")] == [f"q{n}" for n in range(OLD_ROWS)]
    assert {row.state for row in rows} == {"answered"}
    assert all(row == done_before[row.id] for row in rows if row.id in done_before)
    assert {call.key for row in rows for call in row.calls} >= paid_before | cut
    made = Counter((tmp_path / "calls.txt").read_text().splitlines())
    assert made.most_common(1)[0][1] == 1, "a call that was paid for was made again"
    assert len(posts) == len(made)


def test_a_killed_job_whose_cut_line_and_lost_cache_are_made_again(tmp_path: Path) -> None:
    folder = old_job(tmp_path)
    (folder / "cache.db").unlink()
    with (folder / ROWS).open("ab") as journal:
        journal.write(b'{"id": "q19", "question": "What is 19')
    calls_before = len((tmp_path / "calls.txt").read_text().splitlines())

    main(tmp_path, "0.02", str(tmp_path / "ledger.db"), 0.0)

    rows, posts = check_ledger(tmp_path, str(tmp_path / "ledger.db"), OLD_ROWS)
    assert {row.state for row in rows} == {"answered"}
    made = (tmp_path / "calls.txt").read_text().splitlines()
    assert len(made) == len(posts) > calls_before, "the ledger has the texts of what was paid for"
    assert (folder / "cache.db").exists()
