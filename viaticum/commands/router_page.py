"""The page of `viaticum router evaluate --page`, in the form of all reports: a chart and its figures.

Leaves out the figures themselves (`viaticum.routers.query.evaluate`) and how a page is made
(`viaticum.reports.page`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from viaticum.files import atomic_write
from viaticum.money import NANOUSD_PER_USD, short_usd
from viaticum.outcomes import accuracy_interval


def write_evaluation_page(path: Path, name: str, result: Mapping[str, Any]) -> None:
    """Write the page of a router.

    Args:
        path: the HTML file.
        name: of the router.
        result: of `viaticum.routers.query.evaluate.evaluate`.

    Raises:
        MissingExtra: the extra `reports` is not installed.
        InputError: the file cannot be written.
    """
    from viaticum.reports.cost_accuracy_chart import router_chart
    from viaticum.reports.formatting import percent, signed
    from viaticum.reports.frontier import Point
    from viaticum.reports.page import write_sections
    from viaticum.reports.sections import TABLE, Section, Table

    questions = result["questions"]

    def point(title: str, figures: Mapping[str, float]) -> Point:
        accuracy = figures["accuracy"]
        interval = accuracy_interval(round(accuracy * questions), questions)
        return Point(title, figures["cost"] * NANOUSD_PER_USD, accuracy, *interval)

    def points(gap: Mapping[str, float | None]) -> str:
        if gap["difference"] is None:
            return "–"
        low, middle, high = (signed(100 * float(gap[each] or 0)) for each in ("low", "difference", "high"))
        return f"{middle} ({low} to {high})"

    middle = result["curve"][len(result["curve"]) // 2]
    singles = [point(each["pair"], each) for each in result["pairs"]]
    chart = router_chart(point("router", middle), _frontier(result["sweep"], Point), singles)
    rows = [
        (
            _dollars(curve["budget"]),
            percent(curve["accuracy"]),
            _dollars(curve["cost"]),
            "–" if hull["accuracy"] is None else percent(hull["accuracy"]),
            points(gap),
        )
        for curve, hull, gap in zip(result["curve"], result["hull"], result["curve_minus_hull"], strict=True)
    ]
    columns = ("a question", "router", "spent", "best mixture", "router - mixture, 95%")
    table = Table(
        f"By budget, on {questions:,} questions", tuple((each, True) for each in columns), tuple(rows)
    )
    area, best = result["area"], result["best_single"]
    sentence = (
        f"Over all budgets from {_dollars(area['from'])} to {_dollars(area['to'])} a question, each "
        f"factor of cost alike, the router is right on {percent(area['router'])}, the best mixtures of "
        f"single pairs on {percent(area['pairs'])}: {points(area)} points."
    )
    notices = []
    if result["learned_from"]:
        notices.append(
            f"The router was fitted on {result['learned_from']:,} of these questions: its figures "
            "promise too much."
        )
    notes = [
        f"The best single pair is {best['pair']}, {percent(best['accuracy'])} at {_dollars(best['cost'])}.",
        "The square is the router at the middle budget, planned by predictions alone; mixtures and the "
        "dashed curve are chosen in hindsight, on the same questions.",
    ]
    section = Section(
        "router", "Accuracy by cost", TABLE, charts=(chart,), tables=(table,), notes=tuple(notes)
    )
    facts = (("Router", name), ("Questions", f"{questions:,}"))
    atomic_write(path, write_sections(f"{name}: a router evaluated", sentence, notices, [section], facts))


def _frontier(swept: Sequence[Mapping[str, float]], kind: Any) -> list[Any]:
    """Operating points that are more accurate than every cheaper one, the cheapest first."""
    found: list[Mapping[str, float]] = []
    for each in sorted(swept, key=lambda each: (each["cost"], -each["accuracy"])):
        if not found or each["accuracy"] > found[-1]["accuracy"]:
            found.append(each)
    return [kind("", each["cost"] * NANOUSD_PER_USD, each["accuracy"]) for each in found]


def _dollars(amount: float) -> str:
    return short_usd(round(amount * NANOUSD_PER_USD))
