"""The page of what was spent: by week, team, key, model, budget, and by each tag that callers set.

Leaves out counting (`spending`) and how a page is made (`page`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from viaticum.budgets import Ledger
from viaticum.budgets.tagging import OWN_TAGS
from viaticum.files import atomic_write
from viaticum.money import format_usd
from viaticum.reports.formatting import count, percent
from viaticum.reports.page import write_sections
from viaticum.reports.sections import LEDGER, Section, Table
from viaticum.reports.spending import NO_TAG, TAG, Spending, read_tables, weeks_between
from viaticum.reports.trend_charts import spending_chart

NOTE = (
    "Counted is what the ledger posted, at the time when a call ended. Amounts are exact. Weeks are those of "
    "ISO 8601. A call of two models counts in the line of each, and its cost is split between them."
)
MOST_LINES = 50
MOST_TAGS = 8
TITLES = {"team": "By team", "key": "By key", "model": "By model", "root": "By budget"}
UNLABELLED = "Calls without this label: those of code that sets none, and of API keys without a team."
HOW = "viaticum keys create --team, viaticum.tagged and VIATICUM_TAGS set labels."


def write_spending_page(out: Path, ledger: Ledger, **window: Any) -> None:
    """Write the page of a ledger; window: as in `read_spending`.

    Raises:
        MissingExtra: the extra `reports` is not installed.
    """
    sections, sentence, notices = spending_sections(partial(read_tables, [ledger], **window))
    atomic_write(out, write_sections("Spending", sentence, notices, sections, facts_of(window), NOTE))


def spending_sections(
    read: Callable[[Sequence[Sequence[str]]], list[Spending]],
) -> tuple[list[Section], str, list[str]]:
    """Sections, the sentence at the top, and what has to be known first.

    read: returns the spending by some lists of dimensions.
    """
    first: list[list[str]] = [["week", "model"], *([name] for name in TITLES)]
    weeks, *tables = read(first)
    names = [name for name in weeks.tags if name not in OWN_TAGS and name not in TITLES]
    own = [[TAG + name] for name in names[:MOST_TAGS]]
    tables += read(own) if own else []
    sections = [_weeks(weeks), *(_table(each) for each in tables)]
    span = sorted({line.labels[0] for line in weeks.lines})
    when = f", {span[0]} to {span[-1]}" if span else ""
    sentence = f"{format_usd(weeks.nanousd)} was spent in {count(weeks.calls, 'call')}{when}."
    notices = []
    if weeks.unknown:
        notices.append(
            f"Not counted: {format_usd(weeks.unknown_nanousd)} held for {count(weeks.unknown, 'call')} whose "
            "end is not known; viaticum budget reconcile settles them."
        )
    if len(names) > MOST_TAGS:
        notices.append(f"Not shown: the tags {', '.join(names[MOST_TAGS:])}.")
    return sections, sentence, notices


def facts_of(window: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    named = {"budget": "all", "since": "the first call", "until": "now", "zone": "UTC"}
    return tuple((name, str(window.get(name) or otherwise)) for name, otherwise in named.items())


def _weeks(found: Spending) -> Section:
    title = "Spending by week and model"
    if not found.lines:
        return Section("weeks", title, LEDGER, empty="No call was posted in this time.")
    spent: dict[tuple[str, str], int] = {}
    for line in found.lines:
        week, model = line.labels
        spent[week, model] = spent.get((week, model), 0) + line.nanousd
    seen = sorted({week for week, _ in spent})
    weeks = weeks_between(seen[0], seen[-1])
    rows = tuple(
        (week, format_usd(sum(amount for (at, _), amount in spent.items() if at == week)))
        for week in weeks[::-1]
    )
    data = Table("Spent in each week", (("week", False), ("spent", True)), rows)
    return Section(
        "weeks", title, LEDGER, charts=(spending_chart("weeks", title, weeks, spent),), data=(data,)
    )


def _table(found: Spending) -> Section:
    (dimension,) = found.by
    label = dimension.removeprefix(TAG)
    title = TITLES.get(dimension, f"By the tag {label}")
    name = TITLES.get(dimension, "").removeprefix("By ") or f"tag-{_as_id(label)}"
    if not found.lines or all(line.labels == (NO_TAG,) for line in found.lines):
        empty = f"No call has a {label}. {HOW}" if found.lines else "No call was posted in this time."
        return Section(name, title, LEDGER, empty=empty)
    rows = [
        (
            line.labels[0],
            f"{line.calls:,}",
            f"{line.input_tokens:,}",
            f"{line.output_tokens:,}",
            percent(line.nanousd / found.nanousd) if found.nanousd else "–",
            format_usd(line.nanousd),
        )
        for line in found.lines[:MOST_LINES]
    ]
    columns = (
        (label if dimension != "root" else "budget", False),
        ("calls", True),
        ("tokens read", True),
        ("tokens written", True),
        ("share", True),
        ("spent", True),
    )
    notes = []
    if any(line.labels == (NO_TAG,) for line in found.lines):
        notes.append(f"{NO_TAG}: {UNLABELLED[0].lower()}{UNLABELLED[1:]} {HOW}")
    notes += _rest(found.lines[MOST_LINES:])
    return Section(
        name,
        title,
        LEDGER,
        tables=(Table(f"Spent {title[0].lower()}{title[1:]}", columns, tuple(rows)),),
        notes=tuple(notes),
    )


def _rest(lines: Sequence[Any]) -> list[str]:
    if not lines:
        return []
    amount, rest = format_usd(sum(line.nanousd for line in lines)), count(len(lines), "smaller line")
    return [f"{rest}, {amount} together, are in the CSV: viaticum budget spending --csv."]


def _as_id(text: str) -> str:
    """Letters, digits and hyphens of a text, with a digest of it, so that ids differ as texts do."""
    from viaticum.budgets.records import digest

    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text)
    return f"{kept}-{digest(text)[:6]}"
