"""Windows of time: where they begin, in time zones and through the changes of clocks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viaticum.budgets import Window
from viaticum.errors import InputError


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("window", "moment", "begins"),
    [
        (Window("hour"), "2026-03-10T12:34:56.789", "2026-03-10T12:00"),
        (Window("day"), "2026-03-10T23:59:59", "2026-03-10T00:00"),
        (Window("month"), "2026-02-28T12:00", "2026-02-01T00:00"),
        (Window("day", zone="Europe/Berlin"), "2026-03-10T22:59", "2026-03-09T23:00"),
        (Window("day", zone="Europe/Berlin"), "2026-03-10T23:00", "2026-03-10T23:00"),
        (Window("month", zone="Asia/Kathmandu"), "2026-03-01T00:00", "2026-02-28T18:15"),
        (Window("hour", zone="Asia/Kathmandu"), "2026-03-01T00:10", "2026-02-28T23:15"),
        # Clocks go forward on 29 March (a day of 23 hours) and back on 25 October (one of 25).
        (Window("day", zone="Europe/Berlin"), "2026-03-29T21:30", "2026-03-28T23:00"),
        (Window("day", zone="Europe/Berlin"), "2026-03-29T22:00", "2026-03-29T22:00"),
        (Window("day", zone="Europe/Berlin"), "2026-10-25T22:30", "2026-10-24T22:00"),
        (Window("hour", zone="Europe/Berlin"), "2026-10-25T00:30", "2026-10-25T00:00"),
        (Window("hour", zone="Europe/Berlin"), "2026-10-25T01:30", "2026-10-25T01:00"),
        # In Havana clocks go forward at midnight: the day begins at one o'clock.
        (Window("day", zone="America/Havana"), "2026-03-08T12:00", "2026-03-08T05:00"),
    ],
)
def test_where_a_calendar_window_begins(window: Window, moment: str, begins: str) -> None:
    assert window.bucket(at(moment)) == window.since(at(moment)) == at(begins).timestamp()


@pytest.mark.parametrize(("every", "hours"), [("hour", 1), ("day", 24), ("month", 720)])
def test_a_rolling_window_is_never_shorter_and_a_sixtieth_longer_at_most(every: str, hours: int) -> None:
    window = Window(every, rolling=True)  # type: ignore[arg-type]
    span = timedelta(hours=hours)
    for minute in range(0, 120, 7):
        now = at("2026-03-10T12:00") + timedelta(minutes=minute)
        assert window.since(now) <= (now - span).timestamp() < window.since(now) + span.total_seconds() / 60


windows = st.builds(
    Window,
    st.sampled_from(["hour", "day", "month"]),
    st.booleans(),
    st.sampled_from(["UTC", "Europe/Berlin", "America/Havana", "Asia/Kathmandu", "Australia/Lord_Howe"]),
)
moments = st.datetimes(datetime(2026, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))


@given(windows, moments, st.timedeltas(timedelta(0), timedelta(days=40)))
def test_buckets_never_go_back(window: Window, moment: datetime, later: timedelta) -> None:
    assert window.bucket(moment) <= moment.timestamp()
    assert window.bucket(moment) <= window.bucket(moment + later)
    assert window.since(moment) <= window.since(moment + later)
    assert window.bucket(datetime.fromtimestamp(window.bucket(moment), UTC)) == window.bucket(moment)


@given(windows)
def test_text_and_back(window: Window) -> None:
    assert Window.parse(str(window)) == window


@pytest.mark.parametrize("text", ["", "week", "day Mars/Base", "rolling", "day UTC UTC", "day ../etc/passwd"])
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"window|time zone"):
        Window.parse(text)
