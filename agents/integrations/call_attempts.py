"""The attempts by which the client of a chat model makes one held call of an agent.

A client that sends a call again by itself, after a time limit or a lost connection, may be charged for both:
each further attempt has a hold of its own. Seen are those of the libraries that `viaticum.budget` meets
(httpx, aiohttp, boto3). Leaves out how they are met (`viaticum.agents.instrumentation`).
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from viaticum.agents.instrumentation import context
from viaticum.agents.instrumentation.context import Payer
from viaticum.agents.instrumentation.joint import JointHold, JointPayer
from viaticum.agents.instrumentation.requests import ModelCall
from viaticum.budgets import Ledger
from viaticum.errors import BudgetClosed, BudgetExceeded, InputError, MissingExtra
from viaticum.types import TokenCount


def install() -> bool:
    """Meet the attempts of clients in this process; returns whether the extra `remote` is there for it."""
    try:
        from viaticum.agents.instrumentation import http_hooks
    except MissingExtra:
        return False
    http_hooks.install()
    return True


class Attempts:
    """Those of one call; the budget that pays for them while the call is made.

    Args:
        key: of the hold of the first attempt.
        reserve: holds a further one under a key. Raises `BudgetExceeded`, `BudgetClosed`.

    Attributes:
        key: of the newest attempt; those before it are settled.
        is_lost: it was sent and got no answer, so that it may have been charged for.
        refusal: why a further attempt was not sent.
        around: the budget around the agent, inside which another one may be opened.
    """

    parent: Payer | None = None
    around: Payer | None = None

    def __init__(self, ledger: Ledger, key: str, reserve: Callable[[str], None]) -> None:
        self._ledger, self._reserve = ledger, reserve
        self.key, self.is_lost = key, False
        self.refusal: BudgetExceeded | BudgetClosed | None = None
        self._is_over = False
        self._lock = threading.Lock()  # a call that was left at its deadline goes on in a thread of its own

    def end(self) -> None:
        """Let no further attempt be sent: nobody would settle it, and nobody waits for its answer."""
        with self._lock:
            self._is_over = True

    def inside(self, *, is_met: bool) -> AbstractContextManager[None]:
        """The context of the call. is_met: what `install` returned."""
        if not is_met:
            return nullcontext()
        self.around = context.current()
        return context.Inside(self if self.around is None else _Both(self.around, self))

    def reserve(self, call: ModelCall) -> Attempt:
        """The first attempt, or one after an answer, is held already."""
        if call.limit is None:
            raise InputError("a call without a limit is none that was held")
        with self._lock:
            if self._is_over:
                raise BudgetClosed("this call of an agent has ended; a further attempt of it is not sent")
            if self.is_lost:
                self._hold_anew()
        return Attempt(self, call, call.limit)

    def _hold_anew(self) -> None:
        lost, key = self.key, f"agent-{uuid.uuid4().hex}"
        self._ledger.settle(lost, None)
        self.key, self.is_lost = key, False  # an interrupt from here on ends this hold, if there is one yet
        try:
            self._reserve(key)
        except Exception as error:
            self.key, self.is_lost = lost, True
            if isinstance(error, BudgetExceeded | BudgetClosed):
                self.refusal = error
            raise
        self._ledger.dispatch(key)

    def reserve_amount(self, tool: str, amount: int) -> Callable[[int | None], None]:
        """A model calls no priced tools."""
        return lambda cost: None

    def refuses(self, what: str) -> bool:
        return False

    def note_refusal(self, reason: str) -> None:
        """`refusal` has it."""

    def note_unheld(self, what: str) -> None:
        """It is part of the held call."""


class _Both(JointPayer):
    def __init__(self, outer: Payer, attempts: Attempts) -> None:
        super().__init__(outer, attempts)
        self.around = outer

    def reserve(self, call: ModelCall) -> JointHold:
        """As the budget around does; attempts lower no limit, so that they are not asked first."""
        return self._reserve(call, *self._both)


class Attempt:
    """One attempt, which ends once."""

    def __init__(self, attempts: Attempts, call: ModelCall, limit: int) -> None:
        self.call, self.limit, self._attempts = call, limit, attempts
        self._has_ended = False

    def settle(self, count: TokenCount | None, kept: Mapping[str, int] | None = None) -> None:
        """None where no answer came. What an answer cost is settled with its call."""
        self._end(is_lost=count is None)

    def void(self) -> None:
        self._end(is_lost=False)

    def _end(self, *, is_lost: bool) -> None:
        if not self._has_ended:
            self._has_ended, self._attempts.is_lost = True, is_lost
