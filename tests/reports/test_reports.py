"""The numbers of a report against counts by hand from the same rows and entries; messages on bad input."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_runs import SKILLS, make_job, questions, write_table
from typer.testing import CliRunner

from viaticum.budgets import Ledger
from viaticum.cli import app
from viaticum.convex_hull import hull
from viaticum.errors import DataError, InputError, ViaticumError
from viaticum.jobs import ROWS, Call, Job, JobRow, read_rows, row_line
from viaticum.outcomes import accuracy_interval, read_outcomes, write_outcomes
from viaticum.reports import build, read_numbers
from viaticum.reports.chart_rendering import NARROW, WIDE
from viaticum.reports.cost_accuracy_chart import cost_accuracy_chart
from viaticum.reports.formatting import less_or_more, verdict
from viaticum.reports.frontier import cost_at
from viaticum.reports.intervals import GROUPS, grouped, mean, share
from viaticum.reports.label_placement import Box, place_labels
from viaticum.reports.numbers import RunNumbers
from viaticum.reports.overview import notices, parts
from viaticum.reports.runs import PARTS
from viaticum.routers.query.evaluate import best_mixture
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.types import Outcome

JOB = "results.jsonl.job"


@pytest.fixture(scope="module")
def told(report_runs: Path) -> RunNumbers:
    return read_numbers([report_runs / JOB], outcomes=report_runs / "table.jsonl").runs[0]


@pytest.fixture(scope="module")
def rows(report_runs: Path) -> list[JobRow]:
    return list(read_rows(report_runs / JOB))


def copied(report_runs: Path, where: Path, name: str = "results") -> Path:
    """A job that a test may damage, with its ledger."""
    shutil.copy(report_runs / f"{name}.db", where / f"{name}.db")
    folder = Path(shutil.copytree(report_runs / f"{name}.jsonl.job", where / f"{name}.jsonl.job"))
    replace(Job.load(folder), ledger=str(where / f"{name}.db")).save(folder)
    return folder


# Numbers


def test_accuracy_counts_every_row_whose_right_answer_is_known(told: RunNumbers, rows: list[JobRow]) -> None:
    assert told.accuracy is not None
    assert told.accuracy_answered is not None
    right = sum(bool(row.correct) for row in rows)
    assert (told.accuracy.count, told.accuracy.of) == (right, len(rows))
    assert told.accuracy_answered.of == sum(row.state == "answered" for row in rows) < len(rows)
    assert told.accuracy.low < told.accuracy.value < told.accuracy.high


def test_spend_is_what_the_ledger_posted(told: RunNumbers, report_runs: Path, rows: list[JobRow]) -> None:
    with Ledger(report_runs / "results.db", read_only=True) as ledger:
        posts = ledger.posts("night")
        held, overruns = ledger.budget("night").held_nanousd, [post for post in posts if post.overrun]
    history = told.history
    assert history is not None
    assert told.against_rows is not None
    assert told.provider is not None
    assert (
        told.spent == history.posted == sum(post.nanousd for post in posts) == history.named + history.unnamed
    )
    assert history.unnamed_calls == 1
    assert history.unnamed > 0
    assert history.missing == 0
    assert (history.held, history.held_calls, history.unknown, history.unknown_calls) == (held, 1, held, 1)
    assert history.overrun_calls == len(overruns) > 0
    assert history.overrun == sum(post.overrun for post in overruns)
    assert history.checked
    assert not history.wrong
    calls = [call for row in rows for call in row.calls]
    assert (told.against_rows.calls, told.against_rows.differ) == (len(calls), 0)
    assert told.provider.reported == sum(call.provider_nanousd or 0 for call in calls)
    assert told.provider.differ == sum(
        call.provider_nanousd not in (None, call.cost_nanousd) for call in calls
    )


def test_the_curve_ends_where_the_ledger_does(told: RunNumbers) -> None:
    history = told.history
    assert history is not None
    assert history.limit is not None
    assert history.moments[0].seconds == 0
    assert [each.seconds for each in history.moments] == sorted(each.seconds for each in history.moments)
    assert history.moments[-1].posted == history.posted
    assert max(each.committed for each in history.moments) == history.highest >= history.posted


def test_a_long_curve_is_thinned_evenly_and_keeps_its_peak(
    monkeypatch: pytest.MonkeyPatch, report_runs: Path, told: RunNumbers
) -> None:
    from viaticum.reports import ledger_history as module

    monkeypatch.setattr(module, "POINTS", 10)
    job = Job.load(report_runs / JOB)
    thin = module.read_ledger_history(job, told.run.calls.keys(), report_runs / JOB)
    assert told.history is not None
    assert 10 <= len(thin.moments) <= 21
    assert thin.highest == told.history.highest == max(each.committed for each in thin.moments)
    assert thin.moments[-1].posted == told.history.posted
    steps = np.diff([each.seconds for each in thin.moments])
    assert steps.max() < 8 * np.median(steps)


def test_routes_share_out_the_rows(told: RunNumbers, rows: list[JobRow]) -> None:
    counts = Counter(row.route for row in rows)
    assert {each.route: each.of.count for each in told.routes} == counts
    several = next(each for each in told.routes if "until two agree" in each.route)
    assert several.escalated is not None
    assert several.escalated.value == 1.0
    assert told.all is not None
    assert told.all.of.count == len(rows)
    mine = [row for row in rows if row.route == told.routes[0].route]
    assert told.routes[0].cost == pytest.approx(sum(row.cost_nanousd for row in mine) / len(mine))
    tried = [row.seconds for row in mine if row.calls]
    assert told.routes[0].seconds_p95 == pytest.approx(float(np.quantile(tried, 0.95)))


def test_regret_is_what_some_pair_would_have_got_right(
    told: RunNumbers, rows: list[JobRow], report_runs: Path
) -> None:
    possible = {each.question_id for each in read_outcomes(report_runs / "table.jsonl") if each.correct}
    missed = sum(row.id in possible and not row.correct for row in rows)
    assert told.all is not None
    assert told.all.regret is not None
    assert (told.all.regret.count, told.all.regret.of) == (missed, len(rows))


def test_what_was_lost_most_is_what_most_pairs_have_right(
    told: RunNumbers, report_runs: Path, rows: list[JobRow]
) -> None:
    table: dict[str, list[Outcome]] = {}
    for each in read_outcomes(report_runs / "table.jsonl"):
        table.setdefault(each.question_id, []).append(each)
    by_id = {row.id: row for row in rows}
    assert len(told.losses) == 10
    for loss in told.losses:
        row, right = by_id[loss.id], [each for each in table[loss.id] if each.correct]
        assert loss.right == (row.correct is True)
        assert loss.pairs_right == len(right)
        assert loss.better_cost == min(each.cost_nanousd or 0 for each in right)
        assert not loss.right or loss.better_cost < loss.cost
    wrong = [row for row in rows if row.correct is False and any(each.correct for each in table[row.id])]
    assert [loss.right for loss in told.losses] == sorted(loss.right for loss in told.losses)
    assert sum(not loss.right for loss in told.losses) == min(10, len(wrong))
    easiest = max(sum(each.correct for each in table[row.id]) for row in wrong)
    assert told.losses[0].pairs_right == easiest


def test_calibration_is_the_mean_distance_over_the_bins(told: RunNumbers, rows: list[JobRow]) -> None:
    tried = [(row.accuracy or 0.0, bool(row.correct)) for row in rows if row.calls]
    bins: dict[int, list[tuple[float, bool]]] = {}
    for chance, right in tried:
        bins.setdefault(min(9, int(chance * 10)), []).append((chance, right))
    error = sum(abs(sum(c for c, _ in each) - sum(r for _, r in each)) for each in bins.values()) / len(tried)
    made = told.calibration
    assert made is not None
    assert made.surplus is not None
    assert made.error == pytest.approx(error)
    assert made.of == len(tried) == sum(each.right.of for each in made.bins)
    assert made.surplus.value == pytest.approx(made.right - made.predicted)


def test_coverage_counts_rows_within_what_was_predicted(told: RunNumbers, rows: list[JobRow]) -> None:
    tried = [row for row in rows if row.calls]
    used = [sum(made for call in row.calls for _, made in call.usage.values()) for row in tried]
    assert told.tokens is not None
    assert told.tokens.within_p90 is not None
    assert told.costs is not None
    within = sum(one <= (row.tokens_p90 or 0) for one, row in zip(used, tried, strict=True))
    assert (told.tokens.within_p90.count, told.tokens.within_p90.of) == (within, len(tried))
    assert told.costs.within_p50 is not None
    assert told.costs.within_p50.count == sum(row.cost_nanousd <= (row.cost_p50 or 0) for row in tried)


def test_cached_rows_are_left_out_of_coverage_and_of_accounts(tmp_path: Path, report_runs: Path) -> None:
    folder = copied(report_runs, tmp_path)
    before = read_numbers([folder]).runs[0]
    row = next(row for row in read_rows(folder) if len(row.calls) == 1)
    call = replace(row.calls[0], cached=True, cost_nanousd=0)
    lines = [row_line(replace(row, id="again", calls=(call,), cost_nanousd=0))]
    with (folder / ROWS).open("a", encoding="utf-8") as file:
        file.writelines(lines)
    after = read_numbers([folder]).runs[0]
    assert before.tokens is not None
    assert after.tokens is not None
    assert before.tokens.within_p50 == after.tokens.within_p50
    assert before.against_rows == after.against_rows
    assert after.tally.answered == before.tally.answered + 1


def test_who_wrote_adds_up(told: RunNumbers, rows: list[JobRow]) -> None:
    mixed = [row for row in rows if row.pieces and len({model for model, _ in row.pieces}) > 1]
    assert told.texts.count == len(mixed) > 0
    letters = Counter[str]()
    for row in mixed:
        for model, text in row.pieces or ():
            letters[model] += len(text)
    assert {name: pytest.approx(sum(each)) for name, each in told.texts.parts.items()} == dict(letters)
    assert all(len(each) == PARTS for each in told.texts.parts.values())
    assert told.writers is not None
    assert told.writers.large == "large"
    used = Counter[str]()
    with Ledger(told.history.where, read_only=True) as ledger:  # type: ignore[union-attr]
        for post in ledger.posts("night"):
            used.update({model: count.output_tokens for model, count in post.usage.items()})
    assert {each.model: each.output_tokens for each in told.writers.models} == dict(used)


def test_failures_are_grouped_whatever_their_numbers(
    told: RunNumbers, rows: list[JobRow], report_runs: Path
) -> None:
    assert sum(each.count for each in told.groups if each.state == "failed") == sum(
        row.state == "failed" for row in rows
    )
    assert all(1 <= len(each.examples) <= 3 for each in told.groups)
    poor = read_numbers([report_runs / "poor.jsonl.job"]).runs[0]
    skipped = [each for each in poor.groups if each.state == "skipped"]
    assert len(skipped) == 1
    assert skipped[0].count == poor.tally.skipped > 1
    assert skipped[0].reason == "its p90 of $N does not fit what is left, $N"


# What could have been had


def test_the_plane_is_the_outcome_table(told: RunNumbers, report_runs: Path) -> None:
    plane = told.plane
    assert plane is not None
    assert plane.same_questions
    assert plane.run is not None
    assert told.accuracy is not None
    table = read_outcomes(report_runs / "table.jsonl")
    by_pair: dict[str, list[Outcome]] = {}
    for each in table:
        by_pair.setdefault(str(each.pair), []).append(each)
    for single in plane.singles:
        mine = by_pair[single.name]
        assert single.accuracy == pytest.approx(sum(each.correct for each in mine) / len(mine))
        assert single.cost == pytest.approx(sum(each.cost_nanousd or 0 for each in mine) / len(mine))
    assert plane.best.accuracy == max(each.accuracy for each in plane.singles) <= plane.oracle.accuracy
    assert plane.random.cost == pytest.approx(sum(each.cost for each in plane.singles) / len(SKILLS))
    assert plane.run.accuracy == told.accuracy.value
    corners = {each.name for each in plane.hull}
    assert plane.best.name in corners
    assert min(plane.singles, key=lambda each: each.cost).name in corners


def test_the_oracle_takes_the_cheapest_pair_that_is_right(told: RunNumbers, report_runs: Path) -> None:
    cheapest: dict[str, float] = {}
    for only_right in (False, True):
        found: dict[str, float] = {}
        for each in read_outcomes(report_runs / "table.jsonl"):
            if each.correct or not only_right:
                cost = float(each.cost_nanousd or 0)
                found[each.question_id] = min(cost, found.get(each.question_id, math.inf))
        cheapest |= found
    assert told.plane is not None
    assert told.plane.oracle.cost == pytest.approx(sum(cheapest.values()) / len(cheapest))


def test_the_drawn_curve_is_what_mixtures_get(told: RunNumbers, report_runs: Path) -> None:
    drawing = cost_accuracy_chart([told])
    assert drawing is not None
    assert told.plane is not None
    matrix = OutcomeMatrix.from_outcomes(read_outcomes(report_runs / "table.jsonl"))
    for width in (WIDE, NARROW):
        layers = drawing.draw(width).to_dict()["layer"]
        drawn = layers[0]["data"]["values"]
        assert layers[0]["encoding"]["x"]["scale"]["type"] == "log"
        across, right = np.log([each["x"] for each in drawn]), [each["y"] for each in drawn]
        costs = [point.cost for point in told.plane.hull]
        for cost in np.geomspace(costs[0] * 1.001, costs[-1], 20):
            shares = best_mixture(matrix.correct, matrix.cost, cost / 1e9)
            assert shares is not None
            # Straight between the drawn points, on the drawn axis, as a browser joins them.
            seen = np.interp(math.log(cost / 1e6), across, right)
            assert seen == pytest.approx(matrix.correct.mean(0) @ shares, abs=0.001)


def test_every_figure_of_the_verdict_names_its_questions(report_runs: Path, tmp_path: Path) -> None:
    job, table = report_runs / JOB, tmp_path / "half.jsonl"
    outcomes = list(read_outcomes(report_runs / "table.jsonl"))
    half = {each.question_id for each in outcomes[: len(outcomes) // 2]}
    write_outcomes(table, [each for each in outcomes if each.question_id in half])
    (run,) = read_numbers([job], outcomes=table).runs
    rows = [row for row in read_rows(job) if row.id in half]
    first, second = verdict(run).split(". ", 1)
    assert run.accuracy is not None
    assert f"of {run.accuracy.of} questions right (" in first
    right = sum(row.correct is True for row in rows) / len(rows)
    assert second.startswith(f"On the {len(rows)} of them that the outcome table knows: {right:.1%} right (")
    (whole,) = read_numbers([job], outcomes=report_runs / "table.jsonl").runs
    assert "of them that" not in verdict(whole)


def test_the_verdict_says_where_the_router_had_seen_the_questions(report_runs: Path, tmp_path: Path) -> None:
    job = copied(report_runs, tmp_path)
    rows = list(read_rows(job))
    for count in (0, 30, len(rows)):
        marked = [replace(row, seen=n < count) for n, row in enumerate(rows)]
        (job / ROWS).write_text("".join(map(row_line, marked)), encoding="utf-8")
        (run,) = read_numbers([job], outcomes=report_runs / "table.jsonl").runs
        assert run.plane is not None
        assert run.plane.seen is not None
        told = "on these" if run.plane.seen == run.plane.of else f"on {run.plane.seen} of these"
        assert (f"the router was fitted {told}" in verdict(run)) == (count > 0)


def test_the_hull_leaves_out_what_a_mixture_beats() -> None:
    accuracy = np.array([0.2, 0.5, 0.55, 0.9, 0.6])
    cost = np.array([1.0, 2.0, 4.0, 6.0, 8.0])
    assert hull(accuracy, cost) == [0, 1, 3]
    assert cost_at(0.7, accuracy, cost) == pytest.approx(4.0)  # half of pair 1, half of pair 3
    assert cost_at(0.1, accuracy, cost) == 1.0
    assert cost_at(0.91, accuracy, cost) is None


def test_saved_is_against_the_best_pair_where_the_run_is_as_good(tmp_path: Path) -> None:
    asked = questions(60, seed=5)
    table = write_table(tmp_path / "table.jsonl", asked)
    plane = read_numbers([table]).runs[0].plane
    assert plane is not None
    best = plane.best
    rows = []
    for question in asked:  # always the best pair, at a tenth of what it costs
        told = next(each for pair, each in question.outcomes.items() if str(pair) == best.name)
        call = Call(best.name, question.id, 1, {"remote-xl": [1, 1]}, 1.0, "stop")
        rows.append(
            JobRow(
                question.id,
                question.text,
                "answered",
                answer=told.answer,
                gold=question.gold,
                correct=told.correct,
                route=best.name,
                calls=(call,),
                cost_nanousd=(told.cost_nanousd or 0) // 10,
            )
        )
    run = read_numbers([_job(tmp_path, rows)], outcomes=table).runs[0]
    assert run.plane is not None
    assert run.plane.saved is not None
    assert run.plane.more_right is not None
    assert run.plane.saved.reference == "best single pair"
    assert run.plane.saved.name == best.name
    assert run.plane.saved.share.value == pytest.approx(0.9, abs=0.001)
    assert run.plane.more_right.value == run.plane.more_right.low == run.plane.more_right.high == 0
    assert f"90% less (90% to 90%) than always asking {best.name}" in verdict(run)


def _job(where: Path, done: list[JobRow], **changes: Any) -> Path:
    folder = where / "made.jsonl.job"
    folder.mkdir()
    (folder / ROWS).write_text("".join(map(row_line, done)), encoding="utf-8")
    facts: dict[str, Any] = {
        "rows": len(done),
        "ending": "completed",
        "ledger": str(where / "none.db"),
    } | changes
    Job(input="in", results="out", budget="night", limit_nanousd=None, policy="best", **facts).save(folder)
    return folder


def test_saved_is_against_a_mixture_where_the_run_is_less_accurate(told: RunNumbers) -> None:
    plane = told.plane
    assert plane is not None
    assert plane.saved is not None
    assert plane.run is not None
    assert plane.run.accuracy < plane.best.accuracy
    assert plane.saved.reference == "mixture"
    accuracy = np.array([each.accuracy for each in plane.singles])
    cost = np.array([each.cost for each in plane.singles])
    reference = cost_at(plane.run.accuracy, accuracy, cost)
    assert reference is not None
    assert plane.saved.share.value == pytest.approx(1 - plane.run.cost / reference)
    assert plane.saved.share.low < plane.saved.share.value < plane.saved.share.high


def test_a_table_of_other_questions_pairs_nothing(report_runs: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "other.jsonl", questions(40, seed=99))
    run = read_numbers([report_runs / JOB], outcomes=table).runs[0]
    assert run.plane is not None
    assert not run.plane.same_questions
    assert run.plane.saved is None
    assert run.all is not None
    assert run.all.regret is None
    assert "is about other questions" in verdict(run)


def test_rows_are_found_by_their_text_where_ids_differ(
    report_runs: Path, tmp_path: Path, told: RunNumbers
) -> None:
    renamed = [
        replace(each, question_id=f"other-{each.question_id}")
        for each in read_outcomes(report_runs / "table.jsonl")
    ]
    write_outcomes(tmp_path / "renamed.jsonl", renamed)
    run = read_numbers([report_runs / JOB], outcomes=tmp_path / "renamed.jsonl").runs[0]
    assert run.plane is not None
    assert told.plane is not None
    assert run.plane.best == told.plane.best
    # Without texts only ids are left, which here are those of no row.
    write_outcomes(tmp_path / "bare.jsonl", [replace(each, question="") for each in renamed])
    bare = read_numbers([report_runs / JOB], outcomes=tmp_path / "bare.jsonl").runs[0]
    assert bare.plane is not None
    assert not bare.plane.same_questions


def test_an_outcome_table_is_a_run_of_its_best_pair(report_runs: Path) -> None:
    run = read_numbers([report_runs / "table.jsonl"]).runs[0]
    assert run.run.single == "remote-xl+cot"
    assert run.plane is not None
    assert run.accuracy is not None
    assert run.accuracy.value == run.plane.best.accuracy
    assert run.spent_source == "outcome table"
    assert verdict(run).startswith("Of 6 pairs on 120 questions the best is remote-xl+cot")
    assert run.missing["ledger"] == "an outcome table has no ledger"


# Intervals


def test_intervals_of_means_are_those_of_the_central_limit() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    told = mean(values)
    assert told is not None
    half = 1.96 * values.std() / 20
    assert told.low == pytest.approx(values.mean() - half, abs=0.02)
    assert told.high == pytest.approx(values.mean() + half, abs=0.02)
    assert mean(values) == told  # seeded
    assert mean(np.array([])) is None
    assert share(0, 0) is None


def test_the_interval_of_a_share_is_wilsons() -> None:
    from scipy import stats

    for right, of in ((0, 7), (7, 7), (1, 30), (123, 200), (4_000, 50_000)):
        theirs = stats.binomtest(right, of).proportion_ci(method="wilson")
        assert accuracy_interval(right, of) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    for right, of in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(InputError, match="not a share"):
            accuracy_interval(right, of)


def test_many_questions_are_drawn_in_groups_with_the_same_interval() -> None:
    values = np.random.default_rng(4).exponential(1.0, 25_000)
    told = mean(values)
    assert told is not None
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert told.value == values.mean()
    assert told.high - told.low == pytest.approx(2 * half, rel=0.06)
    table = np.stack([values, 2 * values], 1)
    assert grouped(table).shape == (GROUPS, 2)
    assert grouped(table).mean(0) == pytest.approx(table.mean(0), rel=0.01)
    told = mean(np.ones(1_500_000))
    assert told is not None
    assert told.value == pytest.approx(told.low) == pytest.approx(told.high) == pytest.approx(1.0)


# Comparison


def test_runs_are_paired_over_the_questions_they_share(report_runs: Path) -> None:
    names = (JOB, "thrifty.jsonl.job")
    numbers = read_numbers([report_runs / name for name in names])
    one, two = ({row.id: row for row in read_rows(report_runs / name)} for name in names)
    shared = sorted(set(one) & set(two))
    against = numbers.comparisons[0]
    assert (against.base, against.run, against.of, against.graded) == (
        "results",
        "thrifty",
        len(shared),
        len(shared),
    )
    assert len(shared) == 100 < len(one)
    assert against.won == sum(bool(two[n].correct) and not one[n].correct for n in shared)
    assert against.lost == sum(bool(one[n].correct) and not two[n].correct for n in shared)
    assert against.accuracy is not None
    assert against.cost is not None
    assert against.accuracy.value == pytest.approx((against.won - against.lost) / len(shared))
    assert against.cost.value == pytest.approx(
        sum(two[n].cost_nanousd - one[n].cost_nanousd for n in shared) / len(shared)
    )
    assert (
        numbers.to_json()["comparison"]
        == read_numbers([report_runs / name for name in names]).to_json()["comparison"]
    )


def test_ids_that_stand_for_other_questions_are_not_paired(tmp_path: Path, report_runs: Path) -> None:
    folder = copied(report_runs, tmp_path)
    rows = list(read_rows(folder))
    changed = [
        replace(row, question=f"Another one: {row.question}") if n < 15 else row for n, row in enumerate(rows)
    ]
    (folder / ROWS).write_text("".join(map(row_line, changed)), encoding="utf-8")
    against = read_numbers([report_runs / JOB, folder]).comparisons[0]
    assert (against.of, against.unlike) == (len(rows) - 15, 15)


def test_two_runs_without_a_shared_question_say_so(tmp_path: Path, report_runs: Path) -> None:
    rows = [JobRow("x1", "Something else?", "answered", answer="1", gold="1", correct=True)]
    numbers = read_numbers([report_runs / JOB, _job(tmp_path, rows)])
    assert numbers.comparisons[0].of == 0
    assert numbers.comparisons[0].why == "they share no question"
    made = build([report_runs / JOB, tmp_path / "made.jsonl.job"], tmp_path / "r.md")
    assert "made and results are not compared: they share no question." in made.path.read_text()


# Bad input


def test_a_job_that_still_runs_is_reported_on_and_says_so(report_runs: Path) -> None:
    run = read_numbers([report_runs / "running.jsonl.job"]).runs[0]
    assert notices(run)[0].startswith("This job has not ended: 40 of 60 rows are done")
    assert run.tally.missing == 20
    assert run.accuracy is not None
    assert run.accuracy.of == 40


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "cut', "line 3"),
        ("\N{REPLACEMENT CHARACTER}{}", "line 3"),
        ('{"id": "1"}', "line 3"),
        ("[1, 2]", "line 3"),
        ('{"id": "1", "question": "?", "state": "answered", "cost_nanousd": "much"}', "row '1'"),
        ('{"id": "1", "question": "?", "state": "answered", "cost_nanousd": 1e30}', "row '1'"),
        ('{"id": [], "question": "?", "state": "answered", "route": "new"}', "row []"),
        ('{"id": "1", "question": "?", "state": "lost"}', "line 3"),
    ],
)
def test_a_damaged_line_is_left_out_and_named(
    tmp_path: Path, report_runs: Path, line: str, said: str
) -> None:
    folder = copied(report_runs, tmp_path)
    lines = (folder / ROWS).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / ROWS).write_text("".join([*lines[:2], line + "\n", *lines[3:]]), encoding="utf-8")
    run = read_numbers([folder]).runs[0]
    assert len(run.run.rows) == len(lines) - 1
    assert any("could not be read" in each and said in each for each in notices(run))


def test_bytes_that_are_no_text_are_a_damaged_line(tmp_path: Path, report_runs: Path) -> None:
    folder = copied(report_runs, tmp_path)
    with (folder / ROWS).open("ab") as file:
        file.write(b'{"id": "\xff\xfe"}\n')
    assert "could not be read" in notices(read_numbers([folder]).runs[0])[0]


@pytest.mark.parametrize("content", ["", None])
def test_no_finished_row_is_a_report_that_says_so(tmp_path: Path, content: str | None) -> None:
    folder = _job(tmp_path, [], rows=5, ending="running")
    if content is None:
        (folder / ROWS).unlink()
    for kind in ("md", "json"):
        made = build(folder, tmp_path / f"r.{kind}", format=kind)  # type: ignore[arg-type]
    assert "no row is finished yet" in (tmp_path / "r.md").read_text()
    assert made.numbers.runs[0].accuracy is None
    with pytest.raises(InputError, match="no plane to draw"):
        build(folder, tmp_path / "r.png")


def test_a_ledger_that_is_gone_is_said_and_its_numbers_are_missing(tmp_path: Path, report_runs: Path) -> None:
    folder = copied(report_runs, tmp_path)
    (tmp_path / "results.db").unlink()
    run = read_numbers([folder]).runs[0]
    assert run.history is None
    assert run.spent_source == "rows"
    assert any("is gone" in each and "--ledger" in each for each in notices(run))
    budget = next(each for each in parts(read_numbers([folder]))[0].sections if each.name == "budget")
    assert "is gone" in budget.empty
    assert not (tmp_path / "results.db").exists()
    again = read_numbers([folder], ledger=str(report_runs / "results.db")).runs[0]
    assert again.history is not None
    assert again.spent_source == "ledger"


def test_a_ledger_that_moved_with_its_job_is_found(tmp_path: Path, report_runs: Path) -> None:
    (tmp_path / "a").mkdir()
    copied(report_runs, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert read_numbers([tmp_path / "b" / JOB]).runs[0].history is not None


@pytest.mark.parametrize("how", ["no ledger", "another"])
def test_a_ledger_that_cannot_be_read_is_said(tmp_path: Path, report_runs: Path, how: str) -> None:
    folder, where = copied(report_runs, tmp_path), tmp_path / "results.db"
    where.unlink()
    if how == "no ledger":
        where.write_text("not a database, but long enough to look like a file of some kind\n" * 20)
    else:
        with Ledger(where) as ledger:
            ledger.create("day", limit_nanousd=5)
    said = " ".join(notices(read_numbers([folder]).runs[0]))
    assert ("cannot be read" if how == "no ledger" else "another job's ledger") in said


def test_a_ledger_in_postgres_is_read_alike(tmp_path: Path, postgres: str) -> None:
    folders = [
        make_job(tmp_path / kind, questions(12), address=where)
        for kind, where in (("a", ""), ("b", postgres))
    ]
    one, two = (read_numbers([folder]).runs[0].history for folder in folders)
    assert one is not None
    assert two is not None
    assert replace(two, where=one.where) == one
    gone = replace(Job.load(folders[1]), ledger="postgresql://nobody@127.0.0.1:1/none")
    gone.save(folders[1])
    assert any("cannot be read" in each for each in notices(read_numbers([folders[1]]).runs[0]))


def test_an_altered_ledger_is_told(tmp_path: Path, report_runs: Path) -> None:
    import sqlite3

    folder = copied(report_runs, tmp_path)
    with sqlite3.connect(tmp_path / "results.db") as file:
        names = [name for (name,) in file.execute("select name from sqlite_master where type = 'trigger'")]
        for name in names:
            file.execute(f"drop trigger {name}")
        file.execute(
            "update entries set nanousd = nanousd + 1 where kind = 'post'"
            " and id = (select min(id) from entries where kind = 'post')"
        )
    file.close()
    assert any("does not agree with itself" in each for each in notices(read_numbers([folder]).runs[0]))


def test_rows_that_say_another_cost_than_the_ledger_are_counted(tmp_path: Path, report_runs: Path) -> None:
    folder = copied(report_runs, tmp_path)
    rows = list(read_rows(folder))
    place = next(n for n, row in enumerate(rows) if row.calls)
    dear = replace(rows[place].calls[0], cost_nanousd=rows[place].calls[0].cost_nanousd + 7)
    gone = replace(rows[place].calls[0], key="night/never/0")
    rows[place] = replace(rows[place], calls=(dear, gone))
    (folder / ROWS).write_text("".join(map(row_line, rows)), encoding="utf-8")
    run = read_numbers([folder]).runs[0]
    assert run.against_rows is not None
    assert run.history is not None
    assert run.against_rows.differ == 1
    assert run.against_rows.rows - run.against_rows.posted == 7
    assert run.history.missing == 1


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("empty-folder", None, "no job in"),
        ("missing", "", "nothing at"),
        ("notes.txt", "hello\n", "is no run"),
        ("answers.jsonl", '{"id": 1}\n', "missing dataset"),
        ("empty.jsonl", "\n", "it is empty"),
        ("damaged.parquet", "PAR1", "is no run"),
    ],
)
def test_what_is_no_run_is_an_error_that_says_so(
    tmp_path: Path, name: str, content: str | None, match: str
) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif content:
        path.write_text(content)
    with pytest.raises(InputError, match=match):
        read_numbers([path])


def test_a_table_without_costs_is_named(tmp_path: Path, report_runs: Path) -> None:
    bare = [replace(each, cost_nanousd=None) for each in read_outcomes(report_runs / "table.jsonl")]
    write_outcomes(tmp_path / "bare.jsonl", bare)
    with pytest.raises(DataError, match="cost"):
        read_numbers([report_runs / JOB], outcomes=tmp_path / "bare.jsonl")
    with pytest.raises(DataError, match=r"bare\.jsonl"):
        read_numbers([tmp_path / "bare.jsonl"])


def test_results_stand_for_the_folder_beside_them(tmp_path: Path, report_runs: Path) -> None:
    copied(report_runs, tmp_path)
    (tmp_path / "results.jsonl").write_text("{}\n")
    assert read_numbers([tmp_path / "results.jsonl"]).runs[0].run.job is not None


def test_an_output_that_exists_or_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("mine")
    for out, match in (
        (tmp_path / "there.md", "there already"),
        (tmp_path / "no" / "r.md", "no folder"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(InputError, match=match):
            build(tmp_path / "nothing", out)
    for name in ("answers.jsonl", "r.txt", "r.csv"):
        with pytest.raises(InputError, match=r"end .* in \.html, \.md, \.json or \.png, or say"):
            build(tmp_path / "nothing", tmp_path / name, force=True)
    assert (tmp_path / "there.md").read_text() == "mine"
    with pytest.raises(InputError, match="unknown format 'pdf'"):
        build(tmp_path / "nothing", tmp_path / "r.pdf", format="pdf")  # type: ignore[arg-type]


# Formats


def test_json_has_every_number_and_is_strict(report_runs: Path, tmp_path: Path, told: RunNumbers) -> None:
    made = build(report_runs / JOB, tmp_path / "r.json", outcomes=report_runs / "table.jsonl")
    text = made.path.read_text(encoding="utf-8")
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    run = read["runs"][0]
    assert set(run) == {
        "name",
        "path",
        "kind",
        "single",
        "losses",
        "other_budgets",
        "job",
        "warnings",
        "tally",
        "accuracy",
        "accuracy_answered",
        "spent",
        "spent_source",
        "cost",
        "plane",
        "forecast",
        "routes",
        "calibration",
        "tokens",
        "costs",
        "writers",
        "against_rows",
        "provider",
        "missing",
        "in_all",
        "texts",
        "ledger",
        "failures",
    }
    assert run["spent"] == told.spent
    assert isinstance(run["spent"], int)
    assert run["plane"]["saved"]["share"]["value"] == told.plane.saved.share.value  # type: ignore[union-attr]
    assert "posted_for" not in run["ledger"]


def test_markdown_escapes_what_comes_from_rows(tmp_path: Path) -> None:
    rows = [
        JobRow("1", "?", "answered", answer="1", gold="1", correct=True, route="a|b\n<script>x</script>"),
        JobRow("2", "?", "failed", reason="*no* <img src=x> | `code`"),
    ]
    text = build(_job(tmp_path, rows), tmp_path / "r.md").path.read_text(encoding="utf-8")
    assert r"a\|b &lt;script&gt;x&lt;/script&gt;" in text
    assert "<script" not in text
    assert "<img" not in text
    assert r"\*no\* &lt;img src=x&gt; \| \`code\`" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace(r"\|", "").count("|") in (4, 5, 7, 8, 9) for line in table)


def test_the_command_writes_and_tells(report_runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.md"
    args = ["report", str(report_runs / "running.jsonl.job"), "-o", str(out)]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert f"report in {out}" in done.stdout
    assert "has not ended" in done.stderr
    again = CliRunner().invoke(app, args)
    assert isinstance(again.exception, ViaticumError)
    assert "--force" in str(again.exception)
    told = CliRunner().invoke(app, [*args, "--force", "--json"])
    assert json.loads(told.stdout)["runs"][0]["name"] == "running"
    assert json.loads(told.stdout)["format"] == "md"


def test_without_a_name_the_file_ends_as_its_format(
    report_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", str(report_runs / "running.jsonl.job"), "--format", "md"])
    assert done.exit_code == 0, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_a_run_without_gold_says_that_accuracy_is_unknown(tmp_path: Path) -> None:
    run = read_numbers([_job(tmp_path, [JobRow("1", "?", "answered", answer="4")])]).runs[0]
    assert "how many are right is not known" in verdict(run)


def test_savings_read_as_people_say_them() -> None:
    assert [less_or_more(each) for each in (0.5, 0.0, -0.13, -1.0, -17.2)] == [
        "50% less",
        "0% less",
        "13% more",
        "2.0 times as much",
        "18.2 times as much",
    ]


def test_names_stand_free_of_points_and_of_each_other() -> None:
    points = [("a name", 50.0, 50.0), ("another", 52.0, 55.0), ("a third", 50.0, 60.0)]
    taken = [Box.around(x, y, 12, 12) for _, x, y in points]
    places = [place for place in place_labels(points, taken, 300, 200, 6) if place is not None]
    boxes = [Box(each.x, each.y - 7, each.x + 6 * len(each.text), each.y + 7) for each in places]
    assert len(boxes) == 3
    assert not any(box.meets(other) for box in boxes for other in taken)
    assert not any(one.meets(two) for n, one in enumerate(boxes) for two in boxes[n + 1 :])
    assert place_labels([("far too long for this", 10, 10)], [], 60, 20, 6) == [None]
    crowd = [(f"pair number {n}", 100.0, 100.0) for n in range(14)]
    around = [each for each in place_labels(crowd, [Box.around(100, 100, 12, 12)], 300, 240, 6) if each]
    assert len(around) == len(crowd)
    assert sum(each.leader is not None for each in around) >= 5
