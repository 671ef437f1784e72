"""Numbers as people read them: shares with intervals, money, seconds, and the verdict in one sentence."""

from __future__ import annotations

import re

from viaticum.money import short_usd
from viaticum.reports.frontier import CostAccuracyPlane, Point
from viaticum.reports.intervals import Estimate, Share
from viaticum.reports.numbers import RunNumbers
from viaticum.reports.run_metrics import RouteMetrics

NONE = "–"
SHORT = 14  # letters of a cell that stays on one line, such as `2.8 / 8.1 s`
_DATE = re.compile(r"\b\d{4}-\d\d-\d\d\b")
_INTERVAL = re.compile(r"\([^()]*\)$")


def percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:.{digits}%}"


def share_text(share: Share | None, digits: int = 0) -> str:
    """A share with its interval, such as `61.2% (57% to 65%)`."""
    if share is None:
        return NONE
    return f"{percent(share.value)} ({share.low:.{digits}%} to {share.high:.{digits}%})"


def points(estimate: Estimate | None) -> str:
    """A difference of shares in percentage points, signed."""
    if estimate is None:
        return NONE
    return (
        f"{signed(100 * estimate.value)} points ({signed(100 * estimate.low)} to"
        f" {signed(100 * estimate.high)})"
    )


def signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def usd(amount: float | None) -> str:
    return NONE if amount is None else short_usd(amount).replace("-", "−")


def per_1000(cost: float | None) -> str:
    """Nano-dollars a question as dollars per 1,000 questions."""
    return NONE if cost is None else usd(cost * 1000)


def signed_usd(amount: float) -> str:
    return f"{'+' if amount > 0 else ''}{usd(amount)}"


def seconds(value: float | None) -> str:
    if value is None:
        return NONE
    return (
        f"{1000 * value:.1f} ms"
        if value < 0.1
        else f"{value:.1f} s"
        if value < 100
        else f"{value / 60:.1f} min"
    )


def span(value: float) -> str:
    """How long something took."""
    hours, rest = divmod(round(value), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s" if minutes else f"{left} s"


def count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def verdict(numbers: RunNumbers) -> str:
    """Accuracy and spend of all graded rows; what was saved at equal accuracy, of those that the table knows.

    Every figure names its rows; where the table knows but a part of them, their own accuracy is given too.
    """
    if numbers.run.single and numbers.plane is not None:
        return _verdict_of_table(numbers)
    if "rows" in numbers.missing:
        return f"Nothing to judge yet: {numbers.missing['rows']}."
    spent = usd(numbers.spent)
    limit = (
        numbers.history.limit
        if numbers.history
        else numbers.run.job.limit_nanousd
        if numbers.run.job
        else None
    )
    money = f"{spent} of {usd(limit)}" if limit else spent
    if numbers.accuracy is None:
        return (
            f"{count(numbers.tally.answered, 'question')} answered for {money}; how many are right is not"
            f" known, because {numbers.missing['accuracy'].partition(';')[0]}."
        )
    right = (
        f"{percent(numbers.accuracy.value)} of {count(numbers.accuracy.of, 'question')} right"
        f" ({percent(numbers.accuracy.low)} to {percent(numbers.accuracy.high)}) for {money}"
    )
    plane = numbers.plane
    if plane is None:
        return f"{right}."
    if plane.saved is None or plane.more_right is None:
        table = plane.table.rpartition("/")[2]
        return f"{right}; what was saved is not known, because {table} is about other questions."
    if plane.of == numbers.accuracy.of:
        return f"{right}: {_saved(plane)}{_seen(plane)}."
    here = plane.run
    part = "" if here is None else f"{percent(here.accuracy)} right ({_interval(here)}), "
    known = f"On the {plane.of:,} of them that the outcome table knows"
    return f"{right}. {known}: {part}{_saved(plane)}{_seen(plane)}."


def _interval(point: Point) -> str:
    return f"{percent(point.low)} to {percent(point.high)}"


def _seen(plane: CostAccuracyPlane) -> str:
    """Whether the router was fitted on the questions that it is judged by."""
    if not plane.seen:
        return ""
    which = "these" if plane.seen == plane.of else f"{plane.seen:,} of these"
    return f"; the router was fitted on {which} {plane.of:,} questions, so that new ones may go worse"


def saved_short(numbers: RunNumbers) -> tuple[str, str]:
    """What was saved and against what, for a tile; dashes where it is not known."""
    plane = numbers.plane
    if plane is None or plane.saved is None:
        about = (
            "no outcome table of these questions" if plane is None else "the table is about other questions"
        )
        return NONE, f"not known: {about}"
    what = (
        f"always {plane.saved.name}"
        if plane.saved.reference == "best single pair"
        else "the cheapest equally accurate mix"
    )
    return less_or_more(
        plane.saved.share.value
    ), f"than {what} ({_range(plane.saved.share)}), on {count(plane.of, 'question')}"


def less_or_more(saved: float) -> str:
    """A fraction that was saved, as `12% less` or `3% more`; from twice as dear on, as times."""
    return (
        f"{saved:.0%} less"
        if saved >= 0
        else f"{-saved:.0%} more"
        if saved > -1
        else f"{1 - saved:.1f} times as much"
    )


def _saved(plane: CostAccuracyPlane) -> str:
    assert plane.saved is not None
    share, best = plane.saved.share, plane.best
    clear = "" if share.low > 0 or share.high < 0 else "no clear saving, "
    joint = "as" if share.value <= -1 else "than"
    how = f"{clear}{less_or_more(share.value)} ({_range(share)}) {joint}"
    always = f"always asking {best.name}, the best single pair"
    if plane.saved.reference == "best single pair":
        return f"{how} {always}, which gets {percent(best.accuracy)}"
    dearer = (
        f" at {best.cost / plane.run.cost:.1f} times the cost"
        if plane.run is not None and plane.run.cost
        else ""
    )
    return (
        f"{how} the cheapest equally accurate mix of single pairs; {always}, gets"
        f" {percent(best.accuracy)}{dearer}"
    )


def _range(saved: Estimate) -> str:
    """From the least that was saved to the most; what went the other way says so."""
    low, high = less_or_more(saved.low), less_or_more(saved.high)
    if low.rpartition(" ")[2] == high.rpartition(" ")[2]:
        low = low.rpartition(" ")[0]
        return f"{low} to {high.rpartition(' ')[0]}" if not low.endswith("as") else f"{low} much to {high}"
    return f"{low} to {high}"


def _verdict_of_table(numbers: RunNumbers) -> str:
    plane = numbers.plane
    assert plane is not None
    best, low, high = plane.best, plane.best.low or 0.0, plane.best.high or 1.0
    return (
        f"Of {len(plane.singles)} pairs on {plane.of:,} questions the best is {best.name}:"
        f" {percent(best.accuracy)} right ({percent(low)} to {percent(high)}) at {per_1000(best.cost)} per"
        f" 1,000 questions; an oracle gets {percent(plane.oracle.accuracy)} at {per_1000(plane.oracle.cost)}."
    )


def times(metrics: RouteMetrics | None) -> str:
    """Seconds of a row, half of them and 95 of 100 stay under."""
    if metrics is None or metrics.seconds_p50 is None or metrics.seconds_p95 is None:
        return NONE
    if 0.1 <= metrics.seconds_p95 < 100:
        return f"{metrics.seconds_p50:.1f} / {metrics.seconds_p95:.1f} s"
    return f"{seconds(metrics.seconds_p50)} / {seconds(metrics.seconds_p95)}"


def sentence(text: str) -> str:
    """A reason as a sentence of its own."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!")) or not text else ".")


def unbroken(cell: str) -> str:
    """A number that breaks before its interval alone, if it is not short, and never after a minus; a date."""
    if len(cell) <= SHORT and cell[:1].isdigit() and not _DATE.search(cell):
        return cell.replace(" ", "\N{NO-BREAK SPACE}")
    kept = _INTERVAL.sub(lambda interval: interval[0].replace(" ", "\N{NO-BREAK SPACE}"), cell)
    kept = _DATE.sub(lambda day: day[0].replace("-", "-\N{WORD JOINER}"), kept)
    return kept.replace("−", "−\N{WORD JOINER}")
