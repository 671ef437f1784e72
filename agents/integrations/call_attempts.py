"""The attempts by which the client of a chat model makes one held call of an agent.

A client that sends a call again by itself, after a time limit or a lost connection, may be charged for both;
so may one that asks again because it could not use an answer, or sends two requests at once. Each attempt has
a hold of its own, and is charged what its provider reports, else the most that its own request may cost. Seen
are those of the libraries that `viaticum.budget` meets (httpx, aiohttp, boto3). Leaves out how they are met
(`viaticum.agents.instrumentation`).
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress

from viaticum.agents.instrumentation import context
from viaticum.agents.instrumentation.context import Payer
from viaticum.agents.instrumentation.joint import JointHold, JointPayer
from viaticum.agents.instrumentation.requests import ModelCall
from viaticum.budgets import Ledger
from viaticum.budgets.records import costs
from viaticum.errors import BudgetClosed, BudgetExceeded, InputError, LedgerError, MissingExtra
from viaticum.money import Price
from viaticum.types import TokenCount

Usage = Mapping[str, TokenCount]
_log = logging.getLogger("viaticum")


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
        reserve: holds a further one under a key, of at most so many tokens; None for as many as the first.
            Raises `BudgetExceeded`, `BudgetClosed`.
        count: an upper bound of the tokens of a text.

    Attributes:
        key: of the newest attempt; those before it are settled, at the latest by `end`.
        refusal: why a further attempt was not sent.
        around: the budget around the agent, inside which another one may be opened.
    """

    parent: Payer | None = None
    around: Payer | None = None

    def __init__(
        self,
        ledger: Ledger,
        key: str,
        reserve: Callable[[str, TokenCount | None], None],
        count: Callable[[str], int],
    ) -> None:
        self._ledger, self._reserve, self._count = ledger, reserve, count
        self.key = key
        self.refusal: BudgetExceeded | BudgetClosed | None = None
        self._newest: Attempt | None = None
        self._earlier: list[Attempt] = []
        self._is_over = False
        self._lock = threading.RLock()  # a call that was left at its deadline goes on in a thread of its own

    @property
    def are_several(self) -> bool:
        """Whether there were attempts before the newest that are not free."""
        return bool(self._earlier)

    @property
    def is_free(self) -> bool:
        """Whether the newest attempt was refused, or could not be sent."""
        return self._newest is not None and self._newest.is_free

    @property
    def is_charged(self) -> bool:
        """Whether the provider of the newest attempt charges for it, or may do so."""
        return self._newest is not None and not self._newest.is_free

    @property
    def reported(self) -> TokenCount | None:
        """What the provider of the newest attempt reports."""
        return None if self._newest is None else self._newest.count

    def usage(self) -> Usage | None:
        """What the newest attempt is charged: as reported, else the most it may cost; None for its hold."""
        return None if self._newest is None else self._usage(self._newest)

    def end(self) -> None:
        """Let no further attempt be sent, which nobody would settle; settle those before the newest."""
        with self._lock:
            self._is_over = True
            for attempt in self._earlier:
                try:
                    self._settle(attempt)
                except LedgerError as error:
                    _log.warning("the call %s stays held: %s", attempt.key, error)

    def inside(self, *, is_met: bool) -> AbstractContextManager[None]:
        """The context of the call. is_met: what `install` returned."""
        if not is_met:
            return nullcontext()
        self.around = context.current()
        return context.Inside(self if self.around is None else _Both(self.around, self))

    def reserve(self, call: ModelCall) -> Attempt:
        """An attempt that is about to be sent. The first one is held already, as is one after a free one."""
        if call.limit is None:
            raise InputError("a call without a limit is none that was held")
        with self._lock:
            if self._is_over:
                raise BudgetClosed("this call of an agent has ended; a further attempt of it is not sent")
            if self._newest is not None and not self._newest.is_free:
                self._hold_anew(call, self._newest)
            self._newest = Attempt(self, self.key, call, call.limit)
            return self._newest

    def _hold_anew(self, call: ModelCall, before: Attempt) -> None:
        is_first = before not in self._earlier
        if is_first:
            self._earlier.append(before)
        if before.has_ended:
            self._settle(before)
        self.key, self._newest = f"agent-{uuid.uuid4().hex}", None  # which an interrupt from here on ends
        try:
            self._reserve(self.key, None if call.body == before.call.body else self._most(call))
        except Exception as error:
            self.key, self._newest = before.key, before
            if is_first and not before.has_ended:  # it is settled with its call
                self._earlier.remove(before)
            if isinstance(error, BudgetExceeded | BudgetClosed):
                self.refusal = error
            raise
        self.refusal = None  # of an attempt before this one
        self._ledger.dispatch(self.key)

    def _most(self, call: ModelCall) -> TokenCount | None:
        """The most tokens of a request; None where it has no bound of its own."""
        with suppress(InputError):
            return call.worst_case(call.limit or 0, self._count, image_tokens=None, kept={})
        return None

    def _usage(self, attempt: Attempt) -> Usage | None:
        hold = self._ledger.hold(attempt.key)
        assert hold is not None
        ((name, held),) = hold.usage.items()
        if attempt.count is not None:
            return {name: attempt.count}
        most = self._most(attempt.call)
        if most is None or most.total >= held.total:
            return None
        read, written = (
            min(most.input_tokens, held.input_tokens),
            min(most.output_tokens, held.output_tokens),
        )
        return {name: _dearest(name, hold.prices, read, written)}

    def ended(self, attempt: Attempt, count: TokenCount | None, *, is_free: bool) -> None:
        """Note how an attempt ended, once; one before the newest is settled."""
        with self._lock:
            if attempt.has_ended:
                return
            attempt.has_ended, attempt.count, attempt.is_free = True, count, is_free
            if attempt in self._earlier:
                self._settle(attempt)

    def _settle(self, attempt: Attempt) -> None:
        """Settle an attempt before the newest, which has ended for us."""
        attempt.has_ended = True
        if attempt.is_free:
            self._ledger.void(attempt.key)
        else:
            self._ledger.settle(attempt.key, self._usage(attempt))

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
    """One attempt, which ends once. What the newest one cost is settled with its call.

    Attributes:
        key: of its hold.
        count: what its provider reports.
        is_free: it was refused, or could not be sent.
    """

    count: TokenCount | None = None
    has_ended = is_free = False

    def __init__(self, attempts: Attempts, key: str, call: ModelCall, limit: int) -> None:
        self.key, self.call, self.limit, self._attempts = key, call, limit, attempts

    def settle(self, count: TokenCount | None, kept: Mapping[str, int] | None = None) -> None:
        """None where no answer came, or one without a report."""
        self._attempts.ended(self, count, is_free=False)

    def void(self) -> None:
        self._attempts.ended(self, None, is_free=True)


def _dearest(name: str, prices: Mapping[str, Price], read: int, written: int) -> TokenCount:
    """So many tokens, as what costs the most: read from a cache or written to it, thought or said."""
    counts = [
        TokenCount(read, written, cached, thought, cache_write_tokens=kept)
        for cached, kept in ((0, 0), (read, 0), (0, read))
        for thought in (0, written)
    ]
    return max(counts, key=lambda each: sum(costs({name: each}, prices).values()))
