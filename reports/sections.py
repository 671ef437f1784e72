"""What a report is made of, as plain records: sections with a title, a source, sentences, tables and charts.

The page and the Markdown are written from these alone. Every text here is plain text: what writes it escapes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from viaticum.reports.chart_rendering import Chart
from viaticum.reports.runs import Group, Written

LEDGER, ROWS, TABLE, LEDGER_ROWS = "ledger", "rows of the job", "outcome table", "ledger and rows of the job"


@dataclass(frozen=True)
class Table:
    """columns: (label, is a number). The first column names its row. caption: what those hear who do not see it."""

    caption: str
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """One part of a report. empty: why there is nothing; then there is nothing else. data: numbers behind the charts.

    failures: groups of the `of` rows; the page shows them in place of the table.
    """

    name: str
    title: str
    source: str
    lead: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    data: tuple[Table, ...] = ()
    written: tuple[Written, ...] = ()
    large: str = ""
    failures: tuple[Group, ...] = ()
    of: int = 0
    notes: tuple[str, ...] = ()
    empty: str = ""


@dataclass(frozen=True)
class RunSections:
    """A run's sections; `notices` come first: the job still runs, the ledger is gone."""

    name: str
    notices: tuple[str, ...]
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...] = ()
