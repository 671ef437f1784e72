"""The index of a site: all runs in a table, and by week what was right, what it cost, and what was spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any

from viaticum.reports.formatting import NONE, count, less_or_more, per_1000, percent, share_text, usd
from viaticum.reports.intervals import Share, share
from viaticum.reports.numbers import RunNumbers
from viaticum.reports.page import write_sections
from viaticum.reports.sections import LEDGER_ROWS, Section, Table
from viaticum.reports.spending import week_name, weeks_between
from viaticum.reports.trend_charts import WeekValue, points_chart, spending_chart

MOST_RUNS = 2_000
RUN_LINKS = (("all runs", "../index.html"),)
INDEX_LINKS = (("all runs", "index.html"),)
SUMMARY = (
    *("name", "input", "policy", "began", "ending", "rows", "answered", "right", "graded", "spent", "limit"),
    *("saved", "saved_low", "saved_high", "calibration_error", "warnings"),
)
NOTE = (
    "A run counts in the week in which it began (ISO 8601, UTC). Right is of all rows whose right answer is "
    "known, its intervals are Wilson's, 95%. Weeks may have other questions, so that a change of a week may "
    "be theirs. Amounts for reading are rounded; site.json has them in nano-dollars."
)


def summary_of(numbers: RunNumbers) -> dict[str, Any]:
    """What the index says of a run; amounts in nano-dollars."""
    run, job, right = numbers.run, numbers.run.job, numbers.accuracy
    assert job is not None
    saved = numbers.plane.saved if numbers.plane is not None else None
    values = (
        run.name,
        job.input,
        job.policy,
        job.began if _is_time(job.began) else "",
        job.ending,
        numbers.tally.asked,
        numbers.tally.answered,
        right.count if right else None,
        right.of if right else 0,
        numbers.spent,
        job.limit_nanousd,
        saved.share.value if saved else None,
        saved.share.low if saved else None,
        saved.share.high if saved else None,
        numbers.calibration.error if numbers.calibration else None,
        len(run.warnings),
    )
    return dict(zip(SUMMARY, values, strict=True))


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def index_page(runs: Sequence[Mapping[str, Any]], warnings: Sequence[str], spending: bool) -> str:
    """The page. runs: summaries with their `page`, the newest first. spending: whether there is that page."""
    spent = sum(each["spent"] for each in runs)
    days = sorted(each["began"][:10] for each in runs if each["began"])
    when = "" if not days else f", {days[0]} to {days[-1]}" if days[0] != days[-1] else f", {days[0]}"
    right, graded = sum(each["right"] or 0 for each in runs), sum(each["graded"] for each in runs)
    pooled = share(right, graded)
    of = f"; {percent(pooled.value)} of {count(graded, 'graded row')} right" if pooled else ""
    sentence = f"{count(len(runs), 'run')}{when}: {usd(spent)} spent{of}."
    notices = [f"{each[:1].upper()}{each[1:]}." for each in warnings[:10]]
    if len(warnings) > 10:
        notices.append(f"And {len(warnings) - 10} more that are left out.")
    links = (("spending", "spending.html"), ("CSV", "spending.csv")) if spending else ()
    sections = [*_trends(runs), _runs_table(runs)]
    facts = (("runs", f"{len(runs):,}"), ("numbers", "site.json"))
    return write_sections("All runs", sentence, notices, sections, facts, NOTE, links)


def _runs_table(runs: Sequence[Mapping[str, Any]]) -> Section:
    shown = runs[:MOST_RUNS]
    with_saved = any(each["saved"] is not None for each in shown)
    columns = [
        ("run", False),
        ("began", False),
        ("rows", True),
        ("right (95%)", True),
        ("spent", True),
        ("of", True),
        ("per 1,000", True),
        *([("saved at equal accuracy", True)] if with_saved else []),
        ("ended", False),
    ]
    rows = tuple(tuple(_cells(each, with_saved)) for each in shown)
    links = tuple(str(each["page"]) for each in shown)
    notes = (f"{len(runs) - MOST_RUNS:,} older runs are in site.json.",) if len(runs) > MOST_RUNS else ()
    return Section(
        "runs",
        "Runs",
        LEDGER_ROWS,
        tables=(Table("All runs, the newest first", tuple(columns), rows, links),),
        notes=notes,
    )


def _cells(each: Mapping[str, Any], with_saved: bool) -> list[str]:
    right = share(each["right"], each["graded"]) if each["right"] is not None else None
    return [
        each["name"],
        each["began"][:10] or NONE,
        f"{each['rows']:,}",
        share_text(right),
        usd(each["spent"]),
        usd(each["limit"]),
        per_1000(_per_row(each["spent"], each["rows"])),
        *([less_or_more(each["saved"]) if each["saved"] is not None else NONE] if with_saved else []),
        each["ending"].replace("_", " "),
    ]


def _per_row(spent: int, rows: int) -> float | None:
    return spent / rows if rows else None


class _Week:
    """Sums of the runs of one week."""

    def __init__(self) -> None:
        self.runs = self.rows = self.spent = self.right = self.graded = 0

    def add(self, run: Mapping[str, Any]) -> None:
        self.runs += 1
        self.rows += run["rows"]
        self.spent += run["spent"]
        self.right += run["right"] or 0
        self.graded += run["graded"]

    @property
    def accuracy(self) -> Share | None:
        return share(self.right, self.graded)


def _trends(runs: Sequence[Mapping[str, Any]]) -> list[Section]:
    found: dict[str, _Week] = {}
    for run in runs:
        if run["began"]:
            found.setdefault(week_name(date.fromisoformat(run["began"][:10])), _Week()).add(run)
    title = "Trends by week"
    if not found:
        return [Section("trends", title, LEDGER_ROWS, empty="No run says when it began.")]
    weeks = weeks_between(min(found), max(found))
    rights = [(week, each.accuracy) for week, each in sorted(found.items())]
    right = [WeekValue(week, each.value, each.low, each.high) for week, each in rights if each]
    costs = [
        WeekValue(week, each.spent / each.rows / 1e6) for week, each in sorted(found.items()) if each.rows
    ]
    spent = {(week, "runs"): each.spent for week, each in found.items()}
    words = "; ".join(f"{each.week} {percent(each.value)}" for each in right)
    charts = (
        [points_chart("right", "Right by week", f"Right by week: {words}.", weeks, right, is_money=False)]
        if right
        else []
    )
    words = "; ".join(f"{each.week} {per_1000(each.value * 1e6)}" for each in costs)
    charts += [
        points_chart(
            "cost", "Cost per 1,000 rows by week", f"Cost by week: {words}.", weeks, costs, is_money=True
        ),
        spending_chart("spent", "Spent by week on runs", weeks, spent),
    ]
    rows = tuple(
        (
            week,
            f"{each.runs:,}",
            f"{each.rows:,}",
            share_text(each.accuracy),
            per_1000(_per_row(each.spent, each.rows)),
            usd(each.spent),
        )
        for week, each in sorted(found.items(), reverse=True)
    )
    columns = (
        ("week", False),
        ("runs", True),
        ("rows", True),
        ("right (95%)", True),
        ("per 1,000", True),
        ("spent", True),
    )
    table = Table("Runs by the week in which they began", columns, rows)
    return [Section("trends", title, LEDGER_ROWS, charts=tuple(charts), tables=(table,))]
