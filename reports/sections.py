"""Sections of a report as plain records: a title, a source, sentences, tables and charts.

The page and the Markdown are written from these alone. Texts here are not escaped; the writers escape them.
"""

from __future__ import annotations

from dataclasses import dataclass

from viaticum.reports.chart_rendering import Chart
from viaticum.reports.runs import Group, Written

LEDGER, ROWS, TABLE, LEDGER_ROWS = "ledger", "rows of the job", "outcome table", "ledger and rows of the job"


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names its row.

    Attributes:
        caption: for screen readers.
        columns: (label, is a number).
        links: an address for the first cell of each row, "" for none; empty where no row has one.
    """

    caption: str
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[str, ...], ...]
    links: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        name: part of its id on the page.
        source: where its numbers are from.
        lead, notes: sentences before and after its tables.
        data: tables of the numbers behind the charts.
        written: texts of several models; large is the larger one of these.
        failures: groups of the `of` rows; the page shows them in place of the table.
        empty: why there is nothing; then it has nothing else.
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
    """The sections of one run.

    Attributes:
        notices: what has to be known first: the job still runs, the ledger is gone.
        facts: (name, value) of where the numbers are from.
    """

    name: str
    notices: tuple[str, ...]
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...] = ()
