"""The report as one HTML file that needs nothing else: no network, no fonts, no other file.

A policy in the page itself lets nothing be fetched and no script run but the one for the theme, whose hash it names; so
that even a text that were not escaped could do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
from functools import cache
from importlib.resources import files
from typing import Any

from viaticum import __version__
from viaticum.errors import MissingExtra
from viaticum.reports import overview, tables
from viaticum.reports.drawing import LIGHT, NARROW, WIDE, Chart
from viaticum.reports.formatting import NONE, count, percent, saved_short, usd, verdict
from viaticum.reports.numbers import Numbers, RunNumbers
from viaticum.reports.parts import Section, Table

DARK = {
    "ink": "#e8ebf1",
    "muted": "#a6afbf",
    "line": "#2d3440",
    "paper": "#181d25",
    "hull": "#8d97a8",
    "single": "#98a2b3",
    "run-1": "#7eb0ff",
    "run-2": "#f28cc4",
    "run-3": "#5fd0ac",
    "run-4": "#e3b35b",
    "oracle": "#5fd0ac",
    "mix": "#e3b35b",
    "held": "#33518a",
    "bad": "#ff8f85",
}
GROUNDS = {"ground": ("#f5f6f8", "#10141a"), "edge": ("#8a93a3", "#6d7789"), "wash": ("#e8effc", "#22304a")}


def write_page(numbers: Numbers, title: str) -> str:
    """The whole file. Raises `MissingExtra` where the extra `reports` is not installed."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise MissingExtra("jinja2", "reports") from None
    shown = overview.parts(numbers)
    script = _resource("page.js")
    environment = Environment(
        loader=PackageLoader("viaticum.reports", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        title=title,
        version=__version__,
        seed=numbers.seed,
        style=_style(),
        script=script,
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        verdicts=[_verdict(each, len(numbers.runs) > 1) for each in numbers.runs],
        comparison=overview.comparison_section(numbers) if len(numbers.runs) > 1 else None,
        plane=overview.plane_section(numbers),
        parts=shown,
        loop_index=lambda part: shown.index(part) + 1,
        draw_table=tables.to_html,
        is_wide=_is_wide,
        draw_chart=_chart,
        writer_names=_writer_names,
        wide=WIDE,
        narrow=NARROW,
    )


def _verdict(told: RunNumbers, several: bool) -> dict[str, Any]:
    return {
        "name": told.run.name,
        "sentence": verdict(told),
        "notices": overview.notices(told),
        "tiles": [] if several else _tiles(told),
    }


def _tiles(told: RunNumbers) -> list[dict[str, str]]:
    if told.run.single or not len(told.run.rows):
        return []
    right, tally = told.accuracy, told.tally
    saved, than = saved_short(told)
    limit = told.trail.limit if told.trail else told.run.job.limit_nanousd if told.run.job else None
    held = f", {usd(told.trail.held)} still held" if told.trail and told.trail.held else ""
    of = f"of {usd(limit)}{held}" if limit else f"{held.removeprefix(', ')}"
    range95 = (
        f"{percent(right.low)} to {percent(right.high)} of {count(right.of, 'question')}"
        if right
        else "no right answer is known"
    )
    return [
        _tile("Right", percent(right.value) if right else NONE, range95),
        _tile("Spent", usd(told.spent), f"{of} (from: {told.spent_source})".strip()),
        _tile("At equal accuracy", saved, than),
        _tile(
            "Answered",
            f"{tally.answered:,}",
            f"of {tally.asked:,}; {tally.skipped:,} skipped, {tally.failed:,} failed",
        ),
    ]


def _tile(label: str, value: str, small: str) -> dict[str, str]:
    return {"label": label, "value": value, "small": small}


def _is_wide(table: Table) -> bool:
    """Whether its cells have to break to fit a desk's page."""
    lengths = (
        [
            max(map(len, (label, *column)))
            for (label, _), column in zip(table.columns, zip(*table.rows, strict=True), strict=True)
        ]
        if table.rows
        else []
    )
    return sum(lengths[1:]) + 2 * len(lengths) > 88 - min(18, *lengths[:1], 18)


def _chart(chart: Chart, prefix: str, width: int) -> str:
    """The drawing with what those hear who do not see it."""
    name = f"{prefix}{chart.name}-{width}"
    text = chart.svg(width, name)
    told = f'<title id="{name}-title">{html.escape(chart.title)}</title><desc id="{name}-desc">{html.escape(chart.description)}</desc>'
    start, rest = text.split(">", 1)
    return f'{start} role="img" aria-labelledby="{name}-title {name}-desc">{told}{rest}'


def _writer_names(section: Section) -> list[str]:
    """The larger model second, whose colour is the stronger one."""
    names = list(dict.fromkeys(model for each in section.written for model, _ in each.pieces))
    return sorted(names, key=lambda name: (name == section.large, name))


@cache
def _style() -> str:
    light = LIGHT | {name: pair[0] for name, pair in GROUNDS.items()}
    dark = DARK | {name: pair[1] for name, pair in GROUNDS.items()}
    told = [";".join(f"--{name}:{value}" for name, value in colors.items()) for colors in (light, dark)]
    return f":root{{color-scheme:light dark;{told[0]}}}\n{_resource('page.css').replace('DARK', told[1])}"


def _resource(name: str) -> str:
    return files("viaticum.reports").joinpath(name).read_text(encoding="utf-8")
