"""What a report says of the router, of other budgets, and of thinking and answers, against counts by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_jobs import write_questions
from job_runs import make_job, questions, write_table
from scripted_batch import run

from viaticum.jobs import ROWS, Job, JobRow, read_rows, row_line
from viaticum.money import Price
from viaticum.outcomes import read_outcomes
from viaticum.reports import read_numbers
from viaticum.reports.chart_rendering import NARROW, WIDE
from viaticum.reports.frontier import match_outcomes
from viaticum.reports.numbers import RunNumbers
from viaticum.reports.other_budgets import CURVE, mixture_at, oracle_at
from viaticum.reports.other_budgets_section import other_budgets_section
from viaticum.reports.outcome_table import SharedOutcomes
from viaticum.reports.router_sections import router_section
from viaticum.reports.run_charts import labelled_phases, writers_chart
from viaticum.reports.run_reader import pieces_of
from viaticum.reports.run_sections import sections_of
from viaticum.reports.runs import ANSWER, PARTS, THINKING
from viaticum.routers.query.covering import CoveringRouter
from viaticum.routers.query.fake import FakeRouter
from viaticum.routers.query.prior import AbilityPrior, PriorModel
from viaticum.routers.query.restricted import RestrictedRouter
from viaticum.routers.query.static import StaticRouter, TableOrigin

JOB = "results.jsonl.job"


@pytest.fixture(scope="module")
def told(report_runs: Path) -> RunNumbers:
    return read_numbers([report_runs / JOB], outcomes=report_runs / "table.jsonl").runs[0]


@pytest.fixture(scope="module")
def known(told: RunNumbers, report_runs: Path) -> SharedOutcomes:
    return match_outcomes(told.run.rows, tuple(read_outcomes(report_runs / "table.jsonl")))[0]


# Other budgets


def test_a_mixture_is_the_best_of_all_draws_between_two_pairs_or_none(known: SharedOutcomes) -> None:
    """Any two of the pairs and of no answer, at every share: none is better, and one is as good."""
    accuracy = [*known.correct.mean(0), 0.0]
    cost = [*known.cost.mean(0), 0.0]
    for amount in np.geomspace(min(cost[:-1]) / 5, max(cost) * 3, 12):
        best = 0.0
        for one in range(len(cost)):
            for two in range(len(cost)):
                share = 1.0 if cost[one] <= amount else 0.0
                if cost[two] < amount < cost[one]:
                    share = (amount - cost[two]) / (cost[one] - cost[two])
                if share * cost[one] + (1 - share) * cost[two] <= amount * (1 + 1e-9):
                    best = max(best, share * accuracy[one] + (1 - share) * accuracy[two])
        found = float(mixture_at(known.correct.mean(0), known.cost.mean(0), np.array([amount]))[0])
        assert found == pytest.approx(best, abs=1e-9)


def test_an_oracle_buys_the_cheapest_right_answers_first(known: SharedOutcomes) -> None:
    prices = sorted(
        min(cost for cost, right in zip(costs, rights, strict=True) if right)
        for costs, rights in zip(known.cost, known.correct, strict=True)
        if rights.any()
    )
    for amount in (0.0, 30_000.0, 120_000.0, 1e9):
        left, bought = amount * len(known.cost), 0
        for price in prices:
            if price > left + 1e-3:
                break
            left, bought = left - price, bought + 1
        assert float(oracle_at(known, np.array([amount]))[0]) == pytest.approx(bought / len(known.cost))


def test_other_budgets_are_those_of_the_planner_and_shares_of_the_limit(told: RunNumbers) -> None:
    found, job = told.other_budgets, told.run.job
    assert found is not None
    assert job is not None
    assert job.limit_nanousd is not None
    at = {each.nanousd: each for each in found.at}
    assert list(at) == sorted(at)
    assert told.spent < job.limit_nanousd / 2, "it did not bind, so that shares of what was spent are shown"
    assert {round(told.spent / 4), told.spent, 4 * told.spent, job.limit_nanousd} <= set(at)
    for preview in job.previews:
        assert at[preview.budget_nanousd].forecast == preview.accuracy
    shares = [each.mixture for each in found.at]
    assert all(each is not None and each.low <= each.value <= each.high for each in shares)
    oracles = [each.oracle or 0.0 for each in found.at]
    assert oracles == sorted(oracles)
    assert all(o >= m.value - 1e-9 for o, m in zip(oracles, shares, strict=True) if m)
    assert len(found.curve) == CURVE


def test_a_run_that_is_cut_off_has_what_was_right_by_then(told: RunNumbers, report_runs: Path) -> None:
    rows = list(read_rows(report_runs / JOB))
    found = told.other_budgets
    assert found is not None
    before = [each for each in found.at if each.nanousd < told.spent]
    assert before
    for each in before:
        spent = right = 0
        for row, cost in zip(rows, told.row_costs, strict=True):
            spent += int(cost)
            if spent > each.nanousd:
                break
            right += bool(row.correct)
        assert each.cut_off == pytest.approx(right / len(rows))
    assert all(each.cut_off is None for each in found.at if each.nanousd >= told.spent)


def test_without_a_table_there_are_the_forecast_and_the_run_itself(report_runs: Path, tmp_path: Path) -> None:
    alone = read_numbers([report_runs / JOB]).runs[0]
    assert alone.other_budgets is not None
    assert all(each.mixture is None and each.oracle is None for each in alone.other_budgets.at)
    section = other_budgets_section(alone)
    assert section is not None
    assert [name for name, _ in section.tables[0].columns] == [
        "budget",
        "forecast",
        "this run, cut off there",
    ]
    assert not section.charts
    table = read_numbers([report_runs / "table.jsonl"]).runs[0]
    assert table.other_budgets is None
    assert other_budgets_section(table) is None


def test_free_models_and_a_job_without_a_limit_have_a_section(tmp_path: Path) -> None:
    folder = tmp_path / "free.jsonl.job"
    folder.mkdir()
    (folder / ROWS).write_text(
        row_line(JobRow("1", "?", "answered", answer="4", gold="4", correct=True, accuracy=0.5))
    )
    Job("in", "out", 1, "night", None, "gone.db", "best", ending="completed").save(folder)
    numbers = read_numbers([folder]).runs[0]
    section = other_budgets_section(numbers)
    assert section is not None
    assert "no outcome table was given" in section.empty.lower()


def test_the_figures_of_other_budgets_stand_at_both_widths(told: RunNumbers) -> None:
    section = other_budgets_section(told)
    assert section is not None
    (chart,) = section.charts
    for width in (NARROW, WIDE):
        drawn = chart.svg(width)
        assert "best mixture" in drawn
        assert "oracle" in drawn
        assert "e-0" not in "".join(part for part in drawn.split(">") if part.startswith("$"))


# What the router knew


def test_routers_tell_what_their_predictions_rest_on() -> None:
    (table,) = StaticRouter.default().knowledge()
    assert (table.kind, table.datasets, table.questions) == ("table", {"gsm8k": 200}, 200)
    assert table.date > "2026"
    (bare,) = StaticRouter(StaticRouter.default().rows).knowledge()
    assert (bare.datasets, bare.date) == ({}, "")
    assert FakeRouter("small+cot").knowledge()[0].kind == "given"
    models = [PriorModel(name, Price(1, 1)) for name in ("new", table.models[0])]
    known, prior = CoveringRouter(StaticRouter.default(), AbilityPrior(), models).knowledge()
    assert (known, prior.kind, prior.models) == (table, "prior", ("new",))
    (only,) = RestrictedRouter(
        CoveringRouter(StaticRouter.default(), AbilityPrior(), models), "new", None
    ).knowledge()
    assert (only.kind, only.models) == ("prior", ("new",))


def test_a_job_keeps_what_its_router_knew_and_the_report_says_it(tmp_path: Path) -> None:
    write_questions(tmp_path / "in.jsonl", 8)
    from batch_jobs import two_plans_router

    table = two_plans_router().table(None)  # type: ignore[arg-type]
    origin = TableOrigin("sums", 40, "2026-11-01", "about adding")
    ended = run(tmp_path, router=StaticRouter(table, origin))
    assert Job.load(ended.folder) == ended.job
    section = router_section(read_numbers([ended.folder]).runs[0])
    assert section is not None
    assert section.tables[0].rows == (
        (
            "a table: the same figures for every question",
            "cheap, expensive",
            "sums (about adding)",
            "40",
            "2026-11-01",
        ),
    )
    assert any("predicted 90.0% right" in line for line in section.lead)


def test_what_the_router_knew_is_told_with_the_rows_that_it_had_seen(
    report_runs: Path, tmp_path: Path
) -> None:
    section = router_section(read_numbers([report_runs / JOB]).runs[0])
    assert section is not None
    fitted, prior = section.tables[0].rows
    assert fitted[1:] == ("large, small", "sums (900), words (300)", "1,200", "2026-11-20")
    assert prior[0].startswith("prior")
    assert any("calibration error was 2.1%" in line for line in section.lead)
    folder = make_job(tmp_path, questions(20))
    rows = [replace(row, seen=n < 3) for n, row in enumerate(read_rows(folder))]
    (folder / ROWS).write_text("".join(map(row_line, rows)), encoding="utf-8")
    section = router_section(read_numbers([folder]).runs[0])
    assert section is not None
    assert section.lead[0] == "Of 20 rows of this run it was fitted on 3."
    replace(Job.load(folder), memory={}).save(folder)
    section = router_section(read_numbers([folder]).runs[0])
    assert section is not None
    assert "did not keep this" in section.empty


def test_calibration_stands_by_the_routes_and_the_router(told: RunNumbers) -> None:
    names = [section.name for section in sections_of(told)]
    assert names[:4] == ["routes", "router", "calibration", "budgets"]
    columns = [name for name, _ in sections_of(told)[0].tables[0].columns]
    assert columns[columns.index("right (95%)") + 1] == "predicted"
    rows = told.run.rows
    for route in told.routes:
        here = rows.route == told.run.routes.index(route.route)
        counted = here & rows.graded & (rows.calls > 0)
        if counted.any():
            assert route.predicted == pytest.approx(rows.accuracy[counted].mean())


# Thinking and answers


@pytest.mark.parametrize(
    ("thinking", "text", "split"),
    [
        ("I add.", "I add. </think> It is 4.", "I add. </think> "),
        ("I add.", "<think>\nI add.\n</think>\n\nIt is 4.", "<think>\nI add.\n</think>\n\n"),
        ("I add.", "I add.<|end|>It is 4.", "I add.<|end|>"),
        ("I add.", "I add. It is 4 < 5.", "I add. "),
        ("not in it", "It is 4.", "It is 4."),
        ("", "It is 4.", ""),
        ("It is 4.", "It is 4.", "It is 4."),
    ],
)
@pytest.mark.parametrize("step", [1, 3, 50])
def test_pieces_are_split_where_the_answer_begins(thinking: str, text: str, split: str, step: int) -> None:
    pieces = [["small" if n % 2 else "large", text[n * step :][:step]] for n in range(-(-len(text) // step))]
    found, count = pieces_of(JobRow("1", "?", "answered", pieces=pieces, thinking=thinking))
    assert "".join(part for _, part in found) == text
    assert "".join(part for _, part in found[:count]) == split


def test_a_text_of_one_model_is_its_thinking_and_its_answer() -> None:
    row = JobRow("1", "?", "answered", pair="small+cot", thinking="I add.", text="It is 4.")
    assert pieces_of(row) == ((("small", "I add."), ("small", "It is 4.")), 1)
    assert pieces_of(replace(row, thinking=None)) == ((("small", "It is 4."),), 0)
    assert pieces_of(JobRow("1", "?", "failed")) == ((), 0)


def test_strips_hold_every_character_of_texts_that_think_or_are_mixed(
    told: RunNumbers, report_runs: Path
) -> None:
    texts, letters = told.texts, dict[tuple[str, str], int]()
    thought = 0
    for row in read_rows(report_runs / JOB):
        pieces, count = pieces_of(row)
        if not count and len({model for model, _ in pieces}) < 2:
            continue
        thought += bool(count)
        for n, (model, text) in enumerate(pieces):
            key = (THINKING if n < count else ANSWER), model
            letters[key] = letters.get(key, 0) + len(text)
    assert texts.thought == thought > 0
    assert {key: pytest.approx(sum(parts)) for key, parts in texts.phases.items()} == letters
    assert {phase for phase, _ in letters} == {THINKING, ANSWER}
    assert all(len(parts) == PARTS for parts in texts.phases.values())


def test_strips_are_named_at_every_width_thinking_first(told: RunNumbers) -> None:
    labels = [label for label, _ in labelled_phases(told.texts)]
    phases = [label.partition(":")[0] for label in labels]
    assert phases == sorted(phases, reverse=True)
    chart = writers_chart(told.texts)
    assert chart is not None
    for width in (NARROW, WIDE):
        drawn = chart.svg(width)
        assert all(label in drawn for label in labels)


def test_the_table_of_outcomes_keeps_its_sections(tmp_path: Path) -> None:
    table: Any = write_table(tmp_path / "table.jsonl", questions(12))
    names = [section.name for section in sections_of(read_numbers([table]).runs[0])]
    assert "router" not in names
    assert "budgets" not in names
