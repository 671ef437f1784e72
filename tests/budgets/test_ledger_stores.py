"""The conformance suite of the ledger stores: it runs on memory, SQLite and Postgres."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from ledger_calls import CALL, PRICES, USED, Clock

from viaticum.budgets import Budget, Ledger, Window
from viaticum.errors import (
    BudgetClosed,
    BudgetError,
    BudgetExceeded,
    HoldError,
    InputError,
    LedgerError,
    UnknownName,
    UnknownPrice,
)
from viaticum.money import MAX_NANOUSD, Price, Tier
from viaticum.types import TokenCount


def tree(ledger: Ledger, **limits: int) -> None:
    """org > project > run > thread, each with the limit given for it in nano-dollars."""
    parent = None
    for name in ("org", "project", "run", "thread"):
        ledger.create(name, limit_nanousd=limits.get(name), parent=parent)
        parent = name


def spent(ledger: Ledger) -> list[tuple[int, int]]:
    return [(budget.posted_nanousd, budget.held_nanousd) for budget in ledger.lineage("thread")]


# Scopes


def test_a_call_counts_in_its_scope_and_in_all_above(ledger: Ledger) -> None:
    tree(ledger, org=1000)
    assert [budget.name for budget in ledger.lineage("thread")] == ["org", "project", "run", "thread"]
    ledger.reserve("thread", "a", CALL, PRICES)
    assert spent(ledger) == [(0, 70)] * 4
    ledger.settle("a", USED)
    assert spent(ledger) == [(25, 0)] * 4
    ledger.reserve("project", "b", CALL, PRICES)
    assert spent(ledger) == [(25, 70), (25, 70), (25, 0), (25, 0)]
    ledger.void("b")
    assert spent(ledger) == [(25, 0)] * 4


def test_new_posts_are_those_after_the_heads_of_before(ledger: Ledger) -> None:
    ledger.create("org", limit_nanousd=10_000)
    ledger.create("run", parent="org")
    ledger.create("empty", limit_nanousd=10_000)

    def new(heads: dict[str, tuple[int, str]]) -> tuple[list[str | None], dict[str, tuple[int, str]] | None]:
        found: list[str | None] = []
        now = ledger.each_new_post(lambda entry: found.append(entry.key), heads)
        assert now is None or now == ledger.chain_heads()
        return found, now

    before = ledger.chain_heads()
    assert new({}) == ([], before)
    for key, budget in (("a", "run"), ("b", "org"), ("c", "empty"), ("d", "run")):
        ledger.reserve(budget, key, CALL, PRICES)
        ledger.settle(key, USED) if key != "d" else ledger.void(key)
    found, now = new(before)
    assert sorted(map(str, found)) == sorted(map(str, new({})[0])) == ["a", "b", "c"]
    assert now is not None
    assert new(now) == ([], now)
    ledger.create("later", limit_nanousd=10_000)
    ledger.reserve("later", "e", CALL, PRICES)
    ledger.settle("e", USED)
    assert new(now)[0] == ["e"]
    number, last = now["org"]
    for wrong in ((number, "0" * len(last)), (number + 100, last)):
        assert new(now | {"org": wrong}) == ([], None)
    assert new(now | {"gone": (1, last)}) == ([], None)


def test_posts_and_times_are_told_by_scope(ledger: Ledger, clock: Clock) -> None:
    ledger.create("org", limit_nanousd=10_000)
    ledger.create("run", parent="org")
    ledger.create("other", limit_nanousd=10_000)
    for key, budget in (("a", "run"), ("b", "org"), ("c", "other"), ("d", "run")):
        clock.wait(days=1)
        ledger.reserve(budget, key, CALL, PRICES)
        ledger.settle(key, USED) if key != "d" else ledger.void(key)

    def posts(budget: str | None = None, since: str = "") -> list[str | None]:
        found: list[str | None] = []
        ledger.each_post(lambda entry: found.append(entry.key), budget, since)
        return found

    assert sorted(map(str, posts())) == ["a", "b", "c"]
    assert posts("org") == ["a", "b"]
    assert posts("run") == ["a"]
    assert posts("org", "2026-03-12T12:00:00.000000+00:00") == ["b"]
    kinds = list[tuple[str, str | None]]()
    ledger.each_entry(lambda entry: kinds.append((entry.kind, entry.key)), "run", kinds=("void", "post"))
    assert kinds == [("post", "a"), ("void", "d")]
    kinds.clear()
    ledger.each_entry(lambda entry: kinds.append((entry.kind, entry.budget)), kinds=("limit",))
    assert sorted(kinds) == [("limit", "org"), ("limit", "other"), ("limit", "run")]
    assert {name: (first[:10], last[:10]) for name, (first, last) in ledger.times().items()} == {
        "org": ("2026-03-10", "2026-03-14"),
        "run": ("2026-03-10", "2026-03-14"),
        "other": ("2026-03-10", "2026-03-13"),
    }
    with pytest.raises(UnknownName):
        posts("orgg")


@pytest.mark.parametrize("short", ["org", "project", "run", "thread"])
def test_a_call_that_one_scope_has_no_room_for_counts_in_none(ledger: Ledger, short: str) -> None:
    tree(ledger, **{"org": 10_000, short: 100})
    ledger.reserve("thread", "a", CALL, PRICES)
    with pytest.raises(BudgetExceeded) as refused:
        ledger.reserve("thread", "b", CALL, PRICES)
    assert (refused.value.budget, refused.value.needed, refused.value.left) == (short, 70, 30)
    assert spent(ledger) == [(0, 70)] * 4
    assert ledger.hold("b") is None


def test_siblings_share_what_their_parent_has(ledger: Ledger) -> None:
    ledger.create("org", limit_nanousd=100)
    for name in ("left", "right"):
        ledger.create(name, parent="org", limit_nanousd=100)
    ledger.reserve("left", "a", CALL, PRICES)
    with pytest.raises(BudgetExceeded, match="'org' has"):
        ledger.reserve("right", "b", CALL, PRICES)
    assert ledger.budget("right").left_nanousd == 100


def test_dollars_and_tokens_are_limits_apart(ledger: Ledger) -> None:
    ledger.create("org", limit_nanousd=140)
    ledger.create("run", parent="org", limit_tokens=59)
    ledger.reserve("run", "a", CALL, PRICES)
    with pytest.raises(BudgetExceeded, match="29 tokens left"):
        ledger.reserve("run", "b", CALL, PRICES)


def test_a_scope_keeps_its_terms(ledger: Ledger) -> None:
    tree(ledger, org=1000, run=50)
    assert ledger.create("run", parent="project", limit_nanousd=50).name == "run"
    others: list[Callable[[], object]] = [
        lambda: ledger.create("run", parent="org", limit_nanousd=50),
        lambda: ledger.create("run", parent="project", limit_nanousd=51),
        lambda: ledger.create("run", parent="project", limit_nanousd=50, window=Window("day")),
    ]
    for other in others:
        with pytest.raises(BudgetError, match="'run' exists with"):
            other()
    with pytest.raises(UnknownName, match="did you mean 'project'"):
        ledger.create("new", parent="projct")
    with pytest.raises(InputError, match="no limit"):
        ledger.create("root")


def test_pausing_and_closing_are_entries_and_bind_what_is_below(ledger: Ledger) -> None:
    tree(ledger, org=1000)
    ledger.reserve("thread", "a", CALL, PRICES)
    assert ledger.pause("project", "lunch").state == "paused"
    ledger.pause("project")  # once is enough
    with pytest.raises(BudgetClosed, match="'project' is paused; resume it"):
        ledger.reserve("thread", "b", CALL, PRICES)
    ledger.settle("a", USED)  # what was held may still be paid
    assert ledger.resume("project").state == "open"
    ledger.reserve("thread", "b", CALL, PRICES)
    ledger.close_budget("project")
    for call in (
        lambda: ledger.reserve("thread", "c", CALL, PRICES),
        lambda: ledger.resume("project"),
        lambda: ledger.create("below", parent="run"),
    ):
        with pytest.raises(BudgetClosed, match="closed"):
            call()
    ledger.void("b")
    changes = [(entry.kind, entry.note) for entry in ledger.entries("project")]
    assert changes[1:] == [("pause", {"reason": "lunch"}), ("resume", {}), ("close", {})]


def test_64_bits_are_a_limit_even_where_a_window_starts_anew(ledger: Ledger, clock: Clock) -> None:
    ledger.create("org", limit_nanousd=MAX_NANOUSD, window=Window("hour"))
    huge = {"small": TokenCount(MAX_NANOUSD // 2, 0)}
    ledger.reserve("org", "a", huge, PRICES)
    ledger.settle("a", huge)
    clock.wait(hours=2)
    ledger.reserve("org", "b", huge, PRICES)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("org", "c", CALL, PRICES)


# Windows


def test_a_calendar_window_starts_anew_by_itself(ledger: Ledger, clock: Clock) -> None:
    ledger.create("org", limit_nanousd=100, window=Window("day", zone="Europe/Berlin"))
    clock.set("2026-03-10T22:00:00")  # 23:00 in Berlin
    ledger.reserve("org", "a", CALL, PRICES)
    ledger.settle("a", CALL)
    with pytest.raises(BudgetExceeded, match=r"left \(per day Europe/Berlin\)"):
        ledger.reserve("org", "b", CALL, PRICES)
    clock.set("2026-03-10T23:00:00")
    ledger.reserve("org", "b", CALL, PRICES)
    budget = ledger.budget("org")
    assert (budget.posted_nanousd, budget.held_nanousd, budget.earlier_nanousd) == (0, 70, 70)


def test_a_hold_counts_in_the_window_it_is_open_in_and_in_the_one_it_ends_in(
    ledger: Ledger, clock: Clock
) -> None:
    ledger.create("org", limit_nanousd=100, window=Window("hour"))
    clock.set("2026-03-10T12:59:59")
    ledger.reserve("org", "a", CALL, PRICES)
    clock.set("2026-03-10T13:00:01")
    with pytest.raises(BudgetExceeded):
        ledger.reserve("org", "b", CALL, PRICES)
    ledger.settle("a", CALL)
    assert ledger.budget("org").posted_nanousd == 70


def test_a_rolling_window_frees_what_is_older(ledger: Ledger, clock: Clock) -> None:
    ledger.create("org", limit_nanousd=100, window=Window("hour", rolling=True))
    ledger.reserve("org", "a", CALL, PRICES)
    ledger.settle("a", CALL)
    for minutes in (30, 29.9):
        clock.wait(minutes=minutes)
        with pytest.raises(BudgetExceeded):
            ledger.reserve("org", "b", CALL, PRICES)
    clock.wait(minutes=1.2)  # a sixtieth late at most
    ledger.reserve("org", "b", CALL, PRICES)


def test_windows_and_limits_hold_together_in_nested_scopes(ledger: Ledger, clock: Clock) -> None:
    ledger.create("month", limit_nanousd=150, window=Window("month"))
    ledger.create("day", parent="month", limit_nanousd=75, window=Window("day"))
    ledger.create("thread", parent="day", limit_tokens=1000)
    for day in (10, 11):
        clock.set(f"2026-03-{day}T08:00:00")
        ledger.reserve("thread", f"{day}", CALL, PRICES)
        ledger.settle(f"{day}", CALL)
        with pytest.raises(BudgetExceeded, match="'day' has"):
            ledger.reserve("thread", f"{day} again", CALL, PRICES)
    clock.set("2026-03-12T08:00:00")
    with pytest.raises(BudgetExceeded, match="'month' has"):
        ledger.reserve("thread", "12", CALL, PRICES)
    clock.set("2026-04-01T00:00:00")
    ledger.reserve("thread", "April", CALL, PRICES)


def test_a_new_window_is_filled_from_the_entries_below(ledger: Ledger, clock: Clock) -> None:
    tree(ledger, org=1000)
    for number in range(3):
        ledger.reserve("thread", f"{number}", CALL, PRICES)
        ledger.settle(f"{number}", CALL)
        clock.wait(hours=5)  # 12, 17 and 22 o'clock; it is 3 now
    with pytest.raises(BudgetError, match="above the new limit"):
        ledger.set_limit("project", limit_nanousd=139, window=Window("day", rolling=True))
    assert ledger.set_limit("project", limit_nanousd=5, window=Window("day")).posted_nanousd == 0
    rolling = ledger.set_limit("project", limit_nanousd=300, window=Window("day", rolling=True))
    assert (rolling.posted_nanousd, rolling.earlier_nanousd) == (210, 0)
    assert ledger.check() == []
    assert ledger.set_limit("project", window=None).posted_nanousd == 210


def test_a_clock_that_is_set_back_neither_reopens_a_window_nor_unsorts_entries(
    ledger: Ledger, clock: Clock
) -> None:
    ledger.create("org", limit_nanousd=100, window=Window("hour"))
    ledger.reserve("org", "a", CALL, PRICES)
    ledger.settle("a", CALL)
    clock.wait(hours=-3)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("org", "b", CALL, PRICES)
    ledger.create("new", parent="org")
    times = [entry.at for entry in ledger.entries()]
    assert times == sorted(times)


# States


def test_a_call_goes_from_reserved_over_dispatched_to_posted(ledger: Ledger) -> None:
    ledger.create("org", limit_nanousd=100)
    assert ledger.reserve("org", "a", CALL, PRICES).state == "reserved"
    assert ledger.dispatch("a").state == "dispatched"
    assert ledger.dispatch("a") == ledger.hold("a")
    ledger.settle("a", USED)
    assert [entry.kind for entry in ledger.entries(key="a")] == ["reserve", "dispatch", "post"]
    with pytest.raises(HoldError, match="posted"):
        ledger.dispatch("a")


def test_a_call_that_is_sent_at_once_is_reserved_and_dispatched_in_one_write(
    ledger: Ledger, clock: Clock
) -> None:
    ledger.create("demo", limit_nanousd=100)
    hold = ledger.reserve("demo", "a", CALL, PRICES, dispatch=True)
    assert hold.state == "dispatched"
    assert ledger.reserve("demo", "a", CALL, PRICES, dispatch=True) == hold == ledger.hold("a")
    assert [entry.kind for entry in ledger.entries(key="a")] == ["reserve", "dispatch"]
    with pytest.raises(BudgetExceeded):
        ledger.reserve("demo", "b", CALL, PRICES, dispatch=True)
    assert ledger.hold("b") is None
    clock.wait(seconds=10**6)
    ledger.expire_leases()
    assert [held.state for held in ledger.holds()] == ["unknown"], "it may have been sent"
    ledger.void("a")
    kept = ledger.reserve("demo", "c", CALL, PRICES)
    assert ledger.reserve("demo", "c", CALL, PRICES, dispatch=True) == kept, (
        "a hold that is there stays as it is"
    )


def test_a_crash_before_dispatch_frees_the_hold(ledger: Ledger, clock: Clock) -> None:
    ledger.create("org", limit_nanousd=100)
    ledger.reserve("org", "a", CALL, PRICES, lease=60)
    clock.wait(seconds=59)
    assert ledger.expire_leases() == []
    clock.wait(seconds=2)
    assert [(entry.kind, entry.key, entry.nanousd) for entry in ledger.expire_leases()] == [
        ("expire", "a", 70)
    ]
    assert ledger.expire_leases() == []
    assert ledger.budget("org").left_nanousd == 100
    for call in (lambda: ledger.dispatch("a"), lambda: ledger.settle("a", USED), lambda: ledger.void("a")):
        with pytest.raises(HoldError, match="expired before it was dispatched"):
            call()


def test_room_that_a_crashed_call_holds_is_found_when_it_is_needed(ledger: Ledger, clock: Clock) -> None:
    tree(ledger, org=100)
    ledger.reserve("thread", "a", CALL, PRICES, lease=60)
    clock.wait(seconds=61)
    ledger.reserve("run", "b", CALL, PRICES)
    assert ledger.hold("a").state == "expired"  # type: ignore[union-attr]
    assert spent(ledger) == [(0, 70), (0, 70), (0, 70), (0, 0)]


def test_what_expired_stays_expired_where_there_is_still_no_room(ledger: Ledger, clock: Clock) -> None:
    ledger.create("org", limit_nanousd=150)
    ledger.reserve("org", "a", CALL, PRICES, lease=60)
    ledger.reserve("org", "b", CALL, PRICES)
    clock.wait(seconds=61)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("org", "c", {"small": TokenCount(100, 0)}, PRICES)
    assert ledger.budget("org").held_nanousd == 70


def test_a_crash_after_dispatch_stays_charged_as_unknown_until_reconciled(
    ledger: Ledger, clock: Clock
) -> None:
    ledger.create("org", limit_nanousd=1000)
    for key in ("paid", "free", "lost"):
        ledger.reserve("org", key, CALL, PRICES, lease=60)
        clock.wait(seconds=50)
        ledger.dispatch(key)  # the lease begins anew
    clock.wait(seconds=61)
    assert [entry.kind for entry in ledger.expire_leases()] == ["unknown"] * 3
    assert [hold.key for hold in ledger.holds(state="unknown")] == ["paid", "free", "lost"]
    assert ledger.budget("org").held_nanousd == 210
    with pytest.raises(HoldError, match="further try reserves under a new key"):
        ledger.dispatch("paid")
    assert ledger.settle("paid", USED).note["was"] == "unknown"
    ledger.void("free")
    assert ledger.settle("lost", None).nanousd == 70
    budget = ledger.budget("org")
    assert (budget.posted_nanousd, budget.held_nanousd) == (95, 0)
    assert ledger.holds(state="unknown") == []


def test_a_result_without_a_dispatch_is_a_call_that_was_made(ledger: Ledger, clock: Clock) -> None:
    ledger.create("org", limit_nanousd=100)
    ledger.reserve("org", "a", CALL, PRICES, lease=60)
    ledger.attach("a", "1")
    clock.wait(seconds=61)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("org", "b", CALL, PRICES)
    assert [entry.kind for entry in ledger.expire_leases()] == ["unknown"]


@pytest.mark.parametrize("lease", [0, -1, 1.5, True, 10**12])
def test_a_lease_is_whole_seconds(ledger: Ledger, lease: int) -> None:
    ledger.create("org", limit_nanousd=100)
    with pytest.raises(InputError, match="lease"):
        ledger.reserve("org", "a", CALL, PRICES, lease=lease)


def test_a_stream_that_ends_early_settles_at_the_larger_count(ledger: Ledger) -> None:
    ledger.create("org", limit_nanousd=1000)
    counts = {"small": TokenCount(10, 9)}
    for key, reported in (("less", TokenCount(10, 4)), ("more", TokenCount(8, 12))):
        ledger.reserve("org", key, CALL, PRICES)
        ledger.settle(key, {"small": reported}, counted=counts)
    ledger.reserve("org", "missing", CALL, PRICES)
    ledger.settle("missing", None, counted=counts)
    used = [(entry.usage["small"], entry.note["usage"]) for entry in ledger.entries() if entry.kind == "post"]
    assert used == [
        (TokenCount(10, 9), "larger"),
        (TokenCount(10, 12), "larger"),
        (TokenCount(10, 20), "missing"),
    ]
    assert ledger.settle("missing", None, counted=counts).nanousd == 70


def test_usage_of_zero_is_not_usage_missing(ledger: Ledger) -> None:
    ledger.create("org", limit_nanousd=1000)
    for key in ("zero", "missing"):
        ledger.reserve("org", key, CALL, PRICES)
    assert ledger.settle("zero", {"small": TokenCount()}).nanousd == 0
    assert ledger.settle("missing", None).nanousd == 70


def test_an_overrun_is_posted_and_marked_in_both_units(ledger: Ledger) -> None:
    tree(ledger, org=100)
    ledger.reserve("thread", "a", CALL, PRICES)
    entry = ledger.settle("a", {"small": TokenCount(10, 40)})
    assert (entry.nanousd, entry.overrun, entry.note["overrun_tokens"]) == (130, 60, 20)
    assert ledger.budget("org").left_nanousd == -30
    with pytest.raises(BudgetExceeded):
        ledger.reserve("thread", "b", {"small": TokenCount(0, 0)}, PRICES)


# Idempotency


def test_a_key_stands_for_a_call_and_its_parameters(ledger: Ledger) -> None:
    ledger.create("org", limit_nanousd=100)
    asked = {"messages": [{"role": "user", "content": "17 * 23?"}], "temperature": 0.0}
    ledger.reserve("org", "a", CALL, PRICES, parameters=asked)
    ledger.settle("a", USED, '"391"')
    again = ledger.reserve("org", "a", CALL, PRICES, parameters=dict(reversed(asked.items())))
    assert (again.state, again.result) == ("posted", '"391"')
    for other in ({**asked, "temperature": 0.1}, None):
        with pytest.raises(HoldError, match="holds parameters of hash"):
            ledger.reserve("org", "a", CALL, PRICES, parameters=other)
    with pytest.raises(InputError, match="JSON"):
        ledger.reserve("org", "b", CALL, PRICES, parameters={"now": datetime.now(UTC)})


def test_a_retry_reserves_anew(ledger: Ledger) -> None:
    ledger.create("org", limit_nanousd=100)
    ledger.reserve("org", "a/0", CALL, PRICES)
    ledger.dispatch("a/0")
    with pytest.raises(BudgetExceeded):
        ledger.reserve("org", "a/1", CALL, PRICES)  # the first try may still be charged


# Prices


def test_every_kind_of_token_and_second_has_its_price(ledger: Ledger) -> None:
    price = Price(
        2_000_000,
        10_000_000,
        500_000,
        20_000_000,
        nanousd_per_second=1000,
        tiers=(Tier(100, 4_000_000, 15_000_000),),
        version="2026-11-01",
    )
    ledger.create("org", limit_nanousd=10**6)
    worst = TokenCount(150, 50, milliseconds=2000)
    hold = ledger.reserve("org", "a", {"m": worst}, {"m": price})
    assert hold.held_nanousd == 150 * 4 + 50 * 20 + 2000  # the dearest of every tier
    entry = ledger.settle("a", {"m": TokenCount(90, 50, 40, 30, 1500)})
    assert entry.nanousd == 50 * 2 + 40 * 0.5 + 20 * 10 + 30 * 20 + 1500
    assert (entry.prices, entry.note["costs"]) == ({"m": price}, {"m": entry.nanousd})
    ledger.reserve("org", "b", {"m": worst}, {"m": price})
    long = ledger.settle(
        "b", {"m": TokenCount(101, 10, 1, 10)}
    )  # above 100 tokens read, all at the tier's price
    assert long.nanousd == 101 * 4 + 10 * 15
    assert [entry.prices["m"].version for entry in ledger.entries() if entry.key] == ["2026-11-01"] * 4


def test_an_unknown_price_is_refused_unless_it_is_allowed_by_name(ledger: Ledger) -> None:
    ledger.create("org", limit_nanousd=100, limit_tokens=35)
    usage = CALL | {"new": TokenCount(2, 3)}
    for allowed in ((), ("other",)):
        with pytest.raises(UnknownPrice, match="unpriced="):
            ledger.reserve("org", "a", usage, PRICES, unpriced=allowed)
    hold = ledger.reserve("org", "a", usage, PRICES, unpriced=["new"])
    assert (hold.held_nanousd, hold.held_tokens, hold.prices["new"].version) == (70, 35, "unpriced")


@pytest.mark.parametrize("count", [TokenCount(1, 1, 2), TokenCount(1, 1, 0, 2), TokenCount(1, 1, 0, 0, -1)])
def test_counts_that_cannot_be_are_refused(ledger: Ledger, count: TokenCount) -> None:
    ledger.create("org", limit_nanousd=100)
    with pytest.raises(InputError, match="not a token count"):
        ledger.reserve("org", "a", {"small": count}, PRICES)


# Entries


def test_tags_stay_with_the_call(ledger: Ledger) -> None:
    ledger.create("org", limit_nanousd=1000)
    ledger.create("run", parent="org")
    for key, strategy in (("a", "cot"), ("b", "pot")):
        ledger.reserve("run", key, CALL, PRICES, tags={"strategy": strategy})
        ledger.settle(key, USED)
    assert [post.key for post in ledger.posts("org", tags={"strategy": "pot"})] == ["b"]
    assert [post.key for post in ledger.posts("org", last=1)] == ["b"]
    with pytest.raises(InputError, match="tag"):
        ledger.reserve("run", "c", CALL, PRICES, tags={"strategy": "\n"})


def test_every_tree_has_a_chain_of_its_own(ledger: Ledger) -> None:
    tree(ledger, org=1000)
    ledger.create("other", limit_tokens=100)
    ledger.reserve("thread", "a", CALL, PRICES)
    ledger.reserve("other", "b", CALL, PRICES)
    heads = ledger.chain_heads()
    assert {root: count for root, (count, _) in heads.items()} == {"org": 5, "other": 2}
    last = {entry.root: entry.hash for entry in ledger.entries()}
    assert last == {root: head for root, (_, head) in heads.items()}
    assert len({entry.hash for entry in ledger.entries()}) == 7
    assert ledger.check("thread") == []


def test_a_failed_operation_leaves_no_trace(ledger: Ledger) -> None:
    tree(ledger, org=100)
    ledger.reserve("thread", "a", CALL, PRICES)
    before = (ledger.entries(), ledger.budgets(), ledger.holds(), ledger.chain_heads())
    failures: list[Callable[[], object]] = [
        lambda: ledger.reserve("thread", "b", CALL, PRICES),
        lambda: ledger.reserve("thread", "a", USED, PRICES),
        lambda: ledger.settle("a", {"large": TokenCount(1, 1)}),
        lambda: ledger.set_limit("org", limit_nanousd=1),
        lambda: ledger.create("new", parent="nobody"),
    ]
    for failure in failures:
        with pytest.raises((BudgetError, InputError)):
            failure()
    assert (ledger.entries(), ledger.budgets(), ledger.holds(), ledger.chain_heads()) == before


def test_a_write_that_breaks_halfway_is_taken_back(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it was about to do: each step of a settlement fails once."""
    from viaticum.budgets import chain, postings

    tree(ledger, org=1000)
    ledger.set_limit("org", window=Window("day"))
    ledger.reserve("thread", "a", CALL, PRICES)
    before = (ledger.entries(), ledger.budgets(), ledger.holds(), ledger.chain_heads())

    def breaks(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("power cut")

    for owner, name in ((chain, "columns_hash"), (postings, "result_hash"), (chain.Chain, "append")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, breaks)
            with pytest.raises(RuntimeError):
                ledger.settle("a", USED, "1")
        assert (ledger.entries(), ledger.budgets(), ledger.holds(), ledger.chain_heads()) == before
    ledger.settle("a", USED, "1")


def test_a_ledger_is_not_used_from_inside_itself_and_not_after_its_end(store_address: str) -> None:
    with Ledger(store_address) as ledger:
        ledger.create("org", limit_nanousd=100)
        with pytest.raises(LedgerError, match="this very thread"):
            ledger.each_entry(lambda _: ledger.budget("org"))
        assert ledger.budget("org") == Budget("org", 100, None)
    with pytest.raises(LedgerError, match="closed"):
        ledger.budgets()


def test_texts_of_every_kind_come_back_as_they_were(ledger: Ledger) -> None:
    name = "x'; DROP TABLE budgets; -- ? %s λ🧮"
    ledger.create(name, limit_tokens=100)
    ledger.reserve(name, name, {name: TokenCount(1, 1)}, {name: Price(0, 0)}, tags={name: name})
    ledger.settle(name, {name: TokenCount(1, 1)}, json.dumps({"?": "%s\n\u0000€"}))
    hold = ledger.hold(name)
    assert hold is not None
    assert (hold.tags, hold.result) == ({name: name}, json.dumps({"?": "%s\n\u0000€"}))


def test_a_call_whose_maker_is_gone_is_unknown_before_its_lease_ends(ledger: Ledger) -> None:
    ledger.create("demo", limit_nanousd=1000)
    ledger.reserve("demo", "a", CALL, PRICES)
    assert ledger.abandon("a").state == "reserved", "it was not sent"
    ledger.dispatch("a")
    assert [ledger.abandon("a").state, ledger.abandon("a").state] == ["unknown"] * 2
    assert [entry.kind for entry in ledger.entries(key="a")] == ["reserve", "dispatch", "unknown"]
    assert ledger.budget("demo").held_nanousd > 0
    assert ledger.settle("a", USED).kind == "post", "its maker was there after all"
    assert ledger.abandon("a").state == "posted"


def test_a_lease_has_one_owner_until_it_ends(ledger: Ledger, clock: Clock) -> None:
    assert ledger.take_lease("t", "a", 10) == "a"
    assert ledger.take_lease("t", "b", 10) == "a"
    assert ledger.take_lease("t", "a", 20) == "a", "renewed"
    clock.wait(seconds=15)
    assert ledger.take_lease("t", "b", 10) == "a"
    clock.wait(seconds=10)
    assert ledger.take_lease("t", "b", 10) == "b", "it has ended"
    assert ledger.take_lease("t", "c", 10, instead_of="a") == "b"
    assert ledger.take_lease("t", "c", 10, instead_of="b") == "c", "whoever had it is gone"
    ledger.end_lease("t", "b")
    assert ledger.take_lease("t", "b", 10) == "c"
    ledger.end_lease("t", "c")
    assert ledger.take_lease("t", "b", 10) == "b"
    assert ledger.check() == []
