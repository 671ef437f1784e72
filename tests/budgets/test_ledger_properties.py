"""Any sequence of operations on nested scopes, on every store, against a model of a few lines.

make prove runs 10,000 examples of 50 steps on each store; here it is a few.
"""

from __future__ import annotations

import itertools
import os
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ledger_calls import Clock

from viaticum.budgets import Ledger, Window
from viaticum.errors import BudgetClosed, BudgetError, BudgetExceeded, HoldError
from viaticum.money import Price
from viaticum.types import TokenCount

EXAMPLES = 10_000 if os.environ.get("VIATICUM_PROVE") else 12

ABOVE = {
    "org": ["org"],
    "a": ["org", "a"],
    "b": ["org", "b"],
    "a1": ["org", "a", "a1"],
    "a2": ["org", "a", "a2"],
    "b1": ["org", "b", "b1"],
}
PRICES = {"m": Price(0, 3_000_000)}  # three nano-dollars a token made
HELD = ("reserved", "dispatched", "unknown")


class Model:
    """A model of the ledger: totals of a scope, and what fits. A call is [leaf, state, held, used, day]."""

    def __init__(self, limits: dict[str, int]) -> None:
        self.limits, self.calls, self.paused, self.day = limits, {}, set(), 0  # type: ignore[var-annotated]

    def counts(self, scope: str) -> int:
        amounts = (
            held if state in HELD else used if state == "posted" and (scope != "a" or day == self.day) else 0
            for leaf, state, held, used, day in self.calls.values()
            if scope in ABOVE[leaf]
        )  # `a` has a window of a day
        return sum(amounts)

    def fits(self, leaf: str, tokens: int) -> bool:
        return all(self.counts(scope) + tokens <= self.limits[scope] for scope in ABOVE[leaf])


KEYS, COUNTS = st.sampled_from("abcdefgh"), st.integers(0, 30)
LEAVES, SCOPES = st.sampled_from(["a1", "a2", "b1", "a"]), st.sampled_from(list(ABOVE))


class Calls(RuleBasedStateMachine):
    """One tree of scopes an example, under a prefix of its own in a ledger that all examples share."""

    ledger: Ledger
    clock: Clock
    numbers = itertools.count()

    @initialize(limits=st.lists(st.integers(20, 120), min_size=6, max_size=6))
    def start(self, limits: list[int]) -> None:
        self.prefix = f"{next(self.numbers)} "
        self.model = Model(dict(zip(ABOVE, limits, strict=True)))
        self.clock.wait(days=1)
        for scope, lineage in ABOVE.items():
            parent = self.prefix + lineage[-2] if len(lineage) > 1 else None
            # Odd levels are limited in dollars, even ones in tokens.
            limit = self.model.limits[scope]
            terms = {"limit_nanousd": 3 * limit} if len(lineage) % 2 else {"limit_tokens": limit}
            window = Window("day") if scope == "a" else None
            self.ledger.create(self.prefix + scope, parent=parent, window=window, **terms)

    def key(self, key: str) -> str:
        return self.prefix + key

    def state(self, key: str) -> str:
        return self.model.calls[key][1] if key in self.model.calls else "none"

    @rule(key=KEYS, leaf=LEAVES, n=COUNTS)
    def reserve(self, key: str, leaf: str, n: int) -> None:
        def call() -> str:
            usage = {"m": TokenCount(0, n)}
            return self.ledger.reserve(self.prefix + leaf, self.key(key), usage, PRICES).state

        if key in self.model.calls:
            if self.model.calls[key][0] == leaf and self.model.calls[key][2] == n:
                assert call() == self.state(key)
            else:
                with pytest.raises(HoldError):
                    call()
        elif self.model.paused & set(ABOVE[leaf]):
            with pytest.raises(BudgetClosed):
                call()
        elif self.model.fits(leaf, n):
            assert call() == "reserved"
            self.model.calls[key] = [leaf, "reserved", n, 0, self.model.day]
        else:
            with pytest.raises(BudgetExceeded):
                call()

    @rule(key=KEYS)
    def dispatch(self, key: str) -> None:
        if self.state(key) in ("reserved", "dispatched"):
            self.ledger.dispatch(self.key(key))
            self.model.calls[key][1] = "dispatched"
        else:
            with pytest.raises(HoldError):
                self.ledger.dispatch(self.key(key))

    @rule(key=KEYS, n=st.none() | COUNTS)
    def settle(self, key: str, n: int | None) -> None:
        usage = None if n is None else {"m": TokenCount(0, n)}
        call = self.model.calls.get(key)
        used = n if n is not None else call[2] if call else 0
        if call and (call[1] in HELD or (call[1] == "posted" and call[3] == used)):
            entry = self.ledger.settle(self.key(key), usage)
            assert (entry.nanousd, entry.tokens, entry.overrun) == (
                3 * used,
                used,
                max(0, 3 * (used - call[2])),
            )
            if call[1] in HELD:
                call[1], call[3], call[4] = "posted", used, self.model.day
        else:
            with pytest.raises(HoldError):
                self.ledger.settle(self.key(key), usage)

    @rule(key=KEYS)
    def void(self, key: str) -> None:
        if self.state(key) in (*HELD, "void"):
            assert self.ledger.void(self.key(key)).tokens == self.model.calls[key][2]
            self.model.calls[key][1] = "void"
        else:
            with pytest.raises(HoldError):
                self.ledger.void(self.key(key))

    @rule()
    def a_day_later_leases_are_over(self) -> None:
        self.clock.moment += timedelta(days=1)
        self.model.day += 1
        self.ledger.expire_leases()
        after = {"reserved": "expired", "dispatched": "unknown"}
        for call in self.model.calls.values():
            call[1] = after.get(call[1], call[1])

    @rule(scope=SCOPES, limit=st.integers(1, 120))
    def set_limit(self, scope: str, limit: int) -> None:
        terms = {"limit_nanousd": 3 * limit} if len(ABOVE[scope]) % 2 else {"limit_tokens": limit}
        if limit == self.model.limits[scope] or self.model.counts(scope) <= limit:
            self.ledger.set_limit(self.prefix + scope, **terms)
            self.model.limits[scope] = limit
        else:
            with pytest.raises(BudgetError):
                self.ledger.set_limit(self.prefix + scope, **terms)

    @rule(scope=SCOPES)
    def pause(self, scope: str) -> None:
        self.ledger.pause(self.prefix + scope)
        self.model.paused.add(scope)

    @precondition(lambda self: self.model.paused)
    @rule()
    def resume_all(self) -> None:
        for scope in sorted(self.model.paused):
            self.ledger.resume(self.prefix + scope)
        self.model.paused.clear()

    @invariant()
    def totals_agree_at_every_level(self) -> None:
        for leaf in ("a1", "a2", "b1") if hasattr(self, "prefix") else ():
            for budget in self.ledger.lineage(self.prefix + leaf):
                counted = self.model.counts(budget.name.removeprefix(self.prefix))
                assert budget.posted_tokens + budget.held_tokens == counted
                assert budget.posted_nanousd + budget.held_nanousd == 3 * counted

    def teardown(self) -> None:
        if hasattr(self, "prefix"):
            assert self.ledger.check(self.prefix + "org") == []


@pytest.mark.timeout(20_000)
def test_any_sequence_keeps_the_promise(store_address: str) -> None:
    clock = Clock()
    with Ledger(store_address, clock=clock) as ledger:
        machine = type("Calls", (Calls,), {"ledger": ledger, "clock": clock, "TestCase": None})
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=50,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        assert len(ledger.chain_heads()) >= EXAMPLES
