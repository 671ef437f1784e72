"""Charts of one run: calibration, tokens, the budget over time, and each model's share of the texts."""

from __future__ import annotations

from functools import partial
from typing import Any

from viaticum.reports.chart_rendering import SERIES, Chart, data_of, library, log_ticks, styled, var
from viaticum.reports.ledger_history import LedgerHistory
from viaticum.reports.run_metrics import Calibration, Coverage
from viaticum.reports.runs import PARTS, Texts


def calibration_chart(calibration: Calibration) -> Chart:
    words = "; ".join(
        f"predicted {each.predicted:.0%}, right {each.right.value:.0%} of {each.right.of}"
        for each in calibration.bins
    )
    return Chart(
        "calibration",
        "Reliability diagram",
        f"Accuracy by predicted accuracy: {words}.",
        partial(_calibration, calibration),
        "The numbers at the top count the rows of each point, the bars are 95% intervals; ten bins of equal"
        " width. On the dashed line predictions are right.",
    )


def tokens_chart(coverage: Coverage) -> Chart:
    words = (
        f"Real output tokens against the median that was predicted, for {len(coverage.dots)} rows, with the"
        " line on which they are equal."
    )
    return Chart(
        "tokens",
        "Predicted and real output tokens",
        words,
        partial(_tokens, coverage),
        "A dot is a row; below the dashed line it took less than was predicted.",
    )


def burn_chart(history: LedgerHistory) -> Chart | None:
    if len(history.moments) < 2:
        return None
    words = (
        "What is left of the budget over time, less what is held. "
        if history.limit
        else "What was spent over time, and held beside it. "
    )
    caption = "The line is what is left after what was spent, the shade below it what was held at the time."
    if not history.limit:
        caption = "The line is what was spent, the shade above it what was held at the time."
    marks = [
        *(["triangles are calls that went past their hold"] if history.overruns else []),
        *(["diamonds are calls nobody heard of again"] if history.unknowns else []),
    ]
    meaning = ", ".join(marks)
    caption += f" {meaning[:1].upper()}{meaning[1:]}." if meaning else ""
    return Chart(
        "burn", "Budget over time", f"{words}{_marks_text(history)}", partial(_burn, history), caption
    )


def writers_chart(texts: Texts, large: str) -> Chart | None:
    if not texts.count:
        return None
    name = large or "each model"
    words = f"Share of the text that {name} wrote, from its beginning to its end, over {texts.count} texts."
    return Chart("writers", "Who wrote which part of a text", words, partial(_writers, texts, large))


def _calibration(calibration: Calibration, width: int) -> Any:
    alt = library("altair")
    size = min(width, 430)
    rows = [
        {
            "predicted": each.predicted,
            "right": each.right.value,
            "low": each.right.low,
            "high": each.right.high,
            "n": f"{each.right.of}",
        }
        for each in calibration.bins
    ]
    data = data_of(rows)
    scale = alt.Scale(domain=[0, 1], nice=False)
    x = alt.X(
        "predicted:Q",
        scale=scale,
        axis=alt.Axis(title="predicted to be right", format="%", tickCount=5, grid=False),
    )
    y = alt.Y("right:Q", scale=scale, axis=alt.Axis(title="right", format="%", tickCount=5))
    even = (
        alt.Chart(data_of([{"predicted": 0, "right": 0}, {"predicted": 1, "right": 1}]))
        .mark_line(color=var("hull"), strokeDash=[4, 4], strokeWidth=1.5)
        .encode(x=x, y=y)
    )
    base = alt.Chart(data)
    bars = base.mark_rule(color=var("run-1"), strokeWidth=1.5, opacity=0.55).encode(
        x=x, y=alt.Y("low:Q", scale=scale, axis=alt.Axis(title="right", format="%", tickCount=5)), y2="high:Q"
    )
    dots = base.mark_point(filled=True, size=80, color=var("run-1"), opacity=1).encode(x=x, y=y)
    counts = base.mark_text(color=var("muted"), fontSize=11, baseline="bottom").encode(
        x=x, y=alt.value(-3), text="n:N"
    )
    return styled(alt, alt.layer(even, bars, dots, counts), size, size)


def _tokens(coverage: Coverage, width: int) -> Any:
    alt = library("altair")
    size = min(width, 430)
    values = [value for pair in coverage.dots for value in pair if value > 0] or [1.0]
    ends = [min(values) / 1.3, max(values) * 1.3]
    scale, ticks = alt.Scale(type="log", domain=ends, nice=False), log_ticks(*ends)
    kept = [{"p50": p50, "real": real} for p50, real in coverage.dots if p50 > 0 and real > 0]
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
        alt.Chart(data_of([{"p50": value, "real": value} for value in ends]))
        .mark_line(color=var("hull"), strokeDash=[4, 4], strokeWidth=1.5)
        .encode(x=x, y=y)
    )
    dots = (
        alt.Chart(data_of(kept))
        .mark_point(filled=True, size=26, opacity=0.45, color=var("run-1"))
        .encode(x=x, y=y)
    )
    return styled(alt, alt.layer(even, dots), size, size)


def _burn(history: LedgerHistory, width: int) -> Any:
    alt = library("altair")
    height = 300 if width > 500 else 260
    per, unit = _time_unit(history.moments[-1].seconds)
    rows = [
        {
            "t": each.seconds / per,
            "posted": _dollars(
                each.posted if history.limit is None else (each.limit or history.limit) - each.posted
            ),
            "free": _dollars(
                each.committed if history.limit is None else (each.limit or history.limit) - each.committed
            ),
        }
        for each in history.moments
    ]
    x = alt.X(
        "t:Q",
        axis=alt.Axis(title=f"{unit} since the job began", grid=False, tickCount=6),
        scale=alt.Scale(nice=False),
    )
    axis = alt.Axis(title="left of the budget" if history.limit else "spent", format="$.3~r", tickCount=5)
    base = alt.Chart(data_of(rows))
    layers = [
        base.mark_area(color=var("held"), opacity=0.6, interpolate="step-after").encode(
            x=x, y=alt.Y("free:Q", axis=axis), y2="posted:Q"
        ),
        base.mark_line(color=var("run-1"), strokeWidth=2, interpolate="step-after").encode(
            x=x, y=alt.Y("posted:Q", axis=axis)
        ),
    ]
    for marks, color, shape in (
        (history.overruns, "bad", "triangle-up"),
        (history.unknowns, "mix", "diamond"),
    ):
        seen = [
            {"t": mark.seconds / per, "y": _dollars(mark.left)}
            for mark in marks
            if mark.left is not None and mark.seconds >= 0
        ]
        if seen:
            layers.append(
                alt.Chart(data_of(seen))
                .mark_point(filled=True, size=80, color=var(color), shape=shape, opacity=1)
                .encode(x=x, y=alt.Y("y:Q", axis=axis))
            )
    return styled(alt, alt.layer(*layers), width, height)


def _marks_text(history: LedgerHistory) -> str:
    parts = [f"{history.overrun_calls} calls went past their hold"] if history.overrun_calls else []
    parts += [f"{history.unknown_calls} calls are unknown"] if history.unknown_calls else []
    return f"{'; '.join(parts)}." if parts else "No call went past its hold."


def _writers(texts: Texts, large: str, width: int) -> Any:
    alt = library("altair")
    models = sorted(texts.parts, key=lambda name: (name == large, name))
    rows = []
    for part in range(PARTS):
        total = sum(texts.parts[name][part] for name in models) or 1.0
        rows += [
            {
                "from": part / PARTS,
                "to": (part + 1) / PARTS,
                "share": texts.parts[name][part] / total,
                "model": name,
                "order": n,
            }
            for n, name in enumerate(models[::-1])
        ]
    colors = (
        [var(color) for color in ("held", "run-1")]
        if len(models) == 2
        else [var(SERIES[n % 4]) for n in range(len(models))]
    )
    legend = alt.Legend(title=None, orient="bottom", symbolOpacity=1, labelLimit=width // 2)
    chart = (
        alt.Chart(data_of(rows))
        .mark_bar(stroke=var("paper"), strokeWidth=1)
        .encode(
            x=alt.X(
                "from:Q",
                bin="binned",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(title="place in the text", format="%", tickCount=5, grid=False),
            ),
            x2="to:Q",
            y=alt.Y(
                "share:Q",
                stack="zero",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(title="written by", format="%", tickCount=4),
            ),
            color=alt.Color("model:N", scale=alt.Scale(domain=models, range=colors), legend=legend),
            order="order:Q",
        )
    )
    return styled(alt, chart, width, 220)


def _time_unit(seconds: float) -> tuple[float, str]:
    return (1.0, "seconds") if seconds < 120 else (60.0, "minutes") if seconds < 7_200 else (3_600.0, "hours")


def _dollars(nanousd: int | None) -> float | None:
    return None if nanousd is None else nanousd / 1e9
