"""Batches on scripted models: planned within a budget, written in the format of their input, resumed,
drained, refused.
"""

from __future__ import annotations

import csv
import gc
import itertools
import json
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import (
    CHEAP,
    EXPENSIVE,
    SILENT,
    FixedPlansRouter,
    all_plans_router,
    check_router,
    models,
    number_of,
    read_lines,
    says_nothing,
    says_right,
    says_whether_right,
    spec,
    two_plans_router,
    write_questions,
)
from scripted_batch import rows_of, run
from typer.testing import CliRunner

import viaticum.agents.batch as batch_package
from viaticum.agents.batch import job_folder, preview_batch, run_batch
from viaticum.agents.batch.folder import acquire_job_lock
from viaticum.agents.batch.input import BatchRow
from viaticum.agents.batch.output import Counts
from viaticum.agents.batch.planned_rows import NO_FALLBACK, PlannedRow, RouteEstimates
from viaticum.agents.batch.planning import RowPlanner
from viaticum.agents.batch.progress import Progress
from viaticum.agents.batch.results import build_row
from viaticum.agents.batch.run import BatchEnd
from viaticum.budgets import Ledger
from viaticum.cli import app
from viaticum.commands.batch import seconds_of
from viaticum.errors import (
    AuthenticationFailed,
    BudgetError,
    DataError,
    InputError,
    ModelError,
    ModelUnavailable,
    RateLimited,
    UnknownName,
)
from viaticum.generation import GenerationSettings
from viaticum.jobs import Job, Preview, read_rows
from viaticum.models.base import Generation
from viaticum.models.scripted import ScriptedModel
from viaticum.money import Price, usd_digits
from viaticum.outcomes import read_outcomes
from viaticum.reports.numbers import read_numbers
from viaticum.routers.query import Plan
from viaticum.types import Message, Pair, Query, TokenCount

# What comes out

SUPPORT = Path(__file__).resolve().parents[2] / "support"


def test_every_row_is_answered_graded_and_paid(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 50)
    told: list[dict[str, Any]] = []
    ended = run(tmp_path, tell=told.append)
    rows = rows_of(ended)
    assert ended.job.ending == "completed"
    assert [row.id for row in rows] == [f"q{n}" for n in range(50)]
    assert {row.state for row in rows} == {"answered"}
    assert {row.route for row in rows} == {str(EXPENSIVE)}, "there is enough for the best of them"
    assert all(row.correct and row.answer == str(row.number + 2) for row in rows)
    row = rows[3]
    assert (row.accuracy, row.cost_p50, row.cost_p90) == (0.9, 390_000, 429_000)
    assert (row.tokens_p50, row.tokens_p90) == (4, 5)
    assert row.calls[0].key == f"{ended.job.budget}/q3/0"
    assert row.text is None
    assert read_lines(tmp_path / "out.jsonl")[3] == {
        "id": "q3",
        "state": "answered",
        "answer": "5",
        "correct": True,
        "reason": "",
        "pair": "expensive+cot",
        "cost_nanousd": row.cost_nanousd,
        "cost_usd": usd_digits(row.cost_nanousd),
    }
    assert [event["event"] for event in told][:2] == ["reading", "started"]
    assert told[-1]["event"] == "ended"
    assert (told[-1]["done"], told[-1]["right"], told[-1]["graded"]) == (50, 50, 50)
    assert told[-1]["spent_nanousd"] == sum(row.cost_nanousd for row in rows)
    assert [each.budget_nanousd for each in ended.job.previews] == [
        round(10**8 * share) for share in (0.25, 0.5, 1, 2, 4)
    ]
    assert Job.load(ended.folder) == ended.job


def test_a_short_budget_is_spread_for_the_most_right_answers(tmp_path: Path) -> None:
    """500 rows at 0.1 dollar: 200k each, between the two ways.

    What is unspent is less than what one call may hold.
    """
    write_questions(tmp_path / "in.jsonl", 500)
    ended = run(tmp_path)
    rows = rows_of(ended)
    spent = ended.figures["spent_nanousd"]
    assert 0.97 * 10**8 < spent <= 10**8
    routes = [row.route for row in rows if row.state == "answered"]
    assert len(routes) > 490
    assert 180 < routes.count(str(EXPENSIVE)) < 260, "the rest is cheap"
    assert ended.figures["right"] > 300


def test_a_budget_that_ends_skips_what_it_cannot_pay(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 100)
    ended = run(tmp_path, budget="0.002")
    rows = rows_of(ended)
    assert ended.job.ending == "budget_exhausted"
    states = [row.state for row in rows]
    assert 20 < states.count("answered") < 60
    assert states.count("skipped") == 100 - states.count("answered")
    assert all("budget" in row.reason for row in rows if row.state == "skipped")
    assert ended.figures["spent_nanousd"] > 0.9 * 2_000_000


def test_a_row_says_whether_the_router_was_fitted_on_it(tmp_path: Path) -> None:
    class SeenRouter(FixedPlansRouter):
        def has_seen(self, query: Query) -> bool:
            return query.text.endswith("7 + 2?")

    write_questions(tmp_path / "in.jsonl", 20)
    rows = rows_of(run(tmp_path, router=SeenRouter({CHEAP: (0.5, 39_000), EXPENSIVE: (0.9, 390_000)})))
    assert [row.seen for row in rows] == [row.question.endswith("7 + 2?") for row in rows]
    assert {row.seen for row in rows} == {True, False}


def test_plans_and_pairs_without_an_answer_go_through_the_workflow(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 40)
    plan = Plan((CHEAP, SILENT, EXPENSIVE), 2)
    ended = run(tmp_path, router=FixedPlansRouter({plan: (0.95, 450_000), EXPENSIVE: (0.5, 390_000)}))
    rows = rows_of(ended)
    assert {row.route for row in rows} == {str(plan)}
    odd, even = rows[1], rows[2]
    assert [call.pair for call in odd.calls] == ["cheap+cot", "silent+cot", "expensive+cot"]
    assert [call.answer for call in odd.calls] == ["3", None, "3"]
    assert (odd.answer, odd.pair) == ("3", "expensive+cot")
    assert (even.answer, even.pair, even.correct) == ("4", "expensive+cot", True)
    assert [call.key for call in odd.calls] == [f"{ended.job.budget}/q1/{n}" for n in range(3)]
    escalated = run(
        tmp_path,
        router=FixedPlansRouter({SILENT: (0.9, 20_000), EXPENSIVE: (0.5, 390_000)}),
        out=tmp_path / "two.jsonl",
    )
    rows = rows_of(escalated)
    assert {(row.route, row.pair, row.state, len(row.calls)) for row in rows} == {
        ("silent+cot", "expensive+cot", "answered", 2)
    }


def test_rows_are_checked_and_escalated(tmp_path: Path) -> None:
    """Each row is right, for less than the expensive pair; a call of the verifier is one of the row's."""
    write_questions(tmp_path / "in.jsonl", 40)
    ended = run(tmp_path, router=check_router(), models=models(judge=says_whether_right), policy="best")
    rows = rows_of(ended)
    assert {row.route for row in rows} == {"cheap+cot if judge+verify says yes, else expensive+cot"}
    assert all(row.correct for row in rows)
    odd, even = rows[1], rows[2]
    assert [call.pair for call in odd.calls] == ["cheap+cot", "judge+verify"]
    assert [call.pair for call in even.calls] == ["cheap+cot", "judge+verify", "expensive+cot"]
    assert [call.answer for call in even.calls] == ["0", "no", "4"]
    assert odd.calls[1].answer == "yes"
    assert (odd.pair, even.pair) == ("cheap+cot", "expensive+cot")
    assert odd.cost_nanousd == sum(call.cost_nanousd for call in odd.calls)
    (route,) = read_numbers([tmp_path / "out.jsonl"]).runs[0].routes
    assert route.escalated is not None
    assert route.escalated.value == 0.5
    table = tmp_path / "table.jsonl"
    arguments = ["outcomes", "import", str(tmp_path / "out.jsonl"), "--from", "batch", "--out", str(table)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert {row.pair for row in read_outcomes(table)} == {CHEAP, EXPENSIVE}


def test_nobody_answers(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 5)
    rows = rows_of(run(tmp_path, models=models(cheap=says_nothing, expensive=says_nothing)))
    assert {row.state for row in rows} == {"failed"}
    assert all(row.reason and row.correct is False and len(row.calls) == 2 for row in rows)


def test_a_fixed_policy_chooses_for_each_row_alone(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 20)
    rows = rows_of(run(tmp_path, policy="cheapest:0.4"))
    assert {row.route for row in rows} == {str(CHEAP)}
    with pytest.raises(UnknownName, match="policy"):
        run(tmp_path, policy="dearest", out=tmp_path / "two.jsonl")


def test_samples_of_one_question_go_through_the_workflow(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 3)
    three = Pair("cheap", "self-consistency:cot:3")
    rows = rows_of(run(tmp_path, router=FixedPlansRouter({three: (0.9, 100_000)})))
    assert [len(row.calls) for row in rows] == [2, 2, 2], "two that agree settle it"
    assert [call.key.split("/")[2] for call in rows[0].calls] == ["0", "1"]


def test_identical_calls_are_paid_for_once(tmp_path: Path) -> None:
    lines = [{"id": str(n), "question": f"What is {n % 3} + 2?", "kind": "number"} for n in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = models()
    ended = run(tmp_path, models=known, cache=tmp_path / "cache.db")
    rows = rows_of(ended)
    assert len(known["expensive"].calls) == 3
    assert sum(call.cached for row in rows for call in row.calls) == 27
    assert [row.answer for row in rows] == [str(n % 3 + 2) for n in range(30)]
    assert ended.figures["cached"] == 27
    paid = {call.key for row in rows for call in row.calls if not call.cached}
    assert {call.key for row in rows for call in row.calls} == paid, (
        "a cached call names the one that was paid"
    )
    again = run(tmp_path, models=known, cache=tmp_path / "cache.db", out=tmp_path / "two.jsonl")
    assert again.figures["spent_nanousd"] == 0
    assert len(known["expensive"].calls) == 3
    plan = Plan((CHEAP, EXPENSIVE), 2)
    third = run(
        tmp_path,
        models=known,
        cache=tmp_path / "cache.db",
        out=tmp_path / "three.jsonl",
        router=FixedPlansRouter({plan: (0.9, 400_000)}),
    )
    assert len(known["expensive"].calls) == 3, "the workflow looks, too"
    assert len(known["cheap"].calls) <= 30
    assert all(row.calls[-1].cached for row in rows_of(third))


def test_old_objects_are_left_to_the_collector_again(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 3)
    frozen: list[int] = []

    def says(messages: Sequence[Message], generation: Generation) -> str:
        frozen.append(gc.get_freeze_count())
        if len(frozen) > 3:
            raise AuthenticationFailed("no key")
        return says_right(messages, generation)

    run(tmp_path, models=models(expensive=says))
    assert all(frozen)
    with pytest.raises(AuthenticationFailed):
        run(tmp_path, models=models(expensive=says), force=True)
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        run(tmp_path, force=True)
        assert gc.get_freeze_count() > 0, "what somebody else froze stays so"
    finally:
        gc.unfreeze()


# Formats


def test_results_keep_the_other_columns_of_the_input(tmp_path: Path) -> None:
    """Also of rows that were left out, under another name where the results have a column of that name."""
    (tmp_path / "in.csv").write_text(
        "topic,id,question,answer,text\n"
        "sums,a,What is 1 + 2?,3,page 7\n,b,,4,\nmore,c,What is 2 + 2?,4,page 8\n"
    )
    for name in ("out.csv", "out.jsonl", "out.parquet"):
        run(tmp_path, source=tmp_path / "in.csv", out=tmp_path / name, skip_bad=True)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["topic"], row["input_text"]) for row in rows] == [
        ("a", "sums", "page 7"),
        ("b", "", ""),
        ("c", "more", "page 8"),
    ]
    assert [row["state"] for row in rows] == ["answered", "skipped", "answered"]
    lines = read_lines(tmp_path / "out.jsonl")
    assert [(row.get("topic"), row.get("input_text")) for row in lines] == [
        ("sums", "page 7"),
        (None, None),
        ("more", "page 8"),
    ]
    import pyarrow.parquet as parquet

    assert parquet.read_table(tmp_path / "out.parquet")["topic"].to_pylist() == ["sums", None, "more"]


def test_tabs_in_and_out(tmp_path: Path) -> None:
    (tmp_path / "in.tsv").write_text("id\tquestion\ttopic\na\tWhat is 1 + 2?\tsums, small\n")
    run(tmp_path, source=tmp_path / "in.tsv", out=tmp_path / "out.tsv")
    with (tmp_path / "out.tsv").open(newline="") as file:
        (row,) = csv.DictReader(file, delimiter="\t")
    assert (row["id"], row["answer"], row["topic"]) == ("a", "3", "sums, small")


def test_csv_and_parquet_in_and_out(tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    (tmp_path / "in.csv").write_text("id,question,answer\na,What is 1 + 2?,3\nb,What is 2 + 2?,5\n")
    run(tmp_path, source=tmp_path / "in.csv", out=tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["answer"], row["correct"]) for row in rows] == [
        ("a", "3", "True"),
        ("b", "4", "False"),
    ]
    run(tmp_path, source=tmp_path / "in.csv", out=tmp_path / "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["id"], row["answer"], row["correct"]) for row in table] == [
        ("a", "3", True),
        ("b", "4", False),
    ]


def test_openai_s_batch_format_in_and_out(tmp_path: Path) -> None:
    def line(name: str, **body: Any) -> str:
        asked = {"model": "auto", "messages": [{"role": "user", "content": "What is 3 + 2?"}], **body}
        return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": asked})

    lines = [
        line("auto"),
        line("alone", model="cheap", max_tokens=3),
        line("pair", model="silent+cot"),
        line("no", model="none"),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    known = models()
    ended = run(tmp_path, models=known)
    auto, alone, pair, none = read_lines(tmp_path / "out.jsonl")
    assert list(auto) == ["id", "custom_id", "response", "error"]
    body = auto["response"]["body"]
    assert auto["response"]["status_code"] == 200
    assert (auto["custom_id"], body["object"], body["model"]) == ("auto", "chat.completion", "expensive+cot")
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "The answer is 5.",
        "refusal": None,
    }
    assert (
        body["usage"]["total_tokens"]
        == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
        > 4
    )
    choice = alone["response"]["body"]["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("The answer is", "length")
    assert len(known["cheap"].calls[0][0]) == 1, "a model alone is asked as it is"
    assert pair["response"]["body"]["choices"][0]["message"]["content"] == "Who knows"
    assert none["response"] is None
    assert none["error"]["code"] == "failed"
    assert "'none'" in none["error"]["message"]
    assert [row.state for row in rows_of(ended)] == ["answered"] * 3 + ["failed"]


def test_texts_are_kept_where_that_is_wanted(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 2, gold=False)
    rows = rows_of(run(tmp_path, keep_texts=True))
    assert [row.text for row in rows] == ["The answer is 2.", "The answer is 3."]
    assert [row.correct for row in rows] == [None, None]
    assert read_lines(tmp_path / "out.jsonl")[0]["text"] == "The answer is 2."
    assert "correct" not in read_lines(tmp_path / "out.jsonl")[0]


# What is refused


def test_bad_rows_are_told_before_anything_is_spent(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 3)
    with (tmp_path / "in.jsonl").open("ab") as file:
        file.write(b'{"id": "q1", "question": "again?"}\n{"id": "x"}\n{"question": "\xff"}\n')
    known = models()
    with pytest.raises(DataError, match=r"3 of 6 rows cannot be used: row 5.*|3 of 6") as refused:
        run(tmp_path, models=known)
    for why in ("id 'q1' is that of row 2 too", "line 5: no question", "line 6: not UTF-8", "--skip-bad"):
        assert why in str(refused.value)
    assert not known["expensive"].calls
    ended = run(tmp_path, models=known, skip_bad=True, force=True)
    rows = rows_of(ended)
    assert [row.state for row in rows] == ["answered"] * 3 + ["skipped"] * 3
    assert ended.job.ending == "completed"
    assert "no question" in rows[4].reason
    assert [each["state"] for each in read_lines(tmp_path / "out.jsonl")] == [row.state for row in rows]


def test_settings_and_files_that_do_not_fit(tmp_path: Path) -> None:
    source = write_questions(tmp_path / "in.jsonl", 3)
    with pytest.raises(InputError, match="no folder"):
        run(tmp_path, out=tmp_path / "no" / "out.jsonl")
    with pytest.raises(InputError, match="needs a budget"):
        run(tmp_path, budget=None)
    with pytest.raises(InputError, match="above zero dollars"):
        run(tmp_path, budget="0")
    with pytest.raises(InputError, match="above zero seconds"):
        run(tmp_path, deadline=0.0)
    with pytest.raises(UnknownName, match="engine"):
        run(tmp_path, engine="steam")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        run(tmp_path, source=tmp_path / "empty.jsonl")
    with pytest.raises(
        BudgetError, match=r"does not pay for one row: the cheapest call \(cheap\+cot\) may cost"
    ):
        run(tmp_path, budget="0.00001")
    assert not (job_folder(tmp_path / "out.jsonl") / "job.json").exists()
    run(tmp_path)
    for again in ({}, {"source": source}):
        with pytest.raises(InputError, match=r"exists; go on with it \(--resume\)"):
            run(tmp_path, **again)
    (tmp_path / "other.jsonl").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        run(tmp_path, out=tmp_path / "other.jsonl")
    with pytest.raises(InputError, match="no job made it"):
        run(tmp_path, out=tmp_path / "other.jsonl", resume=True)
    assert (tmp_path / "other.jsonl").read_text() == "mine"
    with pytest.raises(InputError, match="one of them"):
        run(tmp_path, resume=True, force=True)


def test_a_job_that_goes_on_must_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_questions(tmp_path / "in.jsonl", 3)
    run(tmp_path)
    for changed, name in (
        ({"policy": "best"}, "the policy was paced, and is best now"),
        ({"router": all_plans_router()}, "the router (FixedPlansRouter) has other contents than then"),
        ({"router": None}, "the router was FixedPlansRouter, and is the packaged table now"),
        ({"skip": 1}, "it took all rows of the input, and would take the rows from 2 on now"),
        (
            {"models": {**models(), "cheap": ScriptedModel(spec=spec("cheap", 0.2))}},
            "the catalogue differs: cheap changed",
        ),
        ({"model": "cheap"}, "rows went to any pair then, rows went to cheap with any strategy now"),
        (
            {"generation": GenerationSettings(temperature=0.5)},
            "texts were generated with no settings, and would be with temperature=0.5 now",
        ),
    ):
        with pytest.raises(InputError, match="began otherwise") as refused:
            run(tmp_path, resume=True, **changed)
        assert name in str(refused.value)
        assert not re.search("[0-9a-f]{12}", str(refused.value).replace(str(tmp_path), ""))
    with pytest.raises(InputError, match="has no budget"):
        run(tmp_path, resume=True, ledger=tmp_path / "other.db")
    write_questions(tmp_path / "in.jsonl", 4)
    with pytest.raises(InputError, match=r"in\.jsonl holds other questions than then"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(
    "given",
    [
        {"model": "cheap", "strategy": "cot"},
        {"generation": GenerationSettings(temperature=0.5)},
        {"policy": "best", "skip": 1, "limit": 2, "keep_texts": True, "tries": 2, "timeout": 30.0},
    ],
)
def test_a_job_that_goes_on_remembers_what_it_was_given(tmp_path: Path, given: dict[str, Any]) -> None:
    write_questions(tmp_path / "in.jsonl", 4)
    first = run(tmp_path, **given)
    objects = {"models": models(), "router": two_plans_router()}
    again = run_batch(None, tmp_path / "out.jsonl", resume=True, **objects)
    assert again.job.fingerprint == first.job.fingerprint
    assert again.job.memory == first.job.memory
    assert rows_of(again) == rows_of(first)
    other = (
        {"model": "expensive"} if "model" in given else {"generation": GenerationSettings(temperature=0.9)}
    )
    with pytest.raises(InputError, match="began otherwise"):
        run_batch(None, tmp_path / "out.jsonl", resume=True, **objects, **other)


def test_a_new_job_needs_an_input(tmp_path: Path) -> None:
    for resume in (False, True):
        with pytest.raises(InputError, match="no job to go on with"):
            run_batch(None, tmp_path / "out.jsonl", budget=1, resume=resume)


def test_two_processes_do_not_work_on_one_job(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 3)
    run(tmp_path)
    with acquire_job_lock(job_folder(tmp_path / "out.jsonl")):
        script = "import sys; from scripted_batch import *; run(Path(sys.argv[1]), resume=True)"
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
            cwd=SUPPORT,
            timeout=120,
        )
    assert "another process works on the job" in done.stderr


# Going on


def test_a_job_with_more_money_goes_on_with_what_was_skipped(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 100)
    known = models()
    first = run(tmp_path, budget="0.002", models=known)
    answered = {row.id for row in rows_of(first) if row.state == "answered"}
    calls = sum(len(model.calls) for model in known.values())
    second = run(tmp_path, budget="0.1", models=known, resume=True)
    assert second.job.ending == "completed"
    assert second.job.budget == first.job.budget
    assert {row.state for row in rows_of(second)} == {"answered"}
    assert sum(len(model.calls) for model in known.values()) == 100 - len(answered) + calls
    third = run(tmp_path, budget=None, models=known, resume=True)
    assert third.figures["spent_nanousd"] == second.figures["spent_nanousd"]
    assert sum(len(model.calls) for model in known.values()) == 100 - len(answered) + calls
    with pytest.raises(BudgetError, match="above the new limit"):
        run(tmp_path, budget="0.0001", models=known, resume=True)


@pytest.mark.parametrize("ways", [two_plans_router, all_plans_router], ids=["one call", "plans"])
def test_rows_that_a_kill_cut_or_lost_come_from_the_ledger(
    tmp_path: Path, ways: Callable[[], FixedPlansRouter]
) -> None:
    write_questions(tmp_path / "in.jsonl", 30)
    known = models()
    ended = run(tmp_path, models=known, router=ways())
    before = rows_of(ended)
    calls = sum(len(model.calls) for model in known.values())
    journal = ended.folder / "rows.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:12]) + lines[12][:50])
    (ended.folder / "cache.db").unlink()
    (tmp_path / "out.jsonl").unlink()
    again = run(tmp_path, models=known, router=ways(), resume=True)
    after = rows_of(again)
    assert sum(len(model.calls) for model in known.values()) == calls, "nothing was asked again"
    assert [(row.id, row.answer, row.cost_nanousd, row.route) for row in after] == [
        (row.id, row.answer, row.cost_nanousd, row.route) for row in before
    ]
    assert len(read_lines(tmp_path / "out.jsonl")) == 30


def test_what_was_begun_is_ended_though_nothing_would_be_planned_for_it_now(tmp_path: Path) -> None:
    """A kill leaves calls of rows that nobody wrote down; what is left buys nothing else."""
    write_questions(tmp_path / "in.jsonl", 30)
    ended = run(tmp_path)
    before = rows_of(ended)
    journal = ended.folder / "rows.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:12]))
    (ended.folder / "cache.db").unlink()
    posted = sum(row.cost_nanousd for row in before)
    again = run(tmp_path, resume=True, budget=str(Decimal(posted) / 10**9))
    assert [(row.id, row.answer, row.cost_nanousd) for row in rows_of(again)] == [
        (row.id, row.answer, row.cost_nanousd) for row in before
    ]


def test_a_journal_of_another_job_is_damage(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 3)
    ended = run(tmp_path)
    (ended.folder / "rows.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match="line 1: not a row of a job"):
        run(tmp_path, resume=True)


class Slow(ScriptedModel):
    """Pauses before each word, and tells when it began."""

    def __init__(self, name: str, price: float, pause: float) -> None:
        super().__init__(says_right, spec=spec(name, price), pause=pause)
        self.begun = threading.Event()

    def stream(self, messages: Sequence[Message], generation: Generation) -> Any:
        self.begun.set()
        return super().stream(messages, generation)


def stopped(folder: Path, slow: Slow, **settings: Any) -> BatchEnd:
    """A job that is told to end once its first call has begun."""
    stop = threading.Event()

    def end() -> None:
        slow.begun.wait(120)
        stop.set()

    threading.Thread(target=end).start()
    return run(
        folder,
        models={**models(), "expensive": slow},
        router=FixedPlansRouter({EXPENSIVE: (0.9, 390_000)}),
        stop=stop,
        **settings,
    )


def test_a_job_that_is_told_to_end_finishes_what_runs(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 40)
    slow = Slow("expensive", 1.0, 0.2)
    ended = stopped(tmp_path, slow)
    rows = rows_of(ended)
    assert ended.job.ending == "drained"
    assert 1 <= len(rows) < 40
    assert {row.state for row in rows} == {"answered"}
    assert not (tmp_path / "out.jsonl").exists(), "results appear when all is done"
    slow.pause = 0.0
    again = run(
        tmp_path,
        models={**models(), "expensive": slow},
        router=FixedPlansRouter({EXPENSIVE: (0.9, 390_000)}),
        resume=True,
    )
    assert again.job.ending == "completed"
    assert len(rows_of(again)) == 40
    assert len(slow.calls) == 40


def test_what_does_not_end_in_time_is_cut_charged_and_made_again(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 6)
    slow = Slow("expensive", 1.0, 1.5)
    began = time.monotonic()
    ended = stopped(tmp_path, slow, drain_seconds=0.5)
    assert time.monotonic() - began < 120
    assert ended.job.ending == "drained"
    with Ledger(ended.job.ledger) as ledger:
        assert ledger.check() == []
        budget = ledger.budget(ended.job.budget)
    assert budget.held_nanousd == 0
    assert budget.posted_nanousd > 0, "words were written"
    slow.pause = 0.0
    again = run(
        tmp_path,
        models={**models(), "expensive": slow},
        router=FixedPlansRouter({EXPENSIVE: (0.9, 390_000)}),
        resume=True,
    )
    rows = rows_of(again)
    assert {row.state for row in rows} == {"answered"}
    assert max(row.cost_nanousd for row in rows) > min(row.cost_nanousd for row in rows), (
        "the cut call counts"
    )


def test_a_deadline_ends_a_job(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 400)
    slow = Slow("expensive", 1.0, 0.15)
    ended = run(
        tmp_path,
        models={**models(), "expensive": slow},
        router=FixedPlansRouter({EXPENSIVE: (0.9, 390_000)}),
        deadline=10.0,
    )
    rows = rows_of(ended)
    assert ended.job.ending == "deadline"
    assert len(rows) == 400
    assert {row.state for row in rows} == {"answered", "skipped"}
    assert {row.reason for row in rows if row.state == "skipped"} <= {
        "the deadline of 10 seconds passed",
        "no time is left for it before the deadline",  # as planned, where the calls are quick to end
    }


def test_a_job_that_ran_out_of_money_long_before_its_deadline_says_so(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 20)
    router = FixedPlansRouter({EXPENSIVE: (0.9, 390_000)})
    ended = run(tmp_path, router=router, deadline=600.0, budget="0.003")
    assert ended.job.ending == "budget_exhausted"
    assert {row.state for row in rows_of(ended)} == {"answered", "skipped"}
    assert "no time is left for it before the deadline" not in {row.reason for row in rows_of(ended)}


# What goes wrong


def test_errors_of_one_row_and_of_all(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 6)

    def says(messages: Sequence[Message], generation: Generation) -> str:
        if number_of(messages) == 3:
            raise ModelError("it broke")
        if number_of(messages) == 4:
            raise ValueError("a bug")
        return says_right(messages, generation)

    rows = rows_of(run(tmp_path, models=models(expensive=says)))
    assert [row.state for row in rows] == ["answered"] * 3 + ["failed"] * 2 + ["answered"]
    assert (rows[3].reason, rows[4].reason) == ("it broke", "ValueError: a bug")
    with pytest.raises(AuthenticationFailed, match="no key"):
        run(tmp_path, models=models(expensive=AuthenticationFailed("no key")), out=tmp_path / "two.jsonl")
    again = run(tmp_path, out=tmp_path / "two.jsonl", resume=True)
    assert {row.state for row in rows_of(again)} == {"answered"}


@pytest.mark.parametrize("error", [ModelUnavailable("busy"), RateLimited("too fast", 0.01)])
def test_a_call_that_may_succeed_later_is_tried_again(tmp_path: Path, error: ModelError) -> None:
    write_questions(tmp_path / "in.jsonl", 6)
    seen: set[int] = set()

    def says(messages: Sequence[Message], generation: Generation) -> str:
        number = number_of(messages)
        if number not in seen:
            seen.add(number)
            raise error
        return says_right(messages, generation)

    rows = rows_of(run(tmp_path, models=models(expensive=says)))
    assert {row.state for row in rows} == {"answered"}
    assert {row.calls[0].key.split("/")[2] for row in rows} == {"0.2"}
    away = models(expensive=error, cheap=error)
    rows = rows_of(run(tmp_path, models=away, out=tmp_path / "two.jsonl"))
    assert {(row.state, row.reason) for row in rows} == {("failed", str(error))}


def test_rows_that_wait_for_another_try_do_not_hold_up_the_job(tmp_path: Path) -> None:
    """Every row under way waits, the planner wants to see what they cost first, and nothing else runs."""
    write_questions(tmp_path / "in.jsonl", 60)
    lock, seen = threading.Lock(), set[int]()

    def says(messages: Sequence[Message], generation: Generation) -> str:
        number = number_of(messages)
        with lock:
            first = number not in seen
            seen.add(number)
        if first:
            raise RateLimited("too fast", 0.2)
        return says_right(messages, generation)

    rows = rows_of(run(tmp_path, models=models(expensive=says, cheap=says), concurrency=2))
    assert {row.state for row in rows} == {"answered"}


def test_a_question_too_long_for_its_model_fails_alone(tmp_path: Path) -> None:
    long = json.dumps({"id": "long", "question": "What is 1 + " + "word " * 9000, "kind": "number"})
    write_questions(tmp_path / "in.jsonl", 2)
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write(long + "\n")
    rows = rows_of(run(tmp_path))
    assert [row.state for row in rows] == ["answered", "answered", "failed"]
    assert "do not fit the context" in rows[2].reason


KILLED_BEFORE_POSTING = """
import os, sys
from batch_jobs import CHEAP, EXPENSIVE, FixedPlansRouter, Plan
from scripted_batch import *

def end(*given, **options):
    os._exit(9)

Ledger.attach = Ledger.settle = Ledger.settle_many = end
plan = Plan((CHEAP, EXPENSIVE), 2) if sys.argv[2] == "plan" else CHEAP
run(Path(sys.argv[1]), router=FixedPlansRouter({plan: (0.9, 400_000)}))
"""


@pytest.mark.parametrize("route", ["plan", "one call"])
def test_a_kill_between_an_answer_and_its_price_makes_no_call_free(tmp_path: Path, route: str) -> None:
    write_questions(tmp_path / "in.jsonl", 4)
    script = [sys.executable, "-c", KILLED_BEFORE_POSTING, str(tmp_path), route]
    assert subprocess.run(script, check=False, cwd=SUPPORT, timeout=240).returncode == 9
    plan = Plan((CHEAP, EXPENSIVE), 2) if route == "plan" else CHEAP
    rows = rows_of(run(tmp_path, router=FixedPlansRouter({plan: (0.9, 400_000)}), resume=True))
    calls = [call for row in rows for call in row.calls]
    assert len(calls) == (8 if route == "plan" else 4)
    assert not any(call.cached for call in calls)
    assert all(call.cost_nanousd for call in calls)


DISK_FULL = """
import resource, signal, sys
from scripted_batch import *

folder, size = Path(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
run(folder, ledger=sys.argv[3], budget="10", resume=True)
"""


@pytest.mark.parametrize("size", [100_000, 300_000])
def test_a_full_disk_in_the_middle_loses_nothing(tmp_path: Path, size: int, postgres: str) -> None:
    """A file may not grow past so many bytes; the ledger, in Postgres, has room."""
    write_questions(tmp_path / "in.jsonl", 2000)
    script = [sys.executable, "-c", DISK_FULL, str(tmp_path), str(size), postgres]
    full = subprocess.run(script, capture_output=True, text=True, check=False, cwd=SUPPORT, timeout=240)
    assert full.returncode != 0
    assert "File too large" in full.stderr
    assert "go on with --resume" in full.stderr
    ended = run(tmp_path, ledger=postgres, budget="10", resume=True)
    rows = [*read_rows(ended.folder)]
    assert len(rows) == 2000
    with Ledger(postgres) as ledger:
        posts = [entry.key for entry in ledger.entries(ended.job.budget) if entry.kind == "post"]
        assert ledger.budget(ended.job.budget).held_nanousd == 0
    assert len(posts) == len(set(posts)) == 2000
    assert len(read_lines(tmp_path / "out.jsonl")) == 2000


@pytest.mark.parametrize("size", [1_000_000, 3_000_000])
def test_a_full_disk_under_the_ledger_itself_loses_nothing(tmp_path: Path, size: int) -> None:
    """The ledger in SQLite grows fastest: it is the file that gets no room, between two writes of a
    transaction.
    """
    write_questions(tmp_path / "in.jsonl", 2000)
    script = [sys.executable, "-c", DISK_FULL, str(tmp_path), str(size), str(tmp_path / "ledger.db")]
    full = subprocess.run(script, capture_output=True, text=True, check=False, cwd=SUPPORT, timeout=240)
    assert full.returncode != 0
    assert "LedgerError: the ledger" in full.stderr
    with Ledger(tmp_path / "ledger.db") as ledger:
        before = {entry.key for entry in ledger.entries() if entry.kind == "post"}
        assert ledger.check() == []
    assert 0 < len(before) < 2000
    ended = run(tmp_path, budget="10", resume=True)
    rows = rows_of(ended)
    assert len(rows) == 2000
    assert {row.state for row in rows} == {"answered"}
    with Ledger(tmp_path / "ledger.db") as ledger:
        posts = [entry.key for entry in ledger.entries() if entry.kind == "post"]
    assert len(posts) == len(set(posts)) == 2000
    assert before <= set(posts), "what was paid for is not paid for again"


# Before spending, and by the command line


def test_a_preview_asks_nothing(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 100)
    known = models()
    found = preview_batch(tmp_path / "in.jsonl", budget="0.02", router=two_plans_router(), models=known)
    assert found.rows == 100
    assert [each.budget_nanousd for each in found.previews] == [
        5_000_000,
        10_000_000,
        20_000_000,
        40_000_000,
        80_000_000,
    ]
    accuracies = [each.accuracy for each in found.previews]
    assert accuracies == sorted(accuracies)
    assert accuracies[0] == pytest.approx(0.5, abs=0.05)
    assert accuracies[-1] == pytest.approx(0.9)
    assert all(each.cost_p50 <= each.cost_p90 <= each.budget_nanousd for each in found.previews)
    assert not known["expensive"].calls


CATALOGUE = """
[models.one]
description = "one"
kind = "scripted"
context_length = 8192
input_price = 0.1
output_price = 0.1
text = "The answer is 5."
"""


CLI_DISK_FULL = """
import resource, signal, sys
from viaticum.cli import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
main()
"""


def cli_folder(folder: Path, rows: int = 5, questions: int = 1) -> list[str]:
    (folder / "catalogue.toml").write_text(CATALOGUE)
    with (folder / "in.jsonl").open("w") as file:
        for number in range(rows):
            body = {
                "model": "one+cot",
                "messages": [{"role": "user", "content": f"What is {number % questions} + 2?"}],
            }
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return [
        "batch",
        str(folder / "in.jsonl"),
        "--out",
        str(folder / "out.jsonl"),
        "--catalogue",
        str(folder / "catalogue.toml"),
        "--ledger",
        str(folder / "ledger.db"),
    ]


def test_the_command_says_how_a_job_that_an_error_stopped_goes_on(tmp_path: Path) -> None:
    command = [*cli_folder(tmp_path, 1500, 1500), "--budget", "0.1"]
    script = [sys.executable, "-c", CLI_DISK_FULL, "1000000", *command]
    full = subprocess.run(script, capture_output=True, text=True, check=False, timeout=240)
    assert full.returncode == 1
    assert "what was done is kept: go on with --resume\nerror: the ledger" in full.stderr
    assert "1500 answered" in CliRunner().invoke(app, [*command, "--resume"], catch_exceptions=False).output
    refused = CliRunner().invoke(app, command)
    assert "what was done is kept" not in refused.output, "it did not begin"


def test_the_command_tells_events_and_writes_results(tmp_path: Path) -> None:
    command = cli_folder(tmp_path)
    done = CliRunner().invoke(app, [*command, "--budget", "0.01", "--json"], catch_exceptions=False)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [events[0]["event"], events[-1]["event"], events[-1]["ending"]] == [
        "reading",
        "ended",
        "completed",
    ]
    assert (events[-1]["answered"], events[-1]["cached"]) == (5, 4)
    assert len(read_lines(tmp_path / "out.jsonl")) == 5
    plain = CliRunner().invoke(app, [*command, "--resume", "--skip-bad"], catch_exceptions=False)
    assert "completed: 5 answered, 0 failed, 0 skipped; results in" in plain.output
    dry = CliRunner().invoke(
        app, [*command[:2], *command[4:6], "--budget", "1", "--dry-run"], catch_exceptions=False
    )
    assert "5 rows" in dry.output


def test_the_command_goes_on_with_the_results_alone(tmp_path: Path) -> None:
    """Ledger, catalogue, rows and settings are those of the job; a difference is told in words."""
    command = [*cli_folder(tmp_path, rows=6), "--skip", "1", "--limit", "4", "--temperature", "0.5"]
    done = CliRunner().invoke(app, [*command, "--budget", "0.01"], catch_exceptions=False)
    assert "completed: 4 answered" in done.output
    again = ["batch", "--resume", str(tmp_path / "out.jsonl")]
    assert "completed: 4 answered" in CliRunner().invoke(app, again, catch_exceptions=False).output
    more = CliRunner().invoke(app, [*again, "--budget", "0.02"], catch_exceptions=False)
    assert "completed: 4 answered" in more.output
    assert Job.load(tmp_path / "out.jsonl.job").limit_nanousd == 20_000_000
    for changed, text in (
        (["--limit", "5"], "it took rows 2 to 5 of the input, and would take rows 2 to 6 now"),
        (["--temperature", "1"], "with temperature=0.5, and would be with temperature=1.0 now"),
        (["--policy", "best"], "the policy was paced, and is best now"),
    ):
        refused = CliRunner().invoke(app, [*again, *changed])
        assert refused.exit_code == 1
        assert text in " ".join(str(refused.exception or refused.output).split())
    nothing = CliRunner().invoke(app, ["batch", "--resume", str(tmp_path / "no.jsonl")])
    assert "no job to go on with: there is no" in str(nothing.exception or nothing.output)


def test_the_command_ends_in_order_on_a_signal(tmp_path: Path) -> None:
    import os
    import signal

    command = cli_folder(tmp_path)
    (tmp_path / "catalogue.toml").write_text(CATALOGUE + "pause = 1.0\n")
    (tmp_path / "in.jsonl").write_text(
        (tmp_path / "in.jsonl").read_text().replace("What is 3", "What is 4", 1).replace("+ 2?", "+ 9?", 2)
    )
    script = [
        sys.executable,
        "-c",
        "from viaticum.cli import main; main()",
        *command,
        "--budget",
        "0.01",
        "--json",
        "--concurrency",
        "1",
    ]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "started":
            break
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert json.loads(out.splitlines()[-1])["ending"] == "drained"
    assert "ending: running calls are finished" in err


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("45", 45)]
)
def test_spans_of_time(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "0", "-1h", "2 h"])
def test_what_is_no_span_of_time(text: str) -> None:
    with pytest.raises(InputError, match="not a span of time"):
        seconds_of(text)


def test_a_planned_row_can_be_sent_elsewhere() -> None:
    """Another engine pickles plans, and compares the policy that they carry."""
    planned = PlannedRow(BatchRow(1, "a", Query("?")), Plan((CHEAP,)), NO_FALLBACK)
    again = pickle.loads(pickle.dumps(planned))
    assert again == planned
    assert again.policy == NO_FALLBACK
    assert replace(again, why="x") != planned


@pytest.mark.parametrize(("held", "planned"), [(None, {CHEAP, EXPENSIVE}), (600_000, {CHEAP})])
def test_a_way_whose_worst_case_does_not_fit_is_not_planned(held: int | None, planned: set[Pair]) -> None:
    """A call of the expensive pair costs 390,000 on average, and 600,000 may be held for it."""
    rows = [BatchRow(number, str(number), Query(f"What is {number} + 2?")) for number in range(1, 5)]

    def worst(row: PlannedRow) -> int:
        assert held is not None
        assert row.plan is not None
        return held if row.plan.pairs[0] == EXPENSIVE else 60_000

    planner = RowPlanner(
        RouteEstimates(two_plans_router(), lambda plan: True),
        "paced",
        left=lambda: 550_000,
        elapsed=lambda: 0.0,
        worst=worst if held else None,
        concurrency=8,
    )
    planner.begin(list(enumerate(rows)), len(rows))
    found = [each for each in planner.plan(rows) if each is not None]
    assert {each.plan.pairs[0] for each in found if each.plan is not None} == planned


def test_what_a_cheaper_plan_costs_says_nothing_of_the_one_that_was_chosen() -> None:
    rows = [BatchRow(number, str(number), Query(f"What is {number} + 2?")) for number in range(1, 65)]
    estimates = RouteEstimates(two_plans_router(), lambda plan: True)

    def forecast(instead: Plan | None) -> float:
        planner = RowPlanner(
            estimates, "paced", left=lambda: 64 * 400_000, elapsed=lambda: 0.0, concurrency=64
        )
        planner.begin(list(enumerate(rows)), len(rows))
        for planned in list(itertools.islice(planner.plan(rows), 16)):
            assert planned is not None
            assert planned.plan == Plan((EXPENSIVE,))
            if instead is not None:
                planned = replace(planned, plan=instead)
            planner.settled(planned, build_row(planned, "answered", cost=39_000))
        told = planner.forecast()
        assert told is not None
        return told.cost_p50

    assert forecast(Plan((CHEAP,))) == pytest.approx(16 * 39_000 + 48 * 390_000, rel=0.01)
    assert forecast(None) < 16 * 39_000 + 40 * 390_000, "but its own cost does"


@pytest.mark.parametrize("passes", [1, 2])
def test_what_a_job_comes_to_counts_what_was_spent_before_this_pass(passes: int) -> None:
    """A forecast is of a pass, whose budget is what was left when it began."""
    with Ledger("memory:") as books:
        books.create("job", limit_nanousd=1000)
        if passes == 2:
            books.reserve(
                "job", "k", {"m": TokenCount(input_tokens=400)}, {"m": Price.per_million("0.001", "0.001")}
            )
            books.settle("k", {"m": TokenCount(input_tokens=400)})
        spent = books.budget("job").posted_nanousd
        told: list[dict[str, Any]] = []
        seen = Progress(told.append, books, "job", 10, Counts(), lambda: Preview(1000 - spent, 0.5, 300, 400))
        seen.now()
    assert told[0]["projected_nanousd"] == spent + 300
    assert spent == (400 if passes == 2 else 0)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_plan_whose_next_call_does_not_fit_ends_with_what_it_has(tmp_path: Path, rows: int) -> None:
    """The second voice is expensive: its worst case is more than the budget, whatever else ends."""
    plans = FixedPlansRouter(
        {Plan((CHEAP, EXPENSIVE), 2): (0.9, 40_000), CHEAP: (0.5, 39_000), EXPENSIVE: (0.5, 45_000)}
    )
    write_questions(tmp_path / "in.jsonl", rows)
    done = run_batch(
        tmp_path / "in.jsonl",
        tmp_path / "out.jsonl",
        budget="0.0004",
        ledger=tmp_path / "ledger.db",
        models=models(),
        router=plans,
        policy="best",
        concurrency=4,
    )
    assert done.job.ending == "completed"
    assert done.figures["answered"] == rows
    assert done.figures["spent_nanousd"] <= 400_000


@pytest.mark.timeout(240)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_paid_call_without_an_answer_is_not_taken_up_for_ever(tmp_path: Path, rows: int) -> None:
    """What comes next does not fit, and a cheaper pair is there: the row's own call is paid for and decides
    its way.
    """
    ended = run_batch(
        write_questions(tmp_path / "in.jsonl", rows),
        tmp_path / "out.jsonl",
        budget="0.0000832",
        models=models(cheap=says_nothing),
        router=FixedPlansRouter({CHEAP: (0.5, 39_000), SILENT: (0.1, 20_000), EXPENSIVE: (0.9, 390_000)}),
        ledger=tmp_path / "l.sqlite",
    )
    assert ended.figures["done"] == rows
    assert ended.figures["answered"] == 0
    assert ended.figures["spent_nanousd"] <= 83_200


# The package


def test_the_package_offers_its_functions_and_loads_them_on_first_use() -> None:
    code = (
        "import sys, viaticum.agents.batch as batch\n"
        "import viaticum.agents.batch.input\n"
        "assert 'viaticum.agents.batch.run' not in sys.modules\n"
        "from viaticum.agents.batch import job_folder, preview_batch, run_batch\n"
        "from viaticum.agents.batch import folder, run\n"
        "assert (job_folder, run_batch) == (folder.job_folder, run.run_batch)\n"
        "assert dir(batch) == ['job_folder', 'preview_batch', 'run_batch']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'run_all'"):
        _ = batch_package.run_all
