"""Charts by week: spending as stacked bars, and shares and costs as points with their intervals.

Weeks are those of ISO 8601; a week without a value keeps its width. Leaves out counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from viaticum.reports.chart_rendering import LETTER, SERIES, Chart, data_of, library, money_ticks, styled, var
from viaticum.reports.formatting import usd

COLORS = (*SERIES, "held", "single")  # of stacked bars, the largest first; the last is that of all others
OTHERS = "others"
HEIGHT = 240
LABEL = 3  # letters of a week on the axis: W47


@dataclass(frozen=True, slots=True)
class WeekValue:
    """A value of a week, with an interval where one is known."""

    week: str
    value: float
    low: float | None = None
    high: float | None = None


def spending_chart(name: str, title: str, weeks: Sequence[str], spent: dict[tuple[str, str], int]) -> Chart:
    """Stacked bars of dollars by week.

    Args:
        weeks: all of them, in order.
        spent: nano-dollars by week and series.
    """
    sums: dict[str, int] = {}
    for (_, series), amount in spent.items():
        sums[series] = sums.get(series, 0) + amount
    order = sorted(sums, key=lambda each: (-sums[each], each))
    shown = order if len(order) <= len(COLORS) else [*order[: len(COLORS) - 1], OTHERS]
    rows: dict[tuple[str, str], float] = {}
    for (week, series), amount in spent.items():
        key = week, series if series in shown else OTHERS
        rows[key] = rows.get(key, 0.0) + amount / 1e9
    total = {week: sum(amount for (at, _), amount in spent.items() if at == week) for week in weeks}
    highest = max(weeks, key=lambda week: total[week])
    words = (
        f"Dollars spent in each of {len(weeks)} weeks, {weeks[0]} to {weeks[-1]}; the most, "
        f"{usd(total[highest])}, in {highest}."
    )
    heading = title if len(shown) == 1 else ""
    return Chart(name, title, words, partial(_bars, tuple(weeks), rows, tuple(shown)), heading=heading)


def points_chart(
    name: str, title: str, words: str, weeks: Sequence[str], values: Sequence[WeekValue], *, is_money: bool
) -> Chart:
    """A point for each week that has a value, with its interval.

    Args:
        is_money: the values are dollars; else shares.
    """
    caption = "The bars are 95% intervals." if any(each.low is not None for each in values) else ""
    return Chart(name, title, words, partial(_points, tuple(weeks), tuple(values), is_money), caption, title)


def shown_labels(weeks: Sequence[str], width: float) -> list[str]:
    """Every week, or every second, third ... from the last one backwards, so that no two labels meet."""
    most = max(1, int(width / (LABEL * LETTER + 14)))
    step = -(-len(weeks) // most)
    return list(weeks[::-1][::step][::-1])


def _x(alt: Any, weeks: Sequence[str], width: int) -> Any:
    axis = alt.Axis(
        title=f"week, {weeks[0]} to {weeks[-1]}" if len(weeks) > 1 else "week",
        values=shown_labels(weeks, width - 70),
        labelExpr="slice(datum.value, 5)",
        labelAngle=0,
        labelOverlap=False,
        grid=False,
    )
    return alt.X("week:O", scale=alt.Scale(domain=list(weeks), paddingInner=0.2), axis=axis)


def _bars(weeks: Sequence[str], spent: dict[tuple[str, str], float], shown: Sequence[str], width: int) -> Any:
    alt = library("altair")
    rows = [
        {"week": week, "series": series, "usd": amount, "order": shown.index(series)}
        for (week, series), amount in spent.items()
    ]
    sums = [sum(amount for (at, _), amount in spent.items() if at == week) for week in weeks]
    highest = max(sums) or 1.0
    ticks, form = money_ticks(0.0, highest)
    colors = [var(color) for color in COLORS[: len(shown)]]
    if OTHERS in shown:
        colors[-1] = var(COLORS[-1])
    legend = (
        None
        if len(shown) == 1
        else alt.Legend(
            title=None,
            orient="bottom",
            columns=1 if width < 500 else 3,
            symbolOpacity=1,
            labelLimit=width - 60 if width < 500 else width // 3 - 30,
        )
    )
    chart = (
        alt.Chart(data_of(rows))
        .mark_bar(stroke=var("paper"), strokeWidth=1)
        .encode(
            x=_x(alt, weeks, width),
            y=alt.Y(
                "usd:Q",
                stack="zero",
                scale=alt.Scale(domain=[0, highest], nice=False),
                axis=alt.Axis(title=None, format=form, values=ticks),
            ),
            color=alt.Color("series:N", scale=alt.Scale(domain=list(shown), range=colors), legend=legend),
            order="order:Q",
        )
    )
    rows_of_legend = -(-len(shown) // (1 if width < 500 else 3))
    return styled(alt, chart, width, HEIGHT + 18 * rows_of_legend)


def _points(weeks: Sequence[str], values: Sequence[WeekValue], is_money: bool, width: int) -> Any:
    alt = library("altair")
    rows = [{"week": each.week, "value": each.value} for each in values]
    bars = [
        {"week": each.week, "low": each.low, "high": each.high}
        for each in values
        if each.low is not None and each.high is not None
    ]
    if is_money:
        highest = max(each.value for each in values) or 1.0
        ticks, form = money_ticks(0.0, highest)
        scale = alt.Scale(domain=[0, highest * 1.05], nice=False)
        axis = alt.Axis(title=None, format=form, values=ticks)
    else:
        scale = alt.Scale(domain=[0, 1], nice=False)
        axis = alt.Axis(title=None, format="%", tickCount=4)
    x = _x(alt, weeks, width)
    dots = (
        alt.Chart(data_of(rows))
        .mark_point(filled=True, size=80, color=var("run-1"), opacity=1)
        .encode(x=x, y=alt.Y("value:Q", scale=scale, axis=axis))
    )
    rules = (
        alt.Chart(data_of(bars))
        .mark_rule(color=var("run-1"), strokeWidth=1.5, opacity=0.55)
        .encode(x=x, y=alt.Y("low:Q", scale=scale, axis=axis), y2="high:Q")
    )
    return styled(alt, alt.layer(rules, dots) if bars else dots, width, HEIGHT - 40)
