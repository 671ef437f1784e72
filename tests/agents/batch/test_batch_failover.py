"""A row whose model cannot answer goes to the next pair; so does a row that a kill cut short in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from batch_jobs import CHEAP, EXPENSIVE, FixedPlansRouter, models, says_right, write_questions
from scripted_batch import rows_of, run

from viaticum.budgets import Ledger
from viaticum.errors import ContentRefused, ModelUnavailable, PromptTooLong, ProviderUnavailable, RateLimited

ERRORS = [
    RateLimited("the provider takes no more calls for now", 0.01),
    ProviderUnavailable("the provider cannot be reached"),
    ContentRefused("the provider refuses to answer this"),
    PromptTooLong("the provider finds the prompt too long"),
    ModelUnavailable("busy just now"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_rows_are_answered_by_the_next_pair(tmp_path: Path, error: Exception) -> None:
    write_questions(tmp_path / "in.jsonl", 6)
    known = models(expensive=error, cheap=says_right)
    rows = rows_of(run(tmp_path, models=known, policy="best", tries=1))
    assert [(row.state, row.pair, row.answer) for row in rows] == [
        ("answered", str(CHEAP), str(number + 2)) for number in range(6)
    ]
    assert len(known["expensive"].calls) == 6


def test_a_row_that_the_pacer_planned_goes_on_too(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 4)
    known = models(expensive=RateLimited("later"), cheap=says_right)
    rows = rows_of(run(tmp_path, models=known, tries=1, budget="1"))
    assert {(row.state, row.pair) for row in rows} == {("answered", str(CHEAP))}


def test_a_row_that_names_its_pair_fails_with_its_error(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 2)
    known = models(expensive=RateLimited("later"))
    router = FixedPlansRouter({EXPENSIVE: (0.9, 390_000)})
    rows = rows_of(run(tmp_path, models=known, policy="best", tries=1, router=router))
    assert {(row.state, row.reason) for row in rows} == {("failed", "later")}


def test_no_other_pair_answers_either(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 2)
    known = models(expensive=RateLimited("later"), cheap=ContentRefused("no"))
    rows = rows_of(run(tmp_path, models=known, policy="best", tries=1))
    assert {(row.state, row.cost_nanousd) for row in rows} == {("failed", 0)}


def test_a_job_that_was_stopped_after_a_failover_does_not_ask_the_first_pair_again(tmp_path: Path) -> None:
    """The state that a kill leaves: the first pair's hold is void, the second one's call is paid for."""
    write_questions(tmp_path / "in.jsonl", 1)
    known: dict[str, Any] = models(expensive=RateLimited("later"), cheap=says_right)
    job = run(tmp_path, models=known, policy="best", tries=1)
    (tmp_path / "out.jsonl").unlink()
    for journal in job.folder.glob("rows*"):
        journal.unlink()
    with Ledger(tmp_path / "ledger.db") as ledger:
        keys = [entry.key for entry in ledger.entries(job.job.budget) if entry.kind == "post"]
    again: dict[str, Any] = models(expensive=says_right, cheap=says_right)
    rows = rows_of(run(tmp_path, models=again, policy="best", tries=1, resume=True))
    assert [(row.pair, row.answer) for row in rows] == [(str(CHEAP), "2")]
    assert [call.key for call in rows[0].calls] == keys
    assert not again["expensive"].calls
    assert not again["cheap"].calls


def test_a_row_whose_next_pair_does_not_fit_keeps_within_the_budget(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 8)
    known = models(cheap=RateLimited("later"))
    rows = rows_of(run(tmp_path, models=known, policy="cheapest:0.4", tries=1, budget="0.0009"))
    assert {row.state for row in rows} <= {"answered", "skipped", "failed"}
    assert {row.pair for row in rows if row.state == "answered"} <= {str(EXPENSIVE)}
