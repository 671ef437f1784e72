"""Charts of one run: calibration, tokens, the budget over time, and each model's share of the texts."""

from __future__ import annotations

from functools import partial
from typing import Any

from viaticum.display import cut
from viaticum.reports.chart_rendering import (
    WIDE_LETTER,
    Chart,
    data_of,
    library,
    log_ticks,
    money_ticks,
    styled,
    var,
)
from viaticum.reports.ledger_history import LedgerHistory
from viaticum.reports.run_metrics import Calibration, Coverage
from viaticum.reports.runs import PARTS, PHASES, Texts


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


def writers_chart(texts: Texts) -> Chart | None:
    """Heat strips: thinking and answer, each by model, from the beginning of a text to its end."""
    if not texts.phases:
        return None
    total = sum(map(sum, texts.phases.values())) or 1.0
    shares = "; ".join(f"{label} {sum(parts) / total:.0%}" for label, parts in labelled_phases(texts))
    return Chart(
        "writers",
        "Who wrote which part of a text",
        f"Share of the text by position, from its beginning to its end. In all: {shares}.",
        partial(_writers, texts),
        "From the beginning of a text, at the left, to its end; the stronger the colour, the more of the "
        "text there. At each position all strips together are the whole text.",
    )


def labelled_phases(texts: Texts) -> list[tuple[str, list[float]]]:
    """What each model wrote of thinking and of the answer; without any thinking, by model alone."""
    order = sorted(texts.phases, key=lambda each: (PHASES.index(each[0]), -sum(texts.phases[each])))
    return [
        (f"{phase}: {model}" if texts.thought else model, texts.phases[phase, model])
        for phase, model in order
    ]


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
    amounts = [each[name] or 0.0 for each in rows for name in ("posted", "free")]
    low, high = min(0.0, *amounts), max(amounts) or 1.0
    ticks, form = money_ticks(low, high, 5)
    axis = alt.Axis(title="left of the budget" if history.limit else "spent", format=form, values=ticks)
    scale = alt.Scale(domain=[low, high], nice=False)
    base = alt.Chart(data_of(rows))
    layers = [
        base.mark_area(color=var("held"), opacity=0.6, interpolate="step-after").encode(
            x=x, y=alt.Y("free:Q", axis=axis, scale=scale), y2="posted:Q"
        ),
        base.mark_line(color=var("run-1"), strokeWidth=2, interpolate="step-after").encode(
            x=x, y=alt.Y("posted:Q", axis=axis, scale=scale)
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
                .encode(x=x, y=alt.Y("y:Q", axis=axis, scale=scale))
            )
    return styled(alt, alt.layer(*layers), width, height)


def _marks_text(history: LedgerHistory) -> str:
    parts = [f"{history.overrun_calls} calls went past their hold"] if history.overrun_calls else []
    parts += [f"{history.unknown_calls} calls are unknown"] if history.unknown_calls else []
    return f"{'; '.join(parts)}." if parts else "No call went past its hold."


def _writers(texts: Texts, width: int) -> Any:
    alt = library("altair")
    strips = labelled_phases(texts)
    totals = [sum(parts[n] for _, parts in strips) or 1.0 for n in range(PARTS)]
    whole, most = sum(totals), int((width - 24) / WIDE_LETTER) - len(", 100%")
    rows = [
        {"from": n / PARTS, "to": (n + 1) / PARTS, "top": at + 0.42, "low": at + 0.96, "share": part / total}
        for at, (_, parts) in enumerate(strips)
        for n, (part, total) in enumerate(zip(parts, totals, strict=True))
    ]
    labels = [
        {"x": 0, "y": at + 0.22, "text": f"{cut(label, most)}, {sum(parts) / whole:.0%}"}
        for at, (label, parts) in enumerate(strips)
    ]
    position = alt.Scale(domain=[0, 1])
    axis = alt.Axis(title="position in the text", format="%", tickCount=5, grid=False)
    depth = alt.Scale(domain=[len(strips), 0], nice=False)
    cells = (
        alt.Chart(data_of(rows))
        .mark_rect(color=var("run-1"), stroke=var("line"), strokeWidth=1)
        .encode(
            x=alt.X("from:Q", scale=position, axis=axis),
            x2="to:Q",
            y=alt.Y("top:Q", scale=depth, axis=None),
            y2="low:Q",
            fillOpacity=alt.FillOpacity("share:Q", scale=alt.Scale(domain=[0, 1], range=[0, 1]), legend=None),
        )
    )
    names = (
        alt.Chart(data_of(labels))
        .mark_text(align="left", baseline="middle", fontSize=12, color=var("ink"))
        .encode(
            x=alt.X("x:Q", scale=position, axis=axis), y=alt.Y("y:Q", scale=depth, axis=None), text="text:N"
        )
    )
    return styled(alt, alt.layer(cells, names), width, 48 + 46 * len(strips))


def _time_unit(seconds: float) -> tuple[float, str]:
    return (1.0, "seconds") if seconds < 120 else (60.0, "minutes") if seconds < 7_200 else (3_600.0, "hours")


def _dollars(nanousd: int | None) -> float | None:
    return None if nanousd is None else nanousd / 1e9
