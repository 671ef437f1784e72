"""Find dates in text and write them as YYYY-MM-DD, as YYYY-MM without a day, or as --MM-DD without a year.

Reads ISO dates with or without a time, dates with the month names of common languages, Chinese, Japanese and
Korean dates, and numeric dates: with slashes or hyphens the month comes first (7/4/1999 is July 4th) unless
it cannot be a month or the text's language puts the day first; with dots the day does. A year of two digits
is of this century up to 49. A lone year counts as a number, not a date. Leaves out times of day and relative
dates ("next Monday").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from datetime import date

# One line a month, in lower case without accents: English, German, French, Spanish, Italian, Portuguese,
# Dutch, Polish, Swedish, Turkish, Indonesian, Russian, Ukrainian, Greek.
_NAMES = (
    "january jan januar janner janvier janv enero ene gennaio gen janeiro januari stycznia styczen ocak oca"
    " января январь янв січня ιανουαριου",
    "february feb februar fevrier fevr fev febrero febbraio fevereiro februari lutego luty subat sub pebruari"
    " февраля февраль фев лютого φεβρουαριου",
    "march mar marz mrz mars marzo marco maart mrt marca marzec mart maret марта март мар березня μαρτιου",
    "april apr avril avr abril abr aprile kwietnia kwiecien nisan апреля апрель апр квітня απριλιου",
    "may mai mayo maggio mag maio mei maja maj mayis мая май травня μαιου",
    "june jun juni juin junio giugno giu junho czerwca czerwiec haziran haz июня июнь червня ιουνιου",
    "july jul juli juillet juil julio luglio lug julho lipca lipiec temmuz tem июля июль липня ιουλιου",
    "august aug aout agosto ago augustus sierpnia sierpien augusti agustos agu agustus августа август авг"
    " серпня αυγουστου",
    "september sept sep septembre septiembre settembre set setembro wrzesnia wrzesien eylul eyl сентября"
    " сентябрь сен вересня σεπτεμβριου",
    "october oct oktober okt octobre octubre ottobre ott outubro out pazdziernika pazdziernik ekim eki"
    " октября"
    " октябрь окт жовтня οκτωβριου",
    "november nov novembre noviembre novembro listopada listopad kasim kas ноября ноябрь ноя листопада"
    " νοεμβριου",
    "december dec dezember dez decembre diciembre dic dicembre dezembro grudnia grudzien aralik ara desember"
    " des декабря декабрь дек грудня δεκεμβριου",
)
_MONTHS = {name: month for month, names in enumerate(_NAMES, 1) for name in names.split()}
_MONTH = r"(?P<{0}>" + "|".join(sorted(_MONTHS, key=len, reverse=True)) + r")(?!\w)\.?"
_DAY = r"(?P<{0}>[0-3]?\d)(?:st|nd|rd|th|er|º|ª|o|\.|-го|e)?"
_YEAR = r"(?P<{0}>\d{{4}})(?!\d)"
_OF = r"(?:of\s|de\s|del\s|d')?"
_TIME = r"(?:[t ]\d{2}:\d{2}(?::\d{2}(?:\.\d{1,9})?)?(?:z|[+-]\d{2}:?\d{2})?)?"
_DATE = re.compile(
    r"(?<![\w./-])(?:"
    + r"(?P<iso_year>\d{4})(?P<iso_mark>[-/.])(?P<iso_month>[01]?\d)(?P=iso_mark)(?P<iso_day>[0-3]?\d)(?!\d)"
    + _TIME
    + r"|(?P<first>[0-3]?\d)(?P<mark>[/.-])(?P<second>[0-3]?\d)(?P=mark)"
    + r"(?P<number_year>\d{4}|\d\d)(?![./-]?\d)"
    + r"|(?P<compact>(?:19|20)\d\d[01]\d[0-3]\d)(?!\d)"
    + r"|(?P<cjk_year>\d{4})\s?[年년]\s?(?P<cjk_month>[01]?\d)\s?[月월]"
    + r"(?:\s?(?P<cjk_day>[0-3]?\d)\s?[日号일])?"
    + "|"
    + _MONTH.format("us_month")
    + r"[\s-]?(?:the\s)?(?:"
    + _DAY.format("us_day")
    + r"(?!\d)(?:,?[\s-]?(?:of\s)?"
    + _YEAR.format("us_year")
    + rf")?|,?\s?{_OF}"
    + _YEAR.format("month_year")
    + r")|"
    + _DAY.format("day")
    + rf"[\s-]?{_OF}"
    + _MONTH.format("month")
    + rf"(?:,?[\s-]?{_OF}"
    + _YEAR.format("year")
    + r")?)",
    re.IGNORECASE,
)
_WEEKDAY = re.compile(
    r"^(?:on\s|am\s|le\s|el\s|il\s|den\s)?(?:(?:mon|tues|wednes|thurs|fri|satur|sun|mon|diens|donners|frei"
    r"|sams|sonn)"
    r"(?:day|tag)|mittwoch|(?:lun|mar|mercre|jeu|vendre|same)di|dimanche|lunes|martes|miercoles|jueves"
    r"|viernes|sabado"
    r"|domingo|понедельник|вторник|среда|четверг|пятница|суббота|воскресенье)?,?\s?(?:(?:the|den|le|el"
    r"|der)\s)?",
    re.IGNORECASE,
)
_AFTER = re.compile(r"(?:г|г\.|года|r|年)?")
_PIVOT = 50  # years of two digits below it are of this century


def find_dates(text: str, *, day_first: bool = False) -> Iterator[str]:
    """The dates of a text in order, in canonical form; impossible dates (February 30th) are skipped.

    day_first: 3/5/2021 is the third of May.
    """
    for match in _DATE.finditer(_without_accents(text)):
        written = _write(match, day_first=day_first)
        if written is not None:
            yield written


def whole_date(text: str) -> str | None:
    """The date that a text consists of, up to a weekday and punctuation; None if it says anything else."""
    text = _WEEKDAY.sub("", _without_accents(text[:200]).strip(" \"'`.,;:!*$()"))
    match = _DATE.match(text)
    if match is None or not _AFTER.fullmatch(text[match.end() :].strip()):
        return None
    # Eight digits or two numbers of two digits could be anything else.
    return None if match["compact"] or len(match["number_year"] or "    ") == 2 else _write(match)


def _without_accents(text: str) -> str:
    """One line in plain letters: août as aout; digits of all scripts stay what they are for `int`."""
    text = " ".join(text.split())
    if text.isascii():
        return text
    text = unicodedata.normalize("NFD", text.replace("ı", "i").replace("İ", "i").replace("ł", "l"))
    return unicodedata.normalize("NFC", re.sub("[\u0300-\u0305\u0307\u0308\u030a-\u036f]", "", text))


def _write(match: re.Match[str], *, day_first: bool = False) -> str | None:
    if match["iso_year"]:
        return _canonical(match["iso_year"], match["iso_month"], match["iso_day"])
    if compact := match["compact"]:
        return _canonical(compact[:4], compact[4:6], compact[6:])
    if match["cjk_year"]:
        return _canonical(match["cjk_year"], match["cjk_month"], match["cjk_day"])
    if match["first"]:
        first, second, year = match["first"], match["second"], match["number_year"]
        if len(year) == 2:
            year = f"{20 if int(year) < _PIVOT else 19}{year}"
        day_first = (day_first and int(second) <= 12) or match["mark"] == "." or int(first) > 12
        return _canonical(year, second if day_first else first, first if day_first else second)
    month = str(_MONTHS[(match["us_month"] or match["month"]).lower()])
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
