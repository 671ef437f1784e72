"""The chart of cost and accuracy: runs, single pairs, their hull, a random pair, the oracle, the forecast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from viaticum.convex_hull import hull
from viaticum.reports.chart_rendering import (
    LETTER,
    SERIES,
    Chart,
    data_of,
    library,
    log_ticks,
    money_ticks,
    styled,
    var,
)
from viaticum.reports.frontier import CostAccuracyPlane, Point
from viaticum.reports.label_placement import Box, along, place_labels
from viaticum.reports.numbers import RunNumbers

STEP = 3.0  # pixels between two computed points of a curve
_HULL = "The grey curve is what the best mixtures of single pairs get, dealt at random"


@dataclass(frozen=True)
class _Kind:
    """Points of one colour and shape; an entry of the legend."""

    name: str
    color: str
    shape: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Baselines:
    """What a run or a router stands among: single pairs, corners of their best mixtures, other points."""

    singles: Sequence[Point]
    hull: Sequence[Point]
    random: Point | None = None
    shuffled: Point | None = None
    oracle: Point | None = None

    @classmethod
    def of(cls, plane: CostAccuracyPlane) -> Baselines:
        return cls(plane.singles, plane.hull, plane.random, plane.shuffled, plane.oracle)


@dataclass(frozen=True)
class _Line:
    """A curve through points, and where its name stands."""

    name: str
    points: Sequence[Point]
    anchor: Point


def cost_accuracy_chart(runs: Sequence[RunNumbers]) -> Chart | None:
    """Runs and their baselines in the cost-accuracy plane; None where no run has an accuracy."""
    known = next((each.plane for each in runs if each.plane is not None), None)
    points = _runs_in(runs)
    if not points:
        return None
    named = [f"{point.name} {point.accuracy:.0%}" for point in points]
    description = f"Accuracy against cost per 1,000 questions. {', '.join(named)}."
    if known is not None:
        description += (
            f" The best single pair, {known.best.name}, gets {known.best.accuracy:.0%};"
            f" the oracle {known.oracle.accuracy:.0%}."
        )
    forecasts = _previews(runs[0]) if len(runs) == 1 else []
    caption = [
        *([f"{_HULL}; a run above it is worth its router."] if known else []),
        *(["The dashed line is the planner's forecast."] if len(forecasts) > 1 else []),
        "Bars are 95% intervals; dearer is to the right" + (", on a logarithmic scale." if known else "."),
    ]
    return Chart(
        "plane",
        "Cost and accuracy",
        description,
        partial(_plane, points, None if known is None else Baselines.of(known), "forecast", forecasts),
        " ".join(caption),
    )


def router_chart(router: Point | None, curve: Sequence[Point], singles: Sequence[Point]) -> Chart:
    """A router that was evaluated among single pairs.

    Args:
        router: as it is used; None where there is none.
        curve: the same router with money worth more or less, by cost.
        singles: each pair alone, at least one.
    """
    accuracy, cost = (np.array([getattr(each, name) for each in singles]) for name in ("accuracy", "cost"))
    known = Baselines(singles, [singles[n] for n in hull(accuracy, cost)])
    named = ", ".join(
        f"{each.name} {each.accuracy:.0%}" for each in (*([router] if router else []), *singles)
    )
    caption = _HULL
    if len(curve) > 1:
        caption += "; the dashed one is the router where money is worth more or less"
    return Chart(
        "router",
        "Cost and accuracy",
        f"Accuracy against cost per 1,000 questions. {named}.",
        partial(_plane, [router] if router else [], known, "this router", curve),
        f"{caption}. Bars are 95% intervals.",
    )


def _runs_in(runs: Sequence[RunNumbers]) -> list[Point]:
    """Points of the runs; an outcome table of several pairs shows its single pairs instead."""
    found = []
    for each in runs:
        if each.run.single and len(runs) == 1:
            continue
        if each.plane is not None and each.plane.run is not None:
            found.append(each.plane.run)
        elif each.accuracy is not None and each.cost is not None:
            found.append(
                Point(each.run.name, each.cost, each.accuracy.value, each.accuracy.low, each.accuracy.high)
            )
    if not found and (known := next((each.plane for each in runs if each.plane is not None), None)):
        found.append(known.best)
    return found


def _previews(each: RunNumbers) -> list[Point]:
    job = each.run.job
    if job is None or not job.rows:
        return []
    return [
        Point("forecast", one.cost_p50 / job.rows, one.accuracy) for one in job.previews if one.cost_p50 > 0
    ]


def _plane(
    runs: Sequence[Point], known: Baselines | None, dashed: str, forecasts: Sequence[Point], width: int
) -> Any:
    """The whole chart: lines at the bottom, then intervals, points and names."""
    alt = library("altair")
    height = min(420, int(width * 0.62) if width > 500 else int(width * 1.05))
    kinds = _kinds(runs, known)
    everything = [point for kind in kinds for point in kind.points] + list(forecasts)
    axes = _Axes.around(everything, width, height)
    layers, lines = [], list[_Line]()
    if known is not None and len(known.hull) > 1:
        curve = mixtures(known.hull, axes)
        lines.append(_Line("best mixtures", curve, _middle(known.hull, curve)))
        layers.append(_line(alt, lines[-1], "hull", axes, [1, 0]))
    if len(forecasts) > 1:
        curve = mixtures(sorted(forecasts, key=lambda point: point.cost), axes)
        lines.append(_Line(dashed, curve, curve[-1]))
        layers.append(_line(alt, lines[-1], "run-1", axes, [4, 4]))
    intervals = [
        {"x": _per_1000(point.cost), "low": point.low, "high": point.high, "color": var(kind.color)}
        for kind in kinds
        for point in kind.points
        if point.low is not None and point.high is not None
    ]
    layers.append(
        alt.Chart(data_of(intervals))
        .mark_rule(strokeWidth=1.5, strokeOpacity=0.55)
        .encode(x=axes.x(alt), y=axes.y(alt, "low:Q"), y2="high:Q", color=alt.Color("color:N", scale=None))
    )
    layers.append(_dots(alt, kinds, axes, width))
    layers.append(_names(alt, kinds, known, axes, everything, intervals, lines))
    return styled(alt, alt.layer(*layers), width, height)


def _kinds(runs: Sequence[Point], known: Baselines | None) -> list[_Kind]:
    """Everything that is drawn as points, in the order of the legend."""
    kinds = []
    if known is not None:
        names = {point.name for point in runs}
        singles = [point for point in known.singles if point.name not in names]
        kinds.append(_Kind("single pair", "single", "circle", singles))
        if known.random is not None:
            kinds.append(_Kind("random pair", "mix", "diamond", [known.random]))
        if known.shuffled is not None:
            kinds.append(_Kind("random, same shares", "mix", "cross", [known.shuffled]))
        if known.oracle is not None:
            kinds.append(_Kind("oracle", "oracle", "triangle-up", [known.oracle]))
    return kinds + [
        _Kind(each.name, SERIES[n % len(SERIES)], "square", [each]) for n, each in enumerate(runs)
    ]


def _dots(alt: Any, kinds: Sequence[_Kind], axes: _Axes, width: int) -> Any:
    """The points, with a legend that tells their kinds by colour and shape."""
    dots = [
        {"x": _per_1000(point.cost), "y": point.accuracy, "kind": kind.name}
        for kind in kinds
        for point in kind.points
    ]
    legend = alt.Legend(
        title=None,
        orient="bottom",
        columns=2 if width < 500 else 4,
        symbolSize=90,
        symbolOpacity=1,
        labelLimit=width // 2 - 30,
    )
    names = [kind.name for kind in kinds]
    colors = alt.Scale(domain=names, range=[var(kind.color) for kind in kinds])
    shapes = alt.Scale(domain=names, range=[kind.shape for kind in kinds])
    return (
        alt.Chart(data_of(dots))
        .mark_point(filled=True, size=90, opacity=1, stroke=var("paper"), strokeWidth=1)
        .encode(
            x=axes.x(alt),
            y=axes.y(alt),
            color=alt.Color("kind:N", scale=colors, legend=legend),
            shape=alt.Shape("kind:N", scale=shapes, legend=legend),
        )
    )


def _names(
    alt: Any,
    kinds: Sequence[_Kind],
    known: Baselines | None,
    axes: _Axes,
    everything: Sequence[Point],
    intervals: Sequence[dict[str, Any]],
    lines: Sequence[_Line],
) -> Any:
    """Names beside points, where there is room: runs, then corners of the hull, then other pairs."""
    corners = {point.name for point in known.hull} if known else set()
    order = {"single pair": 3, "random pair": 9, "oracle": 9, "random, same shares": 9}
    wanted = [
        (order.get(kind.name, 0) - (point.name in corners), point)
        for kind in kinds
        for point in kind.points
        if order.get(kind.name, 0) < 9
    ]
    wanted += [(5, replace(line.anchor, name=line.name)) for line in lines]
    wanted.sort(key=lambda item: item[0])
    taken = [Box.around(*axes.pixels(point), 12, 12) for point in everything]
    for bar in intervals:
        top, low = axes.pixel_y(bar["high"]), axes.pixel_y(bar["low"])
        taken.append(Box(axes.pixel_x(bar["x"]) - 2, top, axes.pixel_x(bar["x"]) + 2, low))
    for line in lines:
        taken += along([axes.pixels(point) for point in line.points])
    labels = place_labels(
        [(point.name, *axes.pixels(point)) for _, point in wanted], taken, axes.width, axes.height, LETTER
    )
    texts = [
        {
            "x": axes.value_x(label.x),
            "y": axes.value_y(label.y),
            "text": label.text,
            "color": var("ink" if rank < 2 else "muted"),
        }
        for (rank, _), label in zip(wanted, labels, strict=True)
        if label is not None
    ]
    names = (
        alt.Chart(data_of(texts))
        .mark_text(align="left", baseline="middle", fontSize=12)
        .encode(x=axes.x(alt), y=axes.y(alt), text="text:N", color=alt.Color("color:N", scale=None))
    )
    ends = [
        {"x": axes.value_x(x), "y": axes.value_y(y), "x2": axes.value_x(to_x), "y2": axes.value_y(to_y)}
        for label in labels
        if label is not None and label.leader is not None
        for x, y, to_x, to_y in [label.leader]
    ]
    if not ends:
        return names
    rules = (
        alt.Chart(data_of(ends))
        .mark_rule(color=var("muted"), strokeWidth=0.75)
        .encode(x=axes.x(alt), y=axes.y(alt), x2="x2:Q", y2="y2:Q")
    )
    return alt.layer(rules, names)


@dataclass(frozen=True)
class _Axes:
    """The scales, known before drawing so that names can be placed: dollars per 1,000 questions, accuracy."""

    left: float
    right: float
    bottom: float
    top: float
    is_log: bool
    width: float
    height: float

    @classmethod
    def around(cls, points: Sequence[Point], width: int, height: int) -> _Axes:
        costs = [_per_1000(point.cost) for point in points]
        lows = [point.accuracy if point.low is None else point.low for point in points]
        highs = [point.accuracy if point.high is None else point.high for point in points]
        bottom, top = (
            max(0.0, math.floor(min(lows) * 10 - 0.3) / 10),
            min(1.0, math.ceil(max(highs) * 10 + 0.3) / 10),
        )
        inner = (width - 62.0, height - 92.0)
        is_log = min(costs) > 0 and max(costs) / min(costs) > 5
        if is_log:
            return cls(min(costs) / 1.45, max(costs) * 1.6, bottom, top, True, *inner)
        spare = (max(costs) - min(costs) or max(costs) or 1.0) * 0.12
        return cls(max(0.0, min(costs) - spare), max(costs) + spare, bottom, top, False, *inner)

    def x(self, alt: Any) -> Any:
        kind = "log" if self.is_log else "linear"
        scale = alt.Scale(type=kind, domain=[self.left, self.right], nice=False, zero=False)
        ticks, form = self._ticks()
        axis = alt.Axis(
            title="cost per 1,000 questions",
            format=form,
            values=ticks,
            labelOverlap="greedy",
            grid=False,
        )
        return alt.X("x:Q", scale=scale, axis=axis)

    def y(self, alt: Any, field: str = "y:Q") -> Any:
        scale = alt.Scale(domain=[self.bottom, self.top], nice=False, zero=False)
        return alt.Y(field, scale=scale, axis=alt.Axis(title="right", format="%", tickCount=6))

    def _ticks(self) -> tuple[list[float], str]:
        if self.is_log:
            return log_ticks(self.left, self.right), "$,.3~r"
        return money_ticks(self.left, self.right, 4 if self.width < 400 else 6)

    def pixel_x(self, value: float) -> float:
        if self.is_log:
            return self.width * math.log(value / self.left) / math.log(self.right / self.left)
        return self.width * (value - self.left) / (self.right - self.left)

    def pixel_y(self, value: float) -> float:
        return self.height * (self.top - value) / (self.top - self.bottom)

    def pixels(self, point: Point) -> tuple[float, float]:
        return self.pixel_x(_per_1000(point.cost)), self.pixel_y(point.accuracy)

    def value_x(self, pixel: float) -> float:
        share = pixel / self.width
        if self.is_log:
            return float(self.left * (self.right / self.left) ** share)
        return self.left + share * (self.right - self.left)

    def value_y(self, pixel: float) -> float:
        return self.top - pixel / self.height * (self.top - self.bottom)


def _per_1000(cost: float) -> float:
    """Nano-dollars a question as dollars per 1,000 questions."""
    return cost / 1e6


def _line(alt: Any, line: _Line, color: str, axes: _Axes, dash: list[int]) -> Any:
    rows = [{"x": _per_1000(point.cost), "y": point.accuracy} for point in line.points]
    return (
        alt.Chart(data_of(rows))
        .mark_line(color=var(color), strokeWidth=1.5, strokeDash=dash)
        .encode(x=axes.x(alt), y=axes.y(alt), order="x:Q")
    )


def mixtures(corners: Sequence[Point], axes: _Axes) -> list[Point]:
    """What the mixtures of each point with the next cost and get right, a point every few pixels of cost.

    A mixture's cost and accuracy are both means, so that they lie on a straight line where cost is linear and
    on a curve where the axis is logarithmic: a straight line there would promise too much.
    """
    costs = [point.cost for point in corners]
    accuracies = [point.accuracy for point in corners]
    curve = [corners[0]]
    for one, two in pairwise(corners):
        left, right = axes.pixels(one)[0], axes.pixels(two)[0]
        steps = max(1, math.ceil((right - left) / STEP))
        for step in range(1, steps):
            cost = axes.value_x(left + (right - left) * step / steps) * 1e6
            curve.append(Point("", cost, float(np.interp(cost, costs, accuracies))))
        curve.append(two)
    return curve


def _middle(corners: Sequence[Point], curve: Sequence[Point]) -> Point:
    """The middle of a curve's longest piece between two corners."""
    ends = [curve.index(corner) for corner in corners]
    first, last = max(pairwise(ends), key=lambda pair: pair[1] - pair[0])
    return curve[(first + last) // 2]
