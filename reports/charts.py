"""The charts, as Altair specifications that vl-convert renders to SVG and PNG; nothing is fetched, no browser is needed.

Colours are names of CSS variables, which the page sets for light and dark; for PNG they are replaced by the light ones.
Each chart is drawn for a given width, so that a phone gets one whose letters are as large as on a desk.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from viaticum.errors import MissingExtra
from viaticum.reports.figures import Calibration, Coverage
from viaticum.reports.frontier import Plane, Point
from viaticum.reports.labels import Box, along, place_labels
from viaticum.reports.numbers import RunNumbers
from viaticum.reports.runs import PARTS, Texts
from viaticum.reports.trail import Trail

WIDE, NARROW = 760, 328
FONT = "Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"
LETTER = 6.4  # width of one at 12 pixels, on the safe side
# For PNG, and the light colours of the page.
LIGHT = {
    "ink": "#1c2430", "muted": "#566072", "line": "#dfe3ea", "paper": "#ffffff", "hull": "#7b8494", "single": "#7b8494",
    "run-1": "#1d5fd1", "run-2": "#b3357d", "run-3": "#0a7a5c", "run-4": "#8a5a00", "oracle": "#0a7a5c", "mix": "#8a5a00",
    "held": "#9db8ea", "bad": "#c0322b",
}  # fmt: skip
SERIES = ("run-1", "run-2", "run-3", "run-4")


@dataclass(frozen=True)
class Chart:
    """title and description are what those hear who do not see it; draw makes it for a width in pixels."""

    name: str
    title: str
    description: str
    draw: Callable[[int], Any]

    def svg(self, width: int, name: str) -> str:
        """For the page, without roles of its own. name: unlike any other chart's there, for its ids."""
        text: str = _library("vl_convert").vegalite_to_svg(self.draw(width).to_dict())
        ids = dict.fromkeys(re.findall(r'\bid="([^"]+)"', text))
        for each in ids:
            text = text.replace(f'id="{each}"', f'id="{name}-{each}"').replace(
                f"#{each})", f"#{name}-{each})"
            )
        return re.sub(r' (?:role|aria-[a-z]+)="[^"]*"', "", text)

    def png(self, width: int = WIDE, scale: float = 2.0) -> bytes:
        spec = json.dumps(self.draw(width).properties(background=LIGHT["paper"]).to_dict())
        spec = re.sub(r"var\(--([a-z0-9-]+)\)", lambda found: LIGHT[found[1]], spec)
        made: bytes = _library("vl_convert").vegalite_to_png(spec, scale=scale)
        return made


def plane_chart(runs: Sequence[RunNumbers]) -> Chart | None:
    """Cost and accuracy: every single pair, their hull, a random pair, the oracle, the forecast, and the runs."""
    known = next((each.plane for each in runs if each.plane is not None), None)
    points = _runs_in(runs)
    if not points:
        return None
    named = [f"{point.name} {point.accuracy:.0%}" for point in points]
    told = f"Accuracy against cost per 1,000 questions. {', '.join(named)}."
    if known is not None:
        told += f" The best single pair, {known.best.name}, gets {known.best.accuracy:.0%}; the oracle {known.oracle.accuracy:.0%}."
    forecasts = _previews(runs[0]) if len(runs) == 1 else []
    return Chart("plane", "Cost and accuracy", told, partial(_plane, points, known, forecasts))


def calibration_chart(told: Calibration) -> Chart:
    words = "; ".join(
        f"predicted {each.predicted:.0%}, right {each.right.value:.0%} of {each.right.of}"
        for each in told.bins
    )
    return Chart(
        "calibration",
        "Reliability diagram",
        f"Accuracy by predicted accuracy: {words}.",
        partial(_calibration, told),
    )


def tokens_chart(told: Coverage) -> Chart:
    words = f"Real output tokens against the median that was predicted, for {len(told.dots)} rows, with the line on which they are equal."
    return Chart("tokens", "Predicted and real output tokens", words, partial(_tokens, told))


def burn_chart(trail: Trail) -> Chart | None:
    if len(trail.moments) < 2:
        return None
    words = (
        "What is left of the budget over time, less what is held. "
        if trail.limit
        else "What was spent over time, and held beside it. "
    )
    return Chart("burn", "Budget over time", f"{words}{_marks_told(trail)}", partial(_burn, trail))


def writers_chart(texts: Texts, large: str) -> Chart | None:
    if not texts.count:
        return None
    name = large or "each model"
    words = f"Share of the text that {name} wrote, from its beginning to its end, over {texts.count} texts."
    return Chart("writers", "Who wrote which part of a text", words, partial(_writers, texts, large))


def _runs_in(runs: Sequence[RunNumbers]) -> list[Point]:
    """Runs that stand in the plane; an outcome table of several pairs is its own single pairs."""
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


def _plane(runs: Sequence[Point], known: Plane | None, forecasts: Sequence[Point], width: int) -> Any:
    alt = _library("altair")
    height = min(420, int(width * 0.62) if width > 500 else int(width * 1.05))
    kinds: list[tuple[str, str, str, list[Point]]] = []
    if known is not None:
        own = {point.name for point in runs}
        kinds.append(
            ("single pair", "single", "circle", [point for point in known.singles if point.name not in own])
        )
        kinds.append(("random pair", "mix", "diamond", [known.random]))
        if known.shuffled is not None:
            kinds.append(("same shares by lot", "mix", "cross", [known.shuffled]))
        kinds.append(("oracle", "oracle", "triangle-up", [known.oracle]))
    kinds += [(point.name, SERIES[n % len(SERIES)], "square", [point]) for n, point in enumerate(runs)]
    everything = [point for *_, points in kinds for point in points] + list(forecasts)
    axes = _Axes.around(everything, width, height)
    layers, lines = [], list[Sequence[Point]]()
    if known is not None and len(known.hull) > 1:
        corners = [
            {"x": _per_1000(p.cost), "y": p.accuracy, "kind": "best mixtures (hull)"} for p in known.hull
        ]
        layers.append(_line(alt, corners, "hull", axes, [1, 0]))
        lines.append(known.hull)
    if forecasts:
        told = [{"x": _per_1000(p.cost), "y": p.accuracy} for p in sorted(forecasts, key=lambda p: p.cost)]
        layers.append(_line(alt, told, "run-1", axes, [4, 4]))
        lines.append(sorted(forecasts, key=lambda p: p.cost))
    bars = [
        {"x": _per_1000(p.cost), "low": p.low, "high": p.high, "color": _var(color)}
        for _, color, _, points in kinds for p in points if p.low is not None and p.high is not None
    ]  # fmt: skip
    layers.append(
        alt.Chart(_data(bars)).mark_rule(strokeWidth=1.5, opacity=0.55)
        .encode(x=axes.x(alt), y=axes.y(alt, "low:Q"), y2="high:Q", color=alt.Color("color:N", scale=None))
    )  # fmt: skip
    dots = [
        {"x": _per_1000(p.cost), "y": p.accuracy, "kind": kind}
        for kind, _, _, points in kinds
        for p in points
    ]
    names = [kind for kind, *_ in kinds]
    legend = alt.Legend(
        title=None,
        orient="bottom",
        columns=2 if width < 500 else 4,
        symbolSize=90,
        symbolOpacity=1,
        labelLimit=width // 2 - 30,
    )
    layers.append(
        alt.Chart(_data(dots)).mark_point(filled=True, size=90, opacity=1, stroke=_var("paper"), strokeWidth=1)
        .encode(
            x=axes.x(alt), y=axes.y(alt),
            color=alt.Color("kind:N", scale=alt.Scale(domain=names, range=[_var(color) for _, color, *_ in kinds]), legend=legend),
            shape=alt.Shape("kind:N", scale=alt.Scale(domain=names, range=[shape for _, _, shape, _ in kinds]), legend=legend),
        )
    )  # fmt: skip
    layers.append(_names(alt, kinds, known, axes, everything, bars, lines))
    return _styled(alt, alt.layer(*layers), width, height)


def _names(
    alt: Any,
    kinds: Any,
    known: Plane | None,
    axes: _Axes,
    everything: Sequence[Point],
    bars: Any,
    lines: Sequence[Sequence[Point]],
) -> Any:
    """Names beside points, where there is room: runs first, then the corners of the hull, then the other pairs."""
    corners = {point.name for point in known.hull} if known else set()
    order = {"single pair": 3, "random pair": 9, "oracle": 9, "same shares by lot": 9}
    wanted = [
        (order.get(kind, 0) - (point.name in corners), point, color)
        for kind, color, _, points in kinds for point in points if order.get(kind, 0) < 9
    ]  # fmt: skip
    wanted.sort(key=lambda item: item[0])
    taken = [Box.around(*axes.pixels(point), 12, 12) for point in everything]
    for bar in bars:
        top, low = axes.pixel_y(bar["high"]), axes.pixel_y(bar["low"])
        taken.append(Box(axes.pixel_x(bar["x"]) - 2, top, axes.pixel_x(bar["x"]) + 2, low))
    for line in lines:
        taken += along([axes.pixels(point) for point in line])
    places = place_labels(
        [(point.name, *axes.pixels(point)) for _, point, _ in wanted], taken, axes.width, axes.height, LETTER
    )
    texts = [
        {"x": axes.value_x(place.x), "y": axes.value_y(place.y), "text": place.text, "color": _var("ink" if rank < 2 else "muted")}
        for (rank, _, _), place in zip(wanted, places, strict=True) if place is not None
    ]  # fmt: skip
    return alt.Chart(_data(texts)).mark_text(align="left", baseline="middle", fontSize=12).encode(
        x=axes.x(alt), y=axes.y(alt), text="text:N", color=alt.Color("color:N", scale=None)
    )  # fmt: skip


@dataclass(frozen=True)
class _Axes:
    """The plane's scales, known beforehand so that names can be placed: dollars per 1,000 questions, and accuracy."""

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
        axis = alt.Axis(
            title="cost per 1,000 questions",
            format="$.3~r",
            values=self._ticks(),
            labelOverlap="greedy",
            grid=False,
        )
        return alt.X("x:Q", scale=scale, axis=axis)

    def y(self, alt: Any, field: str = "y:Q") -> Any:
        scale = alt.Scale(domain=[self.bottom, self.top], nice=False, zero=False)
        return alt.Y(field, scale=scale, axis=alt.Axis(title="right", format="%", tickCount=6))

    def _ticks(self) -> Any:
        return _log_ticks(self.left, self.right) if self.is_log else _library("altair").Undefined

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


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten, or fewer where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 50 else (1, 3) if high / low < 2_000 else (1,)
    ticks = [step * 10.0**power for power in powers for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def _per_1000(cost: float) -> float:
    """Nano-dollars a question as dollars per 1,000 questions."""
    return cost / 1e6


def _line(alt: Any, rows: list[dict[str, Any]], color: str, axes: _Axes, dash: list[int]) -> Any:
    return alt.Chart(_data(rows)).mark_line(color=_var(color), strokeWidth=1.5, strokeDash=dash).encode(
        x=axes.x(alt), y=axes.y(alt), order="x:Q"
    )  # fmt: skip


def _calibration(told: Calibration, width: int) -> Any:
    alt = _library("altair")
    size = min(width, 430)
    rows = [
        {"predicted": each.predicted, "right": each.right.value, "low": each.right.low, "high": each.right.high, "n": f"{each.right.of}"}
        for each in told.bins
    ]  # fmt: skip
    data = _data(rows)
    scale = alt.Scale(domain=[0, 1], nice=False)
    x = alt.X(
        "predicted:Q",
        scale=scale,
        axis=alt.Axis(title="predicted to be right", format="%", tickCount=5, grid=False),
    )
    y = alt.Y("right:Q", scale=scale, axis=alt.Axis(title="right", format="%", tickCount=5))
    even = alt.Chart(_data([{"predicted": 0, "right": 0}, {"predicted": 1, "right": 1}])).mark_line(
        color=_var("hull"), strokeDash=[4, 4], strokeWidth=1.5
    ).encode(x=x, y=y)  # fmt: skip
    base = alt.Chart(data)
    bars = base.mark_rule(color=_var("run-1"), strokeWidth=1.5, opacity=0.55).encode(
        x=x, y=alt.Y("low:Q", scale=scale, axis=alt.Axis(title="right", format="%", tickCount=5)), y2="high:Q"
    )
    dots = base.mark_point(filled=True, size=80, color=_var("run-1"), opacity=1).encode(x=x, y=y)
    counts = base.mark_text(color=_var("muted"), fontSize=11, baseline="bottom").encode(
        x=x, y=alt.value(-3), text="n:N"
    )
    return _styled(alt, alt.layer(even, bars, dots, counts), size, size)


def _tokens(told: Coverage, width: int) -> Any:
    alt = _library("altair")
    size = min(width, 430)
    values = [value for pair in told.dots for value in pair if value > 0] or [1.0]
    ends = [min(values) / 1.3, max(values) * 1.3]
    scale, ticks = alt.Scale(type="log", domain=ends, nice=False), _log_ticks(*ends)
    kept = [{"p50": p50, "real": real} for p50, real in told.dots if p50 > 0 and real > 0]
    x = alt.X(
        "p50:Q",
        scale=scale,
        axis=alt.Axis(
            title="predicted output tokens (median)",
            format="~s",
            labelOverlap="greedy",
            values=ticks,
            grid=False,
        ),
    )
    y = alt.Y(
        "real:Q",
        scale=scale,
        axis=alt.Axis(title="real output tokens", format="~s", labelOverlap="greedy", values=ticks),
    )
    even = (
        alt.Chart(_data([{"p50": value, "real": value} for value in ends]))
        .mark_line(color=_var("hull"), strokeDash=[4, 4], strokeWidth=1.5)
        .encode(x=x, y=y)
    )
    dots = (
        alt.Chart(_data(kept))
        .mark_point(filled=True, size=26, opacity=0.45, color=_var("run-1"))
        .encode(x=x, y=y)
    )
    return _styled(alt, alt.layer(even, dots), size, size)


def _burn(trail: Trail, width: int) -> Any:
    alt = _library("altair")
    height = 300 if width > 500 else 260
    per, unit = _time_unit(trail.moments[-1].seconds)
    rows = [
        {
            "t": each.seconds / per,
            "posted": _dollars(
                each.posted if trail.limit is None else (each.limit or trail.limit) - each.posted
            ),
            "free": _dollars(
                each.committed if trail.limit is None else (each.limit or trail.limit) - each.committed
            ),
        }
        for each in trail.moments
    ]
    x = alt.X(
        "t:Q",
        axis=alt.Axis(title=f"{unit} since the job began", grid=False, tickCount=6),
        scale=alt.Scale(nice=False),
    )
    axis = alt.Axis(title="left of the budget" if trail.limit else "spent", format="$.3~r", tickCount=5)
    base = alt.Chart(_data(rows))
    layers = [
        base.mark_area(color=_var("held"), opacity=0.6, interpolate="step-after").encode(x=x, y=alt.Y("free:Q", axis=axis), y2="posted:Q"),
        base.mark_line(color=_var("run-1"), strokeWidth=2, interpolate="step-after").encode(x=x, y=alt.Y("posted:Q", axis=axis)),
    ]  # fmt: skip
    for marks, color, shape in ((trail.overruns, "bad", "triangle-up"), (trail.unknowns, "mix", "diamond")):
        seen = [
            {"t": mark.seconds / per, "y": _dollars(mark.left)}
            for mark in marks
            if mark.left is not None and mark.seconds >= 0
        ]
        if seen:
            layers.append(
                alt.Chart(_data(seen))
                .mark_point(filled=True, size=80, color=_var(color), shape=shape, opacity=1)
                .encode(x=x, y=alt.Y("y:Q", axis=axis))
            )
    return _styled(alt, alt.layer(*layers), width, height)


def _marks_told(trail: Trail) -> str:
    told = [f"{trail.overrun_calls} calls went past their hold"] if trail.overrun_calls else []
    told += [f"{trail.unknown_calls} calls are unknown"] if trail.unknown_calls else []
    return f"{'; '.join(told)}." if told else "No call went past its hold."


def _writers(texts: Texts, large: str, width: int) -> Any:
    alt = _library("altair")
    models = sorted(texts.parts, key=lambda name: (name == large, name))
    rows = []
    for part in range(PARTS):
        total = sum(texts.parts[name][part] for name in models) or 1.0
        rows += [
            {"from": part / PARTS, "to": (part + 1) / PARTS, "share": texts.parts[name][part] / total, "model": name, "order": n}
            for n, name in enumerate(models[::-1])
        ]  # fmt: skip
    colors = (
        [_var(color) for color in ("held", "run-1")]
        if len(models) == 2
        else [_var(SERIES[n % 4]) for n in range(len(models))]
    )
    legend = alt.Legend(title=None, orient="bottom", symbolOpacity=1, labelLimit=width // 2)
    chart = alt.Chart(_data(rows)).mark_bar(stroke=_var("paper"), strokeWidth=1).encode(
        x=alt.X("from:Q", bin="binned", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="place in the text", format="%", tickCount=5, grid=False)),
        x2="to:Q",
        y=alt.Y("share:Q", stack="zero", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="written by", format="%", tickCount=4)),
        color=alt.Color("model:N", scale=alt.Scale(domain=models, range=colors), legend=legend),
        order="order:Q",
    )  # fmt: skip
    return _styled(alt, chart, width, 220)


def _time_unit(seconds: float) -> tuple[float, str]:
    return (1.0, "seconds") if seconds < 120 else (60.0, "minutes") if seconds < 7_200 else (3_600.0, "hours")


def _dollars(nanousd: int | None) -> float | None:
    return None if nanousd is None else nanousd / 1e9


def _data(rows: Iterable[dict[str, Any]]) -> Any:
    return _library("altair").Data(values=list(rows))


def _var(name: str) -> str:
    return f"var(--{name})"


def _styled(alt: Any, chart: Any, width: int, height: int) -> Any:
    ink, muted, line = _var("ink"), _var("muted"), _var("line")
    return (
        chart.properties(width=width, height=height, background="transparent", autosize=alt.AutoSizeParams(type="fit", contains="padding"), padding=2)
        .configure(font=FONT, aria=False)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=muted, titleColor=ink, gridColor=line, domainColor=muted, tickColor=muted, labelFontSize=12,
            titleFontSize=12, titleFontWeight="normal", labelFont=FONT, titleFont=FONT,
        )
        .configure_legend(labelColor=ink, labelFontSize=12, labelFont=FONT, padding=4)
    )  # fmt: skip


def _library(name: str) -> Any:
    """Altair or vl-convert; `MissingExtra` where it is not installed."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise MissingExtra({"vl_convert": "vl-convert-python"}.get(name, name), "reports") from None
