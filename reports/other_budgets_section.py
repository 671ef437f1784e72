"""The section on other budgets: what more or less money would have bought, as a table and a chart."""

from __future__ import annotations

from functools import partial
from typing import Any

from viaticum.reports.chart_rendering import Chart, data_of, library, log_ticks, styled, var
from viaticum.reports.formatting import NONE, count, percent, share_text, usd
from viaticum.reports.intervals import Share
from viaticum.reports.numbers import RunNumbers
from viaticum.reports.other_budgets import OtherBudget, OtherBudgets
from viaticum.reports.sections import ROWS, TABLE, Section, Table

TITLE = "What another budget would have bought"
MIXTURE, ORACLE, FORECAST, CUT_OFF = "best mixture", "oracle", "forecast", "this run, cut off there"


def other_budgets_section(numbers: RunNumbers) -> Section | None:
    """None for an outcome table."""
    found = numbers.other_budgets
    if numbers.run.job is None:
        return None
    if found is None:
        why = numbers.missing.get("rows") or numbers.missing.get("plane") or "nothing was spent"
        return Section("budgets", TITLE, ROWS, empty=f"{why[:1].upper()}{why[1:]}.")
    lead, notes = _lead(numbers, found), []
    if found.of:
        notes.append(
            f"From the outcomes of {count(found.of, 'question')} of this run. The mixture asks a single pair "
            "that is drawn at random for each question, or none where the money does not suffice; the best "
            "one is known in hindsight alone, which favours it. The oracle buys the cheapest right answers "
            "first."
        )
    if any(each.cut_off is not None for each in found.at):
        notes.append("Cut off there: right by the time so much was spent, in the order the rows ended.")
    columns = [("budget", False), *((name, True) for name in _columns(found))]
    rows = tuple(tuple(_cells(each, found, numbers)) for each in found.at)
    chart = _chart(numbers, found)
    return Section(
        "budgets",
        TITLE,
        f"{ROWS}; {TABLE}" if found.of else ROWS,
        tuple(lead),
        (chart,) if chart else (),
        (Table("Right answers by the budget of the whole job", tuple(columns), rows),),
        notes=tuple(notes),
    )


def _columns(found: OtherBudgets) -> list[str]:
    names = [f"{MIXTURE} (95%)", ORACLE] if found.of else []
    names += [FORECAST] if any(each.forecast is not None for each in found.at) else []
    return names + ([CUT_OFF] if any(each.cut_off is not None for each in found.at) else [])


def _cells(each: OtherBudget, found: OtherBudgets, numbers: RunNumbers) -> list[str]:
    limit = numbers.run.job.limit_nanousd if numbers.run.job else None
    marks = {numbers.spent: " (what it spent)", limit: " (its limit)"}
    cells = [f"{usd(each.nanousd)}{marks.get(each.nanousd, '')}"]
    if found.of and each.mixture is not None:
        one = each.mixture
        cells += [share_text(Share(0, one.of, one.value, one.low, one.high)), percent(each.oracle)]
    names = _columns(found)
    cells += [percent(each.forecast)] if FORECAST in names else []
    return cells + ([percent(each.cut_off)] if CUT_OFF in names else [])


def _lead(numbers: RunNumbers, found: OtherBudgets) -> list[str]:
    here = _own(numbers)
    known = [each for each in found.at if each.mixture is not None]
    if here is None or len(known) < 2:
        right = percent(numbers.accuracy.value) if numbers.accuracy else NONE
        return [f"This run got {right} right for {usd(numbers.spent)}."]
    own = f"On these questions this run got {percent(here[1])} right, at {usd(here[0])} for the whole job."
    less, more = known[0], known[-1]
    assert less.mixture is not None
    assert more.mixture is not None
    return [
        f"{own} The best mixture of single pairs would have got {percent(less.mixture.value)} for "
        f"{usd(less.nanousd)} and {percent(more.mixture.value)} for {usd(more.nanousd)}."
    ]


def _own(numbers: RunNumbers) -> tuple[float, float] | None:
    """What the run cost and got right on the questions that the table knows; nano-dollars of a whole job."""
    plane, job = numbers.plane, numbers.run.job
    if plane is None or plane.run is None or job is None or not plane.same_questions:
        return None
    return plane.run.cost * max(job.rows, len(numbers.run.rows)), plane.run.accuracy


def _chart(numbers: RunNumbers, found: OtherBudgets) -> Chart | None:
    if not found.curve:
        return None
    words = "; ".join(
        f"{usd(each.nanousd)}: {MIXTURE} {percent(each.mixture.value)}, {ORACLE} {percent(each.oracle)}"
        for each in found.at
        if each.mixture is not None
    )
    return Chart(
        "budgets",
        TITLE,
        f"Share of right answers by the budget of the whole job. {words}.",
        partial(_draw, numbers, found),
        "The square is this run, at what it spent, the diamonds are the planner's forecast from before. More "
        "money is to the right, on a logarithmic scale.",
    )


def _draw(numbers: RunNumbers, found: OtherBudgets, width: int) -> Any:
    alt = library("altair")
    kinds = [MIXTURE, ORACLE]
    rows = [
        {"x": each.nanousd / 1e9, "y": value, "kind": kind}
        for each in found.curve
        for kind, value in ((MIXTURE, each.mixture), (ORACLE, each.oracle))
    ]
    points = [
        {"x": each.nanousd / 1e9, "y": each.forecast, "color": var("mix"), "shape": "diamond"}
        for each in found.at
        if each.forecast is not None
    ]
    here = _own(numbers)
    if here is not None and here[0] > 0:
        points.append({"x": here[0] / 1e9, "y": here[1], "color": var("run-1"), "shape": "square"})
    amounts = [float(row["x"]) for row in (*rows, *points)]  # type: ignore[arg-type]
    low, high = min(amounts) / 1.1, max(amounts) * 1.1
    x = alt.X(
        "x:Q",
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
        axis=alt.Axis(
            title="budget of the whole job",
            format="$,.3~r",
            values=log_ticks(low, high),
            labelOverlap="greedy",
            labelSeparation=8,
            grid=False,
        ),
    )
    y = alt.Y(
        "y:Q",
        scale=alt.Scale(domain=[0, 1], nice=False),
        axis=alt.Axis(title="right", format="%", tickCount=5),
    )
    legend = alt.Legend(title=None, orient="bottom", symbolOpacity=1, columns=2, symbolType="stroke")
    colors, dashes = [var("hull"), var("oracle")], [[1, 0], [6, 3]]
    lines = (
        alt.Chart(data_of(rows))
        .mark_line(strokeWidth=2)
        .encode(
            x=x,
            y=y,
            color=alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=colors), legend=legend),
            strokeDash=alt.StrokeDash("kind:N", scale=alt.Scale(domain=kinds, range=dashes), legend=legend),
        )
    )
    marks = (
        alt.Chart(data_of(points))
        .mark_point(filled=True, size=90, opacity=1, stroke=var("paper"), strokeWidth=1)
        .encode(x=x, y=y, color=alt.Color("color:N", scale=None), shape=alt.Shape("shape:N", scale=None))
    )
    return styled(alt, alt.layer(lines, marks), width, 280)
