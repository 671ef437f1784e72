"""Time windows of limits: per hour, day or month, by the calendar of a time zone or rolling.

Windows are never reset: the spending of a window is the sum of its entries. To read few rows, spending is
summed by bucket. A calendar window is one bucket. A rolling window has sixty, and a bucket counts until all
of it lies outside, so that a rolling limit overestimates spending by at most a sixtieth of the window.

Leaves out where the sums are stored (`store`) and how they limit a call (`rules`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Literal, get_args
from zoneinfo import ZoneInfo

from viaticum.errors import InputError

Every = Literal["hour", "day", "month"]
# Seconds; a rolling month is thirty days.
_SPANS: dict[str, int] = {"hour": 3600, "day": 86_400, "month": 30 * 86_400}
_BUCKETS = 60


@dataclass(frozen=True, slots=True)
class Window:
    """`Window("day", zone="Europe/Berlin")`, `Window("month", rolling=True)`. Raises `InputError`."""

    every: Every
    rolling: bool = False
    zone: str = "UTC"

    def __post_init__(self) -> None:
        if self.every not in get_args(Every):
            raise InputError(f"not a window: {self.every!r}; use hour, day or month")
        _zone(self.zone)

    @classmethod
    def parse(cls, text: str) -> Window:
        """The inverse of `str()`: `day`, `rolling hour`, `month Europe/Berlin`."""
        words = text.split()
        rolling = words[:1] == ["rolling"]
        words = words[rolling:]
        if not 1 <= len(words) <= 2:
            raise InputError(
                f"not a window: {text!r}; write such as 'day', 'rolling hour', 'month Asia/Tokyo'"
            )
        return cls(words[0], rolling, *words[1:])  # type: ignore[arg-type]

    def __str__(self) -> str:
        zone = "" if self.zone == "UTC" else f" {self.zone}"
        return f"{'rolling ' if self.rolling else ''}{self.every}{zone}"

    def bucket(self, moment: datetime) -> int:
        """Start of the bucket that contains `moment`, in seconds of Unix time."""
        if self.rolling:
            length = _SPANS[self.every] // _BUCKETS
            return int(moment.timestamp()) // length * length
        return int(self._calendar_begin(moment).timestamp())

    @property
    def seconds(self) -> int:
        """Its length; of a calendar's month thirty days."""
        return _SPANS[self.every]

    def since(self, moment: datetime) -> int:
        """The earliest bucket that counts at `moment`."""
        if self.rolling:
            return self.bucket(moment - timedelta(seconds=_SPANS[self.every]))
        return self.bucket(moment)

    def _calendar_begin(self, moment: datetime) -> datetime:
        local = moment.astimezone(_zone(self.zone))
        if self.every == "hour":
            # Subtracted in UTC, so that the hour repeated at the end of summer time counts as two hours.
            return moment - timedelta(
                minutes=local.minute, seconds=local.second, microseconds=local.microsecond
            )
        day = local.day if self.every == "day" else 1
        return datetime(local.year, local.month, day, tzinfo=local.tzinfo).astimezone(UTC)


def _zone(name: str) -> tzinfo:
    if name == "UTC":  # needs no time zone data
        return UTC
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError) as error:  # ZoneInfoNotFoundError is a KeyError
        raise InputError(f"unknown time zone {name!r} ({error}); use a name such as Europe/Berlin") from None
