"""Dates in text: find them, and write them as YYYY-MM-DD, YYYY-MM where the day is missing, or --MM-DD without a year.

Read are ISO dates, dates with the month's English name, and numeric dates: with slashes or hyphens the month comes
first (7/4/1999 is July 4th) unless it cannot be one, with dots the day does. A lone year is a number and no date here.
Times of day, other languages and relative dates ("next Monday") are left out.
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
    """The dates of a text in order, in canonical form; those of no calendar (February 30th) are left out."""
    for match in _DATE.finditer(" ".join(text.split())):
        written = _write(match)
        if written is not None:
            yield written


def whole_date(text: str) -> str | None:
    """The date that a text is, give or take a weekday and punctuation; None where it says anything else."""
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
    """None where no calendar has that day. Without a year, February has 29 days."""
    try:
        there = date(int(year or 2000), int(month), int(day or 1))
    except ValueError:
        return None
    if day is None:
        return there.isoformat()[:7]
    return there.isoformat() if year else f"--{there.month:02}-{there.day:02}"
