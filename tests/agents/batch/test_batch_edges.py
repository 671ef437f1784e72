"""Batches at their edges: tries that fail where money runs short, starting over, deadlines, rows that name
their model.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import (
    CHEAP,
    EXPENSIVE,
    FixedPlansRouter,
    models,
    number_of,
    read_lines,
    says_right,
    spec,
    two_plans_router,
    write_questions,
)
from scripted_batch import rows_of, run

import viaticum.agents.batch as batch_package
from viaticum.agents.batch import job_folder, run_batch
from viaticum.agents.batch.input import BatchRow
from viaticum.agents.batch.planned_rows import RouteEstimates
from viaticum.agents.batch.planning import RowPlanner
from viaticum.agents.batch.results import build_row
from viaticum.agents.workflow.calls import generation_parameters
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.errors import InputError, ModelUnavailable
from viaticum.jobs import read_rows
from viaticum.models.base import Generation
from viaticum.models.scripted import ScriptedModel
from viaticum.models.settings import resolve
from viaticum.reports.numbers import read_numbers
from viaticum.routers.query import Plan
from viaticum.strategies import get as get_strategy
from viaticum.types import Completion, Message, Query


def wishes(path: Path, *wanted: str) -> Path:
    """A row of OpenAI's format for each model that is named."""
    with path.open("w") as file:
        for number, model in enumerate(wanted):
            body = {
                "model": model,
                "max_tokens": 60,
                "messages": [{"role": "user", "content": f"What is {number} + 2?"}],
            }
            line = {"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


class Once:
    """A script that is unavailable the first time that it is asked."""

    def __init__(self, script: Any = says_right) -> None:
        self.script, self.failed = script, False

    def __call__(self, messages: Sequence[Message], generation: Generation) -> str:
        if not self.failed:
            self.failed = True
            raise ModelUnavailable("busy just now")
        text: str = self.script(messages, generation)
        return text


# Money


@pytest.mark.timeout(240)
def test_a_row_whose_try_failed_and_does_not_fit_again_takes_what_fits(tmp_path: Path) -> None:
    """The expensive pair's first try is for nothing; until its next one the others have spent what it would
    need.
    """
    write_questions(tmp_path / "in.jsonl", 3)
    held = worst_case(EXPENSIVE)
    ended = run(
        tmp_path,
        models=models(expensive=Once(long_and_right)),
        policy="best",
        concurrency=1,
        router=FixedPlansRouter({CHEAP: (0.5, 39_000), EXPENSIVE: (0.9, 200_000)}),
        budget=usd(held + 100_000),
    )
    rows = rows_of(ended)
    assert {row.state for row in rows} == {"answered"}
    assert str(CHEAP) in {row.route for row in rows}


@pytest.mark.timeout(240)
def test_a_job_that_goes_on_keeps_what_a_row_last_took(tmp_path: Path) -> None:
    """Its first try was of another pair than the one that was paid for."""
    source = write_questions(tmp_path / "in.jsonl", 1)
    stop, known = threading.Event(), models(expensive=Once(), cheap=Once())
    router = FixedPlansRouter({CHEAP: (0.5, 39_000), EXPENSIVE: (0.9, 390_000)})
    with Ledger(tmp_path / "ledger.db") as books:
        first = run(tmp_path, source=source, models=known, router=router, tries=1, policy="best", stop=stop)
        job = first.job.budget
        asked = known["cheap"]
        pair = get_strategy(CHEAP.strategy)
        generation = resolve(Catalogue([asked.spec]), asked.name, pair)
        messages = pair.messages(next(iter(questions(source))))
        parameters = {"model": "cheap", "messages": messages, **generation_parameters(generation)}
        worst = asked.worst_case_of(messages, generation)
        prices = {"cheap": spec("cheap", 0.1).price}
        tags = {"model": CHEAP.model, "strategy": CHEAP.strategy}
        books.reserve(job, f"{job}/q0/0.2", worst, prices, parameters=parameters, tags=tags, dispatch=True)
        assert books.hold(f"{job}/q0/0") is not None
    (first.folder / "rows.jsonl").unlink()
    ended = run(tmp_path, source=source, models=known, router=router, policy="best", resume=True)
    (row,) = rows_of(ended)
    assert (row.state, row.route) == ("answered", str(CHEAP))
    assert [call.key for call in row.calls] == [f"{job}/q0/0.2"]


def questions(path: Path) -> Iterator[Query]:
    for line in read_lines(path):
        yield Query(line["question"], kind=line["kind"])


def worst_case(pair: Any) -> int:
    """What is held for a call of a pair about "What is 1 + 2?", about."""
    how = get_strategy(pair.strategy)
    model = models()[pair.model]
    generation = resolve(Catalogue([model.spec]), model.name, how)
    usage = model.worst_case_of(how.messages(Query("What is 1 + 2?", kind="number")), generation)
    price = float(model.spec.input_price or 0)
    return sum(round(price * 1000 * (count.input_tokens + count.output_tokens)) for count in usage.values())


def usd(nanousd: int) -> str:
    return f"{nanousd / 1e9:.9f}"


def long_and_right(messages: Sequence[Message], generation: Generation) -> str:
    return "so " * 150 + says_right(messages, generation)


def test_what_a_failed_try_cost_is_among_the_calls_of_its_row(tmp_path: Path) -> None:
    class Slow(ScriptedModel):
        """Is cut in the middle of its first text."""

        cut = False

        def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str | Completion]:
            for number, piece in enumerate(super().stream(messages, generation)):
                yield piece
                if number == 20 and not self.cut:
                    self.cut = True
                    raise ModelUnavailable("too slow")

    write_questions(tmp_path / "in.jsonl", 2)
    known = models() | {"expensive": Slow(long_and_right, spec=spec("expensive", 1.0))}
    ended = run(tmp_path, models=known, router=FixedPlansRouter({EXPENSIVE: (0.9, 390_000)}), concurrency=1)
    rows = rows_of(ended)
    assert [len(row.calls) for row in rows] == [2, 1]
    for row in rows:
        assert sum(call.cost_nanousd for call in row.calls) == row.cost_nanousd
    numbers = read_numbers([ended.folder]).runs[0]
    assert numbers.history.unnamed_calls == 0


def test_rows_that_name_a_model_find_their_money(tmp_path: Path) -> None:
    """Forty rows may be answered as is best, forty behind them name the expensive model; both fit if the
    first are frugal.
    """
    source = wishes(tmp_path / "in.jsonl", *["auto"] * 40, *["expensive+cot"] * 40)
    ends = {}
    for budget in ("0.0185", "1"):
        ended = run(
            tmp_path,
            source=source,
            out=tmp_path / f"{budget}.jsonl",
            budget=budget,
            router=FixedPlansRouter({CHEAP: (0.8, 39_000), EXPENSIVE: (0.9, 390_000)}),
        )
        ends[budget] = rows_of(ended)
    named, free = ends["0.0185"][40:], ends["0.0185"][:40]
    assert {row.state for row in named} == {"answered"}
    assert Counter(row.route for row in free)[str(CHEAP)] > 20
    assert {row.route for row in ends["1"]} == {str(EXPENSIVE)}
    previews = batch_package.preview_batch(
        source, budget="0.0185", router=two_plans_router(), models=models()
    ).previews
    assert all(each.cost_p50 <= each.cost_p90 <= each.budget_nanousd for each in previews)
    assert previews[-1].cost_p50 > 80 * 380_000, "of all rows"


def test_a_few_rows_without_a_model_among_many_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them is in the sample that prices are made from."""
    monkeypatch.setattr("viaticum.agents.batch.run.SAMPLE", 3)
    wanted = ["cheap"] * 60
    wanted[20] = "auto"
    wishes(tmp_path / "in.jsonl", *wanted)
    rows = rows_of(run(tmp_path))
    assert {row.state for row in rows} == {"answered"}
    assert rows[20].route == str(EXPENSIVE)


# Time


def test_no_row_begins_after_the_deadline(tmp_path: Path) -> None:
    begun: list[float] = []

    def slowly(messages: Sequence[Message], generation: Generation) -> str:
        begun.append(time.monotonic())
        time.sleep(0.6)
        return says_right(messages, generation)

    write_questions(tmp_path / "in.jsonl", 40)
    ended = run(tmp_path, models=models(expensive=slowly), policy="best", deadline=3.0, concurrency=1)
    assert ended.job.ending == "deadline"
    assert 0 < len(begun) < 15
    skipped = [row for row in rows_of(ended) if row.state == "skipped"]
    assert len(skipped) == 40 - len(begun)
    assert "the deadline of 3 seconds passed" in skipped[0].reason


@pytest.mark.parametrize("began", [0.0, 3000.0, 4200.0])
def test_a_later_pass_has_the_time_that_is_left(began: float) -> None:
    rows = [BatchRow(number, str(number), Query(f"What is {number} + 2?")) for number in range(40)]
    planner = RowPlanner(
        RouteEstimates(two_plans_router(), lambda plan: True),
        "paced",
        left=lambda: 10**12,
        elapsed=lambda: began,
        deadline=7200.0,
        concurrency=1,
    )
    planner.begin(list(enumerate(rows)), len(rows))
    planned = []
    for each in planner.plan(rows):
        assert each is not None
        planned.append(each.plan)
        planner.settled(each, build_row(each, "answered", answer="1"))
    assert planned == [Plan((EXPENSIVE,))] * 40


def test_a_row_that_goes_on_as_it_was_decided_is_closed_for_the_pacer() -> None:
    rows = [BatchRow(number, str(number), Query(f"What is {number} + 2?")) for number in range(64)]
    estimates = RouteEstimates(two_plans_router(), lambda plan: True)

    def forecast(took: Plan | None) -> int:
        planner = RowPlanner(
            estimates, "paced", left=lambda: 64 * 400_000, elapsed=lambda: 0.0, concurrency=64
        )
        planner.begin(list(enumerate(rows)), len(rows))
        source = planner.plan(rows)
        for _ in range(16):
            planned = next(source)
            assert planned is not None
            if took is not None:
                old = (planned.choice, planned.expected, planned.spread, planned.seconds)
                planned = estimates.planned(planned.row, took, planned.policy, "decided before", *old)
            planner.settled(planned, build_row(planned, "answered", cost=390_000))
        told = planner.forecast()
        assert told is not None
        return told.cost_p50

    assert forecast(Plan((CHEAP,))) == pytest.approx(forecast(None), rel=0.02)


# Starting over


def test_force_waits_for_nobody_and_removes_nothing_before_its_time(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 20)
    begun, go_on = threading.Event(), threading.Event()

    def waits(messages: Sequence[Message], generation: Generation) -> str:
        begun.set()
        go_on.wait(120)
        return says_right(messages, generation)

    ends: list[Any] = []
    running = threading.Thread(target=lambda: ends.append(run(tmp_path, models=models(expensive=waits))))
    running.start()
    assert begun.wait(120)
    before = sorted(path.name for path in job_folder(tmp_path / "out.jsonl").iterdir())
    with pytest.raises(InputError, match="another process works on the job"):
        run(tmp_path, force=True)
    assert sorted(path.name for path in job_folder(tmp_path / "out.jsonl").iterdir()) == before
    go_on.set()
    running.join(120)
    assert ends[0].job.ending == "completed"
    for wrong in (
        {"budget": None},
        {"budget": "0.0000001"},
        {"router": two_plans_router(), "policy": "nonsense"},
    ):
        with pytest.raises(Exception, match=r"budget|polic"):
            run(tmp_path, force=True, **wrong)
        assert len([*read_rows(ends[0].folder)]) == 20, "what is there stays until the new job may begin"
    again = run(tmp_path, force=True)
    assert again.job.budget != ends[0].job.budget
    assert len(rows_of(again)) == 20


def test_a_cache_that_cannot_be_opened_begins_no_job(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 2)
    with pytest.raises(InputError, match=r"cannot open the cache .*missing"):
        run(tmp_path, cache=tmp_path / "missing" / "cache.db")
    assert run(tmp_path).job.ending == "completed"


# Rows


def test_what_no_file_in_utf8_can_hold(tmp_path: Path) -> None:
    """Half of a character: refused in the input, replaced in what a model wrote."""
    (tmp_path / "in.jsonl").write_text(
        '{"id": "a", "question": "What is 1 + 2?", "kind": "text"}\n{"id": "b", "question": "\\ud800?"}\n'
        '{"id": "c", "question": "ok?", "answer": "\\ud83d"}\n'
        '{"id": "d", "question": "What is 3 \\u002b 2?", "kind": "text"}\n'
    )
    with pytest.raises(
        Exception, match=r"2 of 4 rows cannot be used: .*line 2: half of a character \('\\ud800'\)"
    ):
        run(tmp_path)
    known = models(expensive=lambda messages, generation: f"The answer is {number_of(messages)} \ud83d.")
    for number, out in enumerate(("a.jsonl", "b.csv", "c.parquet")):
        ended = run(
            tmp_path,
            out=tmp_path / out,
            models=known,
            skip_bad=True,
            keep_texts=True,
            router=FixedPlansRouter({EXPENSIVE: (0.9, 1)}),
        )
        rows = rows_of(ended)
        assert [row.state for row in rows] == ["answered", "skipped", "skipped", "answered"], number
        assert rows[0].text == "The answer is 1 \ufffd."
        assert (tmp_path / out).exists()


def test_a_number_of_thousands_of_digits_is_a_bad_row(tmp_path: Path) -> None:
    with write_questions(tmp_path / "in.jsonl", 1).open("a") as file:
        file.write('{"question": "What is 1 + 2?", "answer": ' + "1" * 5000 + "}\n")
    assert [row.state for row in rows_of(run(tmp_path, skip_bad=True))] == ["answered", "skipped"]


def test_an_unknown_strategy_fails_its_row_alone(tmp_path: Path) -> None:
    wishes(tmp_path / "in.jsonl", "cheap+nonsense", "cheap", "nobody")
    rows = rows_of(run(tmp_path))
    assert [row.state for row in rows] == ["failed", "answered", "failed"]
    assert "nonsense" in rows[0].reason


def test_results_without_a_suffix_are_as_the_input(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,question\na,What is 1 + 2?\n")
    run_batch(
        tmp_path / "in.csv",
        tmp_path / "results",
        budget="0.1",
        models=models(),
        router=two_plans_router(),
        ledger=tmp_path / "ledger.db",
    )
    assert (tmp_path / "results").read_text().splitlines()[0].startswith("id,")


def test_a_row_that_the_budget_cannot_pay_keeps_it_from_no_other(tmp_path: Path) -> None:
    """Such as one in which a whole document stands."""
    path = write_questions(tmp_path / "in.jsonl", 9)
    long = {"id": "long", "question": "word " * 7000 + "What is 1 + 2?", "kind": "number"}
    path.write_text(json.dumps(long) + "\n" + path.read_text())
    router = FixedPlansRouter({CHEAP: (0.5, 39_000)})
    ended = run(tmp_path, models=models(cheap=long_and_right), router=router, budget="0.0006")
    states = {row.id: row.state for row in rows_of(ended)}
    assert states.pop("long") == "skipped"
    assert set(states.values()) == {"answered"}
    assert ended.job.ending == "budget_exhausted"
