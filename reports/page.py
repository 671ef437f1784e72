"""The report as one HTML file that needs nothing else: no network, no fonts, no other file.

A content security policy in the page allows no request and no script but the one for the theme, by its hash,
so that even a text that was not escaped could do nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from viaticum import __version__
from viaticum.errors import MissingExtra
from viaticum.reports import overview
from viaticum.reports.chart_rendering import LIGHT, NARROW, WIDE, Chart
from viaticum.reports.formatting import NONE, count, percent, saved_short, unbroken, usd, verdict
from viaticum.reports.intervals import SEED
from viaticum.reports.numbers import Numbers, RunNumbers
from viaticum.reports.sections import RunSections, Section, Table
from viaticum.reports.svg import accessible_svg

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
NOTE = (
    "Intervals are 95%: Wilson's for shares, a percentile bootstrap over questions (seed {seed}) for means "
    "and differences. Right counts all rows whose right answer is known; one that was skipped or failed is "
    "not right. Amounts for reading are rounded; the JSON has them in nano-dollars."
)
Links = Sequence[tuple[str, str]]
GROUNDS = {"ground": ("#f5f6f8", "#10141a"), "edge": ("#8a93a3", "#6d7789"), "wash": ("#e8effc", "#22304a")}


def write_page(numbers: Numbers, title: str, links: Links = ()) -> str:
    """The report as the text of one HTML file.

    Args:
        links: (label, address) of other pages, shown at the top.

    Raises:
        MissingExtra: the extra `reports` is not installed.
    """
    several = len(numbers.runs) > 1
    return _render(
        title,
        [_verdict(each, several) for each in numbers.runs],
        overview.comparison_section(numbers) if several else None,
        overview.plane_section(numbers),
        overview.parts(numbers),
        NOTE.format(seed=numbers.seed),
        links,
    )


def write_sections(
    title: str,
    sentence: str,
    notices: Sequence[str],
    sections: Sequence[Section],
    facts: tuple[tuple[str, str], ...],
    note: str = "",
    links: Links = (),
) -> str:
    """A page of these sections, at least one, for what is no run.

    Args:
        title: of the page.
        sentence: what was found.
        notices: what has to be known first.
        sections: in their order.
        facts: (name, value) of where the numbers are from.
        note: how the numbers are counted; by default what reports on runs say of theirs.
        links: (label, address) of other pages, shown at the top.

    Raises:
        MissingExtra: the extra `reports` is not installed.
    """
    verdict = {"name": title, "sentence": sentence, "rest": "", "notices": notices, "tiles": []}
    part = RunSections(title, (), tuple(sections[1:]), facts)
    return _render(title, [verdict], None, sections[0], [part], note or NOTE.format(seed=SEED), links)


def _render(
    title: str,
    verdicts: Sequence[dict[str, Any]],
    comparison: Section | None,
    plane: Section,
    parts: Sequence[RunSections],
    note: str,
    links: Links,
) -> str:
    environment = _environment()
    script = _resource("page.js")
    return str(
        environment.get_template("page.html.jinja").render(
            title=title,
            version=__version__,
            note=note,
            links=links,
            style=environment.get_template("page.css.jinja").render(light=_variables(0), dark=_variables(1)),
            script=script,
            script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            verdicts=verdicts,
            comparison=comparison,
            plane=plane,
            parts=parts,
        )
    )


def table_html(table: Table) -> str:
    """A `<table>` of the page, its cells escaped. Raises `MissingExtra` as `write_page` does."""
    return str(_environment().get_template("macros.html.jinja").module.table(table))


def _environment() -> Any:
    """The templates, and what they call."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise MissingExtra("jinja2", "reports") from None
    environment = Environment(
        loader=PackageLoader("viaticum.reports", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {
        "draw_chart": _chart,
        "is_wide": _is_wide,
        "unbroken": unbroken,
        "writer_names": _writer_names,
        "WIDE": WIDE,
        "NARROW": NARROW,
    }
    return environment


def _verdict(numbers: RunNumbers, several: bool) -> dict[str, Any]:
    first, stop, rest = verdict(numbers).partition(". ")
    return {
        "name": numbers.run.name,
        "sentence": first + stop.strip(),
        "rest": rest,
        "notices": overview.notices(numbers),
        "tiles": [] if several else _tiles(numbers),
    }


def _tiles(numbers: RunNumbers) -> list[dict[str, str]]:
    if numbers.run.single or not len(numbers.run.rows):
        return []
    right, tally = numbers.accuracy, numbers.tally
    saved, than = saved_short(numbers)
    limit = (
        numbers.history.limit
        if numbers.history
        else numbers.run.job.limit_nanousd
        if numbers.run.job
        else None
    )
    held = f", {usd(numbers.history.held)} still held" if numbers.history and numbers.history.held else ""
    of = f"of {usd(limit)}{held}" if limit else f"{held.removeprefix(', ')}"
    range95 = (
        f"{percent(right.low)} to {percent(right.high)} of {count(right.of, 'question')}"
        if right
        else "no right answer is known"
    )
    found = numbers.calibration
    predicted = (
        [
            _tile(
                "Predicted right",
                percent(found.predicted),
                f"{percent(found.right)} were, of {found.of:,} tried",
            )
        ]
        if found
        else []
    )
    return [
        _tile("Right", percent(right.value) if right else NONE, range95),
        *predicted,
        _tile("Spent", usd(numbers.spent), f"{of} (from: {numbers.spent_source})".strip()),
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
    """Whether its cells have to break to fit a page of 860 pixels."""
    lengths = (
        [
            max(map(len, (label, *column)))
            for (label, _), column in zip(table.columns, zip(*table.rows, strict=True), strict=True)
        ]
        if table.rows
        else []
    )
    return sum(lengths[1:]) + 2 * len(lengths) > 88 - min(18, *lengths[:1], 18)


def _chart(chart: Chart, prefix: str, width: int) -> Any:
    """The drawing as markup of the page; its texts were escaped when it was drawn."""
    from markupsafe import Markup

    name = f"{prefix}{chart.name}-{width}"
    return Markup(accessible_svg(chart.svg(width), name, chart.title, chart.description))


def _writer_names(section: Section) -> list[str]:
    """The larger model second, whose colour is the stronger one."""
    names = list(dict.fromkeys(model for each in section.written for model, _ in each.pieces))
    return sorted(names, key=lambda name: (name == section.large, name))


def _variables(theme: int) -> str:
    """The colours of a theme (0 light, 1 dark) as CSS variables."""
    colors = (LIGHT, DARK)[theme] | {name: pair[theme] for name, pair in GROUNDS.items()}
    return ";".join(f"--{name}:{value}" for name, value in colors.items())


def _resource(name: str) -> str:
    return files("viaticum.reports").joinpath(name).read_text(encoding="utf-8")
