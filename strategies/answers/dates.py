"""Find dates in text and write them as YYYY-MM-DD, as YYYY-MM without a day, or as --MM-DD without a year.

Reads ISO dates, dates with English month names, and numeric dates: with slashes or hyphens the month comes
first (7/4/1999 is July 4th) unless it cannot be a month, with dots the day does. A lone year counts as a
number, not a date. Leaves out times of day, other languages and relative dates ("next Monday").
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    r"(?P<{0}>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?"
    r"|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
_DAY = r"(?P<{0}>[0-3]?\d)(?:st|nd|rd|th)?"
_YEAR = r"(?P<{0}>\d{{4}})(?!\d)"
_DATE = re.compile(
    r"(?<![\w./-])(?:"
    + r"(?P<iso_year>\d{4})(?P<iso_mark>[-/.])(?P<iso_month>[01]?\d)(?P=iso_mark)(?P<iso_day>[0-3]?\d)(?!\d)"
    + r"|(?P<first>[0-3]?\d)(?P<mark>[/.-])(?P<second>[0-3]?\d)(?P=mark)"
    + _YEAR.format("number_year")
    + "|"
    + _MONTH.format("us_month")
    + r"\s?(?:"
    + _DAY.format("us_day")
    + r"(?!\d)(?:,?\s?"
    + _YEAR.format("us_year")
    + r")?|,?\s?"
    + _YEAR.format("month_year")
    + r")|"
    + _DAY.format("day")
    + r"\s(?:of\s)?"
    + _MONTH.format("month")
    + r"(?:,?\s?"
    + _YEAR.format("year")
    + r")?)",
    re.IGNORECASE,
)
_WEEKDAY = re.compile(
    r"^(?:on\s)?(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s)?(?:the\s)?", re.IGNORECASE
)


def find_dates(text: str) -> Iterator[str]:
    """The dates of a text in order, in canonical form; impossible dates (February 30th) are skipped."""
    for match in _DATE.finditer(" ".join(text.split())):
        written = _write(match)
        if written is not None:
            yield written


def whole_date(text: str) -> str | None:
    """The date that a text consists of, up to a weekday and punctuation; None if it says anything else."""
    text = _WEEKDAY.sub("", " ".join(text.split()).strip(" \"'`.,;:!*$()"))
    match = _DATE.fullmatch(text)
    return None if match is None else _write(match)


def _write(match: re.Match[str]) -> str | None:
    if match["iso_year"]:
        return _canonical(match["iso_year"], match["iso_month"], match["iso_day"])
    if match["first"]:
        first, second, year = match["first"], match["second"], match["number_year"]
        day_first = match["mark"] == "." or int(first) > 12
        return _canonical(year, second if day_first else first, first if day_first else second)
    name = match["us_month"] or match["month"]
    month = str(_MONTHS.index(name[:3].lower()) + 1)
    return _canonical(
        match["us_year"] or match["month_year"] or match["year"], month, match["us_day"] or match["day"]
    )


def _canonical(year: str | None, month: str, day: str | None) -> str | None:
    """None for a day that does not exist. Without a year, February has 29 days."""
    try:
        parsed = date(int(year or 2000), int(month), int(day or 1))
    except ValueError:
        return None
    if day is None:
        return parsed.isoformat()[:7]
    return parsed.isoformat() if year else f"--{parsed.month:02}-{parsed.day:02}"
