"""Two budgets that hold for the same calls: the one around an agent, and the agent's own for its tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

from viaticum.agents.instrumentation.context import Held, Payer
from viaticum.agents.instrumentation.requests import ModelCall
from viaticum.errors import BudgetExceeded
from viaticum.types import TokenCount


class ScopedPayer(Payer, Protocol):
    """A budget that is a scope of a ledger."""

    def is_within(self, payer: object) -> bool:
        """Whether what this one pays is paid from the other one too."""
        ...


def joined(outer: Payer | None, scope: ScopedPayer) -> Payer:
    """Who pays for calls of a scope inside another budget: no scope of a ledger is charged twice."""
    if outer is None or scope.is_within(outer):
        return scope
    if isinstance(outer, JointPayer):
        return outer.with_scope(scope)
    is_within = getattr(outer, "is_within", None)
    return outer if is_within is not None and is_within(scope) else JointPayer(outer, scope)


class JointHold:
    """A call that both have reserved."""

    def __init__(self, holds: tuple[Held, Held]) -> None:
        self._holds = holds
        self.call, self.limit = holds[1].call, holds[1].limit

    def settle(self, count: TokenCount | None, kept: Mapping[str, int] | None = None) -> None:
        try:
            self._holds[0].settle(count, kept)
        finally:
            self._holds[1].settle(count, kept)

    def void(self) -> None:
        try:
            self._holds[0].void()
        finally:
            self._holds[1].void()


class JointPayer:
    """Holds each call in both budgets, or in none."""

    parent: Payer | None = None

    def __init__(self, outer: Payer, inner: Payer) -> None:
        self._both = outer, inner

    def with_scope(self, scope: ScopedPayer) -> Payer:
        """These and one more, of which each charges once what none of the others does."""
        payers = list(self._payers())
        if any(is_within(scope) for each in payers if (is_within := getattr(each, "is_within", None))):
            return self
        found: Payer = scope
        for each in reversed(payers):
            if not scope.is_within(each):
                found = JointPayer(each, found)
        return found

    def _payers(self) -> Iterator[Payer]:
        for each in self._both:
            if isinstance(each, JointPayer):
                yield from each._payers()
            else:
                yield each

    def reserve(self, call: ModelCall) -> JointHold:
        """Reserve in both, with the limit of new tokens that both can pay for. Raises as they do."""
        try:
            return self._reserve(call, *self._both)
        except BudgetExceeded:
            if call.limit is not None:
                raise
            return self._reserve(call, *reversed(self._both))  # the other one may lower the limit further

    def _reserve(self, call: ModelCall, first: Payer, second: Payer) -> JointHold:
        held = first.reserve(call)
        try:
            return JointHold((held, second.reserve(replace(call, limit=held.limit))))
        except BaseException:
            held.void()
            raise

    def reserve_amount(self, tool: str, amount: int) -> Callable[[int | None], None]:
        first = self._both[0].reserve_amount(tool, amount)
        try:
            second = self._both[1].reserve_amount(tool, amount)
        except BaseException:
            first(None)
            raise

        def settle(cost: int | None) -> None:
            try:
                first(cost)
            finally:
                second(cost)

        return settle

    def refuses(self, what: str) -> bool:
        outer, inner = (payer.refuses(what) for payer in self._both)  # both note it
        return outer or inner

    def note_refusal(self, reason: str) -> None:
        for payer in self._both:
            payer.note_refusal(reason)

    def note_unheld(self, what: str) -> None:
        for payer in self._both:
            payer.note_unheld(what)
