"""The overview of a report: notes, the chart of cost and accuracy, the comparison."""

from __future__ import annotations

from collections.abc import Sequence

from viaticum.reports.comparison import RunComparison
from viaticum.reports.cost_accuracy_chart import cost_accuracy_chart
from viaticum.reports.formatting import (
    NONE,
    count,
    per_1000,
    percent,
    points,
    sentence,
    share_text,
    signed,
    signed_usd,
    times,
    usd,
)
from viaticum.reports.frontier import CostAccuracyPlane, Point
from viaticum.reports.numbers import Numbers, RunNumbers
from viaticum.reports.run_sections import sections_of
from viaticum.reports.sections import LEDGER, LEDGER_ROWS, ROWS, TABLE, RunSections, Section, Table

_ENDINGS = {
    "budget_exhausted": "The budget ran out before the questions did",
    "deadline": "The deadline came before the end",
    "drained": "The job was told to end before it was through",
    "waiting": "Rows wait for a provider's batch",
    "cancelled": "The job was cancelled",
}


def notices(numbers: RunNumbers) -> tuple[str, ...]:
    found = []
    job, tally = numbers.run.job, numbers.tally
    if job is not None and job.ending == "running":
        done = f"{tally.asked - tally.missing:,} of {count(tally.asked, 'row')}"
        found.append(
            f"This job has not ended: {done} are done. It still runs, or was killed; "
            "the numbers are those of the rows that are done."
        )
    elif job is not None and tally.missing:
        found.append(
            f"{count(tally.missing, 'row')} of the input {'has' if tally.missing == 1 else 'have'} "
            "no line in the job's rows."
        )
    if job is not None and "ledger" in numbers.missing:
        found.append(f"No numbers of the ledger: {numbers.missing['ledger']}. Costs are what the rows say.")
    if (why := _ENDINGS.get(job.ending if job is not None else "")) and tally.skipped:
        found.append(
            f"{why}: {count(tally.skipped, 'row')} of {tally.asked:,} "
            f"{'was' if tally.skipped == 1 else 'were'} skipped."
        )
    found += [f"{warning[:1].upper()}{warning[1:]}." for warning in numbers.run.warnings]
    if numbers.history is not None and numbers.history.wrong:
        found.append(f"The ledger does not agree with itself: {numbers.history.wrong[0]}.")
    return tuple(found)


def parts(numbers: Numbers) -> list[RunSections]:
    return [
        RunSections(each.run.name, notices(each), tuple(sections_of(each)), facts(each))
        for each in numbers.runs
    ]


def facts(numbers: RunNumbers) -> tuple[tuple[str, str], ...]:
    """Where the numbers are from."""
    run, job = numbers.run, numbers.run.job
    if job is None:
        return (("outcome table", run.path),)
    found = [
        ("job", run.path),
        ("input", job.input),
        ("policy", job.policy),
        ("engine", job.engine),
        ("budget", job.budget),
        ("ledger", numbers.history.where if numbers.history else f"{job.ledger} (not read)"),
        ("began", job.began),
        ("ended", job.ended or "not yet"),
        ("ending", job.ending.replace("_", " ")),
        *((f"fingerprint of {name}", value) for name, value in job.fingerprint.items()),
        ("made by", f"viaticum {job.version}" if job.version else ""),
    ]
    if numbers.plane is not None:
        found.append(("outcome table", numbers.plane.table))
    return tuple((name, value) for name, value in found if value)


def plane_section(numbers: Numbers) -> Section:
    """Of all runs: the plane is one."""
    runs = numbers.runs
    known = next((each.plane for each in runs if each.plane is not None), None)
    chart = cost_accuracy_chart(runs)
    if chart is None:
        reason = runs[0].missing.get("rows") or runs[0].missing.get("accuracy") or "no run has an accuracy"
        return Section("plane", "Cost and accuracy", ROWS, empty=sentence(reason))
    source = (
        f"{LEDGER if runs[0].history else ROWS}; {TABLE}"
        if known
        else (LEDGER_ROWS if runs[0].history else ROWS)
    )
    if known is None:
        lead = (sentence(runs[0].missing.get("plane", "")), *_forecast(runs))
        return Section("plane", "Cost and accuracy", source, lead, (chart,), data=(_runs_table(runs),))
    return Section(
        "plane",
        "Cost and accuracy",
        source,
        _plane_lead(known, runs),
        (chart,),
        data=(_plane_table(known),),
        notes=_plane_notes(known, runs),
    )


def _plane_lead(known: CostAccuracyPlane, runs: Sequence[RunNumbers]) -> tuple[str, ...]:
    lines = []
    if known.more_right is not None and known.less_cost is not None and not runs[0].run.single:
        lines.append(
            f"Against always asking {known.best.name}: {points(known.more_right)} right and "
            f"{_times(known)} its cost, paired over {count(known.of, 'question')}."
        )
    lines.append(
        "The oracle, which always asks the cheapest pair that is right, gets "
        f"{percent(known.oracle.accuracy)} at {per_1000(known.oracle.cost)} per 1,000 questions; "
        f"a random pair {percent(known.random.accuracy)} at {per_1000(known.random.cost)}."
    )
    return (*lines, *_forecast(runs))


def _forecast(runs: Sequence[RunNumbers]) -> tuple[str, ...]:
    forecast = runs[0].forecast
    if len(runs) > 1 or forecast is None:
        return ()
    return (
        f"Before anything was spent, the planner forecast for this budget: {percent(forecast.accuracy)} "
        f"of all rows right, at {usd(forecast.cost_p50)} (p90 {usd(forecast.cost_p90)}).",
    )


def _times(known: CostAccuracyPlane) -> str:
    return (
        f"{known.run.cost / known.best.cost:.2f} times"
        if known.run and known.best.cost
        else "an unknown share of"
    )


def _plane_notes(known: CostAccuracyPlane, runs: Sequence[RunNumbers]) -> tuple[str, ...]:
    notes = []
    if known.same_questions:
        notes.append(
            f"On the {count(known.of, 'question')} of the run that the table knows, of {known.asked:,} "
            "whose right answer is known. Pairs and mixtures are the best in hindsight on these very "
            "questions, which favours them."
        )
    else:
        notes.append(
            "The table is about other questions: its pairs were not asked what this run was asked, "
            "so nothing here is paired and what was saved is left out."
        )
    if len(runs) > 1:
        notes.append(
            f"Pairs and mixtures are those on the questions of {runs[0].run.name}; "
            "every other run stands where it is on its own."
        )
    if known.left_out:
        notes.append(
            "Left out, because the table holds too few of the questions for them: "
            f"{', '.join(known.left_out)}."
        )
    return tuple(notes)


def _plane_table(known: CostAccuracyPlane) -> Table:
    corners = {point.name for point in known.hull}
    rows = [(known.run.name, *_position_cells(known.run), "run")] if known.run else []
    rows += [
        (
            point.name,
            *_position_cells(point),
            "single pair, on the hull" if point.name in corners else "single pair",
        )
        for point in sorted(known.singles, key=lambda point: -point.accuracy)
    ]
    extra = [(known.oracle, "the cheapest pair that is right"), (known.random, "each pair equally often")]
    extra += (
        [(known.shuffled, "the run's pairs in the same shares, dealt at random")] if known.shuffled else []
    )
    rows += [(point.name, *_position_cells(point), what) for point, what in extra]
    columns = (("point", False), ("right (95%)", True), ("per 1,000 questions", True), ("what it is", False))
    return Table("Cost and accuracy of the run, of every single pair, and of mixtures", columns, tuple(rows))


def _position_cells(point: Point) -> tuple[str, str]:
    accuracy = percent(point.accuracy)
    if point.low is not None and point.high is not None:
        accuracy += f" ({point.low:.0%} to {point.high:.0%})"
    return accuracy, per_1000(point.cost)


def _runs_table(runs: Sequence[RunNumbers]) -> Table:
    rows = tuple((each.run.name, share_text(each.accuracy), per_1000(each.cost)) for each in runs)
    return Table(
        "Cost and accuracy", (("run", False), ("right (95%)", True), ("per 1,000 questions", True)), rows
    )


def comparison_section(numbers: Numbers) -> Section:
    """Runs side by side, then the differences on the questions they share."""
    runs, first = numbers.runs, numbers.runs[0].run.name
    tables, notes = [_side_by_side(runs)], _comparison_notes(numbers.comparisons, first)
    paired = tuple(_difference_row(each) for each in numbers.comparisons if each.of)
    if paired:
        columns = (
            ("run", False),
            ("shared", True),
            ("right", True),
            ("won / lost", True),
            ("per 1,000 questions", True),
            ("seconds", True),
        )
        caption = f"Differences to {first}, paired over the questions they share"
        tables.append(Table(caption, columns, paired))
        notes.append(
            "Differences are paired; intervals are 95%, by a bootstrap over questions "
            f"(seed {numbers.seed}). Won: right here alone; lost: right in {first} alone."
        )
    sources = {ROWS if each.spent_source == "rows" else each.spent_source for each in runs}
    sources.add(ROWS if any(each.run.job for each in runs) else TABLE)
    source = "; ".join(sorted(sources))
    return Section("comparison", "Comparison", source, tables=tuple(tables), notes=tuple(notes))


def _side_by_side(runs: Sequence[RunNumbers]) -> Table:
    tallies = [each.tally for each in runs]
    rows = [
        ("right (95%)", *(share_text(each.accuracy) for each in runs)),
        ("right of those answered", *(share_text(each.accuracy_answered) for each in runs)),
        (
            "answered / skipped / failed",
            *(f"{tally.answered:,} / {tally.skipped:,} / {tally.failed:,}" for tally in tallies),
        ),
        ("spent", *(usd(each.spent) for each in runs)),
        ("per 1,000 questions", *(per_1000(each.cost) for each in runs)),
        ("seconds a row, p50 / p95", *(times(each.all) for each in runs)),
        (
            "calibration error",
            *(percent(each.calibration.error) if each.calibration else NONE for each in runs),
        ),
    ]
    columns = (("measure", False), *((each.run.name, True) for each in runs))
    return Table("Runs side by side", columns, tuple(rows))


def _difference_row(each: RunComparison) -> tuple[str, ...]:
    cost = each.cost
    return (
        each.run,
        f"{each.of:,}",
        points(each.accuracy),
        f"{each.won:,} / {each.lost:,}",
        f"{signed_usd(cost.value * 1000)} ({signed_usd(cost.low * 1000)} to {signed_usd(cost.high * 1000)})"
        if cost
        else NONE,
        f"{signed(each.seconds.value)} s" if each.seconds else NONE,
    )


def _comparison_notes(comparisons: Sequence[RunComparison], first: str) -> list[str]:
    notes = []
    for each in comparisons:
        if not each.of:
            notes.append(f"{each.run} and {first} are not compared: {each.why}.")
            continue
        if each.unlike:
            ids = count(each.unlike, "id")
            notes.append(f"{ids} of {each.run} stand for another question in {first}; they are left out.")
        if each.why:
            notes.append(f"{each.run}: {each.why}.")
    return notes
