"""The ledger's contract, one operation at a time, then any sequence of them against a small model."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from viaticum.budgets import Budget, Ledger, default_path
from viaticum.errors import BudgetError, BudgetExceeded, HoldError, InputError, UnknownName, UnknownPrice
from viaticum.money import MAX_NANOUSD, Price
from viaticum.types import TokenCount

MILLION = 1_000_000
# One nano-dollar a token read, three a token made.
PRICES = {"small": Price(MILLION, 3 * MILLION), "large": Price(10 * MILLION, 30 * MILLION)}
CALL = {"small": TokenCount(10, 20)}  # 70 nano-dollars, 30 tokens
USED = {"small": TokenCount(10, 5)}  # 25 nano-dollars, 15 tokens


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.db") as opened:
        yield opened
        assert opened.check() == []


# Budgets


def test_a_budget_is_created_once(ledger: Ledger) -> None:
    made = ledger.create("demo", limit_nanousd=100, limit_tokens=50)
    assert made == Budget("demo", 100, 50) == ledger.budget("demo")
    assert ledger.create("demo", limit_nanousd=100, limit_tokens=50) == made
    assert [(entry.kind, entry.nanousd, entry.tokens) for entry in ledger.entries("demo")] == [
        ("limit", 100, 50)
    ]
    with pytest.raises(
        BudgetError, match=r"'demo' exists with a limit of \$0.0000001 and 50 tokens, not 7 tokens"
    ):
        ledger.create("demo", limit_tokens=7)


def test_creating_again_says_where_the_budget_stands(ledger: Ledger) -> None:
    ledger.create("demo", limit_nanousd=100)
    ledger.reserve("demo", "a", CALL, PRICES)
    assert ledger.create("demo", limit_nanousd=100).held_nanousd == 70


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"limit_nanousd": 0},
        {"limit_nanousd": -1},
        {"limit_tokens": 0},
        {"limit_nanousd": 5, "limit_tokens": -5},
        {"limit_nanousd": 0.5},
        {"limit_tokens": True},
        {"limit_nanousd": MAX_NANOUSD + 1},
    ],
)
def test_a_limit_is_an_integer_above_zero(ledger: Ledger, limits: dict[str, int]) -> None:
    with pytest.raises(InputError):
        ledger.create("demo", **limits)
    assert ledger.budgets() == []


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\x00b", "\ud800", 7])
def test_names_and_keys_are_printable(ledger: Ledger, name: str) -> None:
    ledger.create("demo", limit_tokens=100)
    for call in (
        lambda: ledger.create(name, limit_tokens=1),
        lambda: ledger.reserve("demo", name, CALL, PRICES),
        lambda: ledger.reserve("demo", "k", {name: TokenCount(1, 1)}, {name: Price(0, 0)}),
        lambda: ledger.hold(name),
    ):
        with pytest.raises(InputError):
            call()


def test_names_are_text_never_sql(ledger: Ledger) -> None:
    name = "x'; DROP TABLE budgets; -- λ🧮"
    ledger.create(name, limit_tokens=100)
    ledger.reserve(name, name, {name: TokenCount(1, 1)}, {name: Price(0, 0)})
    assert ledger.budgets()[0].name == name
    assert ledger.holds(name)[0].usage == {name: TokenCount(1, 1)}


def test_an_unknown_budget_is_named_with_its_nearest(ledger: Ledger) -> None:
    ledger.create("demo", limit_tokens=100)
    for call in (
        lambda: ledger.budget("demo2"),
        lambda: ledger.set_limit("demo2", limit_tokens=1),
        lambda: ledger.reserve("demo2", "k", CALL, PRICES),
        lambda: ledger.holds("demo2"),
        lambda: ledger.entries("demo2"),
    ):
        with pytest.raises(UnknownName, match="did you mean 'demo'"):
            call()


def test_a_limit_changes_by_an_entry_and_never_below_what_is_used(ledger: Ledger) -> None:
    ledger.create("demo", limit_nanousd=100)
    ledger.reserve("demo", "a", CALL, PRICES)
    assert ledger.set_limit("demo", limit_nanousd=70).left_nanousd == 0
    assert ledger.set_limit("demo", limit_tokens=30).limit_nanousd == 70  # what is left out stays
    ledger.set_limit("demo", limit_tokens=30)  # no change, no entry
    for limits in ({"limit_nanousd": 69}, {"limit_tokens": 29}):
        with pytest.raises(BudgetError, match="spent or held"):
            ledger.set_limit("demo", **limits)
    with pytest.raises(InputError):
        ledger.set_limit("demo")
    limits_set = [(entry.nanousd, entry.tokens) for entry in ledger.entries("demo") if entry.kind == "limit"]
    assert limits_set == [(100, 0), (70, 0), (70, 30)]


# Reserving


def test_the_worst_case_is_held(ledger: Ledger) -> None:
    ledger.create("demo", limit_nanousd=1000, limit_tokens=100)
    usage = {"small": TokenCount(10, 20), "large": TokenCount(5, 10)}
    hold = ledger.reserve("demo", "a", usage, PRICES | {"unused": Price(1, 1)})
    assert (hold.held_nanousd, hold.held_tokens, hold.state) == (70 + 350, 45, "reserved")
    assert (hold.usage, hold.prices) == (usage, PRICES)
    assert ledger.hold("a") == hold
    assert ledger.holds("demo") == ledger.holds("demo", "reserved") == [hold]
    budget = ledger.budget("demo")
    assert (budget.left_nanousd, budget.left_tokens) == (580, 55)
    entry = ledger.entries("demo")[-1]
    assert (entry.kind, entry.key, entry.nanousd, entry.tokens, entry.usage) == (
        "reserve",
        "a",
        420,
        45,
        usage,
    )


@pytest.mark.parametrize(
    ("limits", "unit", "needed", "left"),
    [
        ({"limit_nanousd": 139}, "nanousd", 70, 69),
        ({"limit_tokens": 59}, "tokens", 30, 29),
        ({"limit_nanousd": 140, "limit_tokens": 59}, "tokens", 30, 29),
    ],
)
def test_what_does_not_fit_is_refused_whole(
    ledger: Ledger, limits: dict[str, int], unit: str, needed: int, left: int
) -> None:
    ledger.create("demo", **limits)
    ledger.reserve("demo", "a", CALL, PRICES)
    before = ledger.budget("demo")
    with pytest.raises(BudgetExceeded) as refused:
        ledger.reserve("demo", "b", CALL, PRICES)
    error = refused.value
    assert (error.budget, error.unit, error.needed, error.left) == ("demo", unit, needed, left)
    assert "\n" not in str(error)
    assert ledger.budget("demo") == before
    assert ledger.hold("b") is None
    ledger.void("a")
    ledger.reserve("demo", "b", CALL, PRICES)  # a refusal does not use up the key


def test_the_last_cent_can_be_spent(ledger: Ledger) -> None:
    ledger.create("demo", limit_nanousd=70, limit_tokens=30)
    ledger.reserve("demo", "a", CALL, PRICES)
    assert ledger.budget("demo").left_nanousd == 0
    ledger.reserve("demo", "free", {"own": TokenCount(0, 0)}, {"own": Price(0, 0)})


def test_an_unknown_price_is_refused(ledger: Ledger) -> None:
    ledger.create("demo", limit_nanousd=1000)
    with pytest.raises(UnknownPrice, match="'huge'"):
        ledger.reserve("demo", "a", CALL | {"huge": TokenCount(1, 1)}, PRICES)
    assert ledger.holds("demo") == []


@pytest.mark.parametrize(
    "usage",
    [
        {},
        {"small": TokenCount(-1, 5)},
        {"small": TokenCount(5, -1)},
        {"small": TokenCount(1.5, 1)},  # type: ignore[arg-type]
        {"small": TokenCount(MAX_NANOUSD, MAX_NANOUSD)},
    ],
)
def test_usage_that_cannot_be_is_refused(ledger: Ledger, usage: dict[str, TokenCount]) -> None:
    ledger.create("demo", limit_nanousd=1000)
    with pytest.raises(InputError):
        ledger.reserve("demo", "a", usage, PRICES)
    ledger.reserve("demo", "b", CALL, PRICES)
    with pytest.raises(InputError):
        ledger.settle("b", usage)
    hold = ledger.hold("b")
    assert hold is not None
    assert hold.state == "reserved"


def test_a_unit_without_limit_still_fits_64_bits(ledger: Ledger) -> None:
    ledger.create("demo", limit_nanousd=1000)
    free = {"own": Price(0, 0)}
    ledger.reserve("demo", "a", {"own": TokenCount(MAX_NANOUSD, 0)}, free)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("demo", "b", {"own": TokenCount(1, 0)}, free)


def test_the_same_key_means_the_same_call(ledger: Ledger) -> None:
    ledger.create("demo", limit_nanousd=80)
    ledger.create("other", limit_nanousd=80)
    hold = ledger.reserve("demo", "a", CALL, PRICES)
    assert ledger.reserve("demo", "a", CALL, PRICES) == hold
    assert ledger.budget("demo").held_nanousd == 70
    others: list[Callable[[], object]] = [
        lambda: ledger.reserve("other", "a", CALL, PRICES),
        lambda: ledger.reserve("demo", "a", USED, PRICES),
        lambda: ledger.reserve("demo", "a", CALL, {"small": Price(1, 1)}),
    ]
    for call in others:
        with pytest.raises(HoldError, match="use a new key"):
            call()
    ledger.settle("a", USED, '"kept"')
    again = ledger.reserve("demo", "a", CALL, PRICES)
    assert (again.state, again.result) == ("posted", '"kept"')


# Settling and voiding


def test_settling_posts_the_truth_and_frees_the_rest(ledger: Ledger) -> None:
    ledger.create("demo", limit_nanousd=100, limit_tokens=100)
    ledger.reserve("demo", "a", CALL, PRICES)
    entry = ledger.settle("a", USED)
    assert (entry.kind, entry.nanousd, entry.tokens, entry.overrun) == ("post", 25, 15, 0)
    assert ledger.budget("demo") == Budget("demo", 100, 100, 25, 0, 15, 0)
    assert ledger.entries("demo", "a")[-1] == entry
    assert [hold.key for hold in ledger.holds("demo", "posted")] == ["a"]
    assert ledger.settle("a", USED) == entry
    with pytest.raises(HoldError, match="settled once"):
        ledger.settle("a", CALL)
    with pytest.raises(HoldError, match="posted"):
        ledger.void("a")


def test_prices_are_those_of_the_reservation(ledger: Ledger) -> None:
    ledger.create("demo", limit_nanousd=1000)
    prices = dict(PRICES)
    ledger.reserve("demo", "a", CALL, prices)
    prices["small"] = Price(0, 0)
    assert ledger.settle("a", USED).nanousd == 25


def test_a_model_that_was_not_held_has_no_price(ledger: Ledger) -> None:
    ledger.create("demo", limit_nanousd=1000)
    ledger.reserve("demo", "a", CALL, PRICES)
    with pytest.raises(UnknownPrice):
        ledger.settle("a", {"large": TokenCount(1, 1)})
    assert ledger.budget("demo").held_nanousd == 70


def test_an_overrun_is_posted_and_marked(ledger: Ledger) -> None:
    ledger.create("demo", limit_nanousd=75, limit_tokens=1000)
    ledger.reserve("demo", "a", CALL, PRICES)
    entry = ledger.settle("a", {"small": TokenCount(10, 30)})
    assert (entry.nanousd, entry.overrun) == (100, 30)
    assert ledger.budget("demo").left_nanousd == -25
    with pytest.raises(BudgetExceeded):
        ledger.reserve("demo", "b", CALL, PRICES)
    ledger.set_limit("demo", limit_tokens=500)  # dollars being short does not freeze the other limit
    ledger.set_limit("demo", limit_nanousd=100)


def test_zero_used_is_not_usage_missing(ledger: Ledger) -> None:
    ledger.create("demo", limit_nanousd=100)
    ledger.reserve("demo", "a", CALL, PRICES)
    with pytest.raises(InputError, match="no usage"):
        ledger.settle("a", {})
    assert ledger.settle("a", {"small": TokenCount()}).nanousd == 0


def test_voiding_frees_all(ledger: Ledger) -> None:
    ledger.create("demo", limit_nanousd=100, limit_tokens=100)
    ledger.reserve("demo", "a", CALL, PRICES)
    entry = ledger.void("a")
    assert (entry.kind, entry.nanousd, entry.tokens) == ("void", 70, 30)
    assert ledger.void("a") == entry
    assert ledger.budget("demo") == Budget("demo", 100, 100)
    assert ledger.reserve("demo", "a", CALL, PRICES).state == "void"  # the key stays used
    for call in (lambda: ledger.settle("a", USED), lambda: ledger.attach("a", "1")):
        with pytest.raises(HoldError, match="void"):
            call()


def test_an_unknown_hold_is_an_error_and_reads_as_none(ledger: Ledger) -> None:
    for call in (lambda: ledger.settle("a", USED), lambda: ledger.void("a"), lambda: ledger.attach("a", "1")):
        with pytest.raises(HoldError, match="no hold with key 'a'"):
            call()
    assert ledger.hold("a") is None


def test_a_result_is_kept_with_the_call(ledger: Ledger) -> None:
    text = json.dumps({"text": "seventy-two €", "finish": "stop"}, ensure_ascii=False)
    ledger.create("demo", limit_nanousd=1000)
    ledger.reserve("demo", "settled", CALL, PRICES)
    ledger.settle("settled", USED, text)
    ledger.settle("settled", USED, text)
    ledger.reserve("demo", "attached", CALL, PRICES)
    assert ledger.attach("attached", text).state == "reserved"
    ledger.settle("attached", USED)
    for key in ("settled", "attached"):
        hold = ledger.hold(key)
        assert hold is not None
        assert (hold.state, hold.result) == ("posted", text)
        for again in (lambda key=key: ledger.attach(key, "2"), lambda key=key: ledger.settle(key, USED, "2")):
            with pytest.raises(HoldError, match="another result"):
                again()


@pytest.mark.parametrize("result", ["", "{", "not json", '"\ud800"', 7, "[" * 100_000])
def test_a_result_is_json_text(ledger: Ledger, result: str) -> None:
    ledger.create("demo", limit_nanousd=1000)
    ledger.reserve("demo", "a", CALL, PRICES)
    with pytest.raises(InputError, match="JSON"):
        ledger.settle("a", USED, result)
    assert ledger.budget("demo").held_nanousd == 70


def test_the_default_ledger_is_the_users() -> None:
    assert default_path().parts[-2:] == ("viaticum", "ledger.db")


# The audit


def altered(path: Path, *statements: str) -> list[str]:
    """What check() says after someone with an SQLite shell and no scruples has been here."""
    with closing(sqlite3.connect(path)) as shell:
        for (trigger,) in shell.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            shell.execute(f"DROP TRIGGER {trigger}")
        for statement in statements:
            shell.execute(statement)
        shell.commit()
    with Ledger(path) as ledger:
        return ledger.check()


@pytest.mark.parametrize(
    ("statements", "finding"),
    [
        (["UPDATE budgets SET posted_nanousd = posted_nanousd - 1"], "totals differ"),
        (["UPDATE budgets SET held_tokens = 0"], "totals differ"),
        (["UPDATE entries SET nanousd = 1 WHERE kind = 'post'"], "its usage makes 25"),
        (["UPDATE entries SET overrun = 1 WHERE kind = 'post'"], "a hold differs from its entries"),
        (["UPDATE holds SET state = 'void' WHERE state = 'posted'"], "a hold differs from its entries"),
        (
            ["UPDATE budgets SET limit_nanousd = 90", "UPDATE entries SET nanousd = 90 WHERE kind = 'limit'"],
            "limit",
        ),
        (["UPDATE budgets SET limit_nanousd = 1000000"], "a limit differs"),
        (["DELETE FROM entries WHERE kind = 'reserve' AND key = 'held'"], "entries are missing"),
        (
            [
                "DROP INDEX one_end_a_key",
                "INSERT INTO entries SELECT 99, budget, key, kind, nanousd, tokens, overrun, at, usage, "
                "prices, note,"
                " root, number + 99, hash FROM entries WHERE kind = 'post'",
            ],
            "ended more than once",
        ),
        (["UPDATE holds SET prices = '[]'"], "cannot be priced"),
        (
            ["PRAGMA foreign_keys = OFF", "UPDATE entries SET key = 'no one' WHERE key = 'held'"],
            "'no one' is missing",
        ),
    ],
)
def test_the_audit_finds_what_was_altered(tmp_path: Path, statements: list[str], finding: str) -> None:
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        ledger.create("demo", limit_nanousd=1000)
        ledger.reserve("demo", "held", CALL, PRICES)
        ledger.reserve("demo", "posted", CALL, PRICES)
        ledger.settle("posted", USED)
        ledger.reserve("demo", "void", CALL, PRICES)
        ledger.void("void")
        assert ledger.check() == []
    findings = altered(path, *statements)
    assert any(finding in line for line in findings), findings


# Any sequence of operations

KEYS = st.sampled_from("abcdefgh")
COUNTS = st.integers(0, 30)


class AnySequence(RuleBasedStateMachine):
    """The ledger against a model that is a dictionary: key -> (state, held, used)."""

    @initialize(nanousd=st.integers(50, 300), tokens=st.integers(30, 100))
    def start(self, nanousd: int, tokens: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.ledger = Ledger(self.folder / "ledger.db")
        self.ledger.create("demo", limit_nanousd=nanousd, limit_tokens=tokens)
        self.limits = (nanousd, tokens)
        self.calls: dict[str, tuple[str, int, int]] = {}  # all calls read nothing and make n tokens at 3 each
        self.over = 0

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
            shutil.rmtree(self.folder)

    def total(self) -> int:
        return sum(
            {"reserved": held, "posted": used, "void": 0}[state] for state, held, used in self.calls.values()
        )

    @rule(key=KEYS, n=COUNTS)
    def reserve(self, key: str, n: int) -> None:
        usage = {"small": TokenCount(0, n)}
        fits = 3 * (self.total() + n) <= self.limits[0] and self.total() + n <= self.limits[1]
        if key in self.calls and self.calls[key][1] != n:
            with pytest.raises(HoldError):
                self.ledger.reserve("demo", key, usage, PRICES)
        elif key in self.calls or fits:
            state = self.ledger.reserve("demo", key, usage, PRICES).state
            assert state == self.calls.setdefault(key, ("reserved", n, 0))[0]
        else:
            with pytest.raises(BudgetExceeded):
                self.ledger.reserve("demo", key, usage, PRICES)

    @rule(key=KEYS, n=COUNTS)
    def settle(self, key: str, n: int) -> None:
        state, held, used = self.calls.get(key, ("unknown", 0, 0))
        usage = {"small": TokenCount(0, n)}
        if state == "reserved" or (state == "posted" and used == n):
            entry = self.ledger.settle(key, usage)
            assert (entry.nanousd, entry.tokens, entry.overrun) == (3 * n, n, max(0, 3 * (n - held)))
            self.over += max(0, n - held) if state == "reserved" else 0
            self.calls[key] = ("posted", held, n)
        else:
            with pytest.raises(HoldError):
                self.ledger.settle(key, usage)

    @rule(key=KEYS)
    def void(self, key: str) -> None:
        state, held, _ = self.calls.get(key, ("unknown", 0, 0))
        if state in ("reserved", "void"):
            assert self.ledger.void(key).tokens == held
            self.calls[key] = ("void", held, 0)
        else:
            with pytest.raises(HoldError):
                self.ledger.void(key)

    @rule(tokens=st.integers(1, 100))
    def set_limit(self, tokens: int) -> None:
        if tokens == self.limits[1] or tokens >= self.total():
            self.ledger.set_limit("demo", limit_tokens=tokens)
            self.limits = (self.limits[0], tokens)
        else:
            with pytest.raises(BudgetError):
                self.ledger.set_limit("demo", limit_tokens=tokens)

    @rule()
    def reopen(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(self.folder / "ledger.db")

    @invariant()
    def totals_agree(self) -> None:
        if not hasattr(self, "ledger"):
            return
        budget = self.ledger.budget("demo")
        assert budget.posted_tokens + budget.held_tokens == self.total() <= self.limits[1] + self.over
        assert (
            budget.posted_nanousd + budget.held_nanousd == 3 * self.total() <= self.limits[0] + 3 * self.over
        )
        assert self.ledger.check() == []


AnySequence.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
TestAnySequence = AnySequence.TestCase
