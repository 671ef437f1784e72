"""Soft limits: word that a budget has spent a share of its limit. They stop nothing; hard limits do.

At each share a log line, a callback and a webhook, once for a budget, its limit and its window, whatever the
number of processes: who finds the share passed takes a lease of that name in the ledger, and keeps it once
word was given and the webhook delivered. Where a process is killed in between the lease ends, and the next
call gives word again, under the same id. Leaves out how webhooks are sent
(`viaticum.agents.workflow.webhooks`).
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any

from viaticum.agents.workflow.webhooks import Outcome, Webhook, WebhookSender
from viaticum.budgets import Budget, Entry, Ledger
from viaticum.checks import checked_items, checked_type
from viaticum.errors import InputError, ViaticumError
from viaticum.money import as_usd, format_usd, usd_digits

SHARES = (0.5, 0.8, 0.95)
EVENT = "budget.share_spent"
CLAIM_SECONDS = 60.0  # in which word has to be given
FOREVER_SECONDS = 10 * 365 * 86_400.0
_log = logging.getLogger("viaticum")


@dataclass(frozen=True, slots=True)
class ShareSpent:
    """A budget has spent a share of its limit.

    id: the same for the same event, whoever finds it. spent: in the current window, where there is one.
    """

    id: str
    budget: str
    share: float
    spent_nanousd: int
    limit_nanousd: int
    left_nanousd: int
    at: datetime

    @property
    def spent_usd(self) -> Decimal:
        return as_usd(self.spent_nanousd)

    @property
    def limit_usd(self) -> Decimal:
        return as_usd(self.limit_nanousd)

    @property
    def as_json(self) -> dict[str, Any]:
        """The payload of a webhook."""
        names = ("spent_nanousd", "limit_nanousd", "left_nanousd")
        amounts = {name: getattr(self, name) for name in names}
        dollars = {name.replace("nanousd", "usd"): usd_digits(each) for name, each in amounts.items()}
        return {
            "type": EVENT,
            "timestamp": self.at.isoformat(),
            "data": {"budget": self.budget, "share": self.share, **amounts, **dollars},
        }


@dataclass(frozen=True)
class SoftLimits:
    """At which shares of a budget word is given, and to whom.

    Args:
        shares: of the limit in dollars, above 0 and at most 1.
        on_share: called in the thread of the call that passed the share. Its errors are logged.
        webhook: where the event is posted.

    Raises:
        InputError: a value is out of range.
    """

    shares: Sequence[float] = SHARES
    on_share: Callable[[ShareSpent], object] | None = None
    webhook: Webhook | None = None

    def __post_init__(self) -> None:
        shares = checked_items("shares", self.shares, (int, float), "a share such as 0.8")
        if not shares or not all(0 < share <= 1 for share in shares):
            raise InputError(f"shares of a limit are above 0 and at most 1, got {list(shares)}")
        if self.on_share is not None and not callable(self.on_share):
            raise InputError("on_share is a function that takes a ShareSpent")
        if self.webhook is not None:
            checked_type("webhook", self.webhook, Webhook, "a Webhook")


class SoftLimitWatch:
    """Watches what is posted to a ledger through this object. Threads may share it."""

    def __init__(self, ledger: Ledger, limits: SoftLimits) -> None:
        self.ledger, self.limits = ledger, limits
        self._owner, self._lock = uuid.uuid4().hex, threading.RLock()
        self._sender = WebhookSender(limits.webhook) if limits.webhook is not None else None
        tries = limits.webhook.retry_seconds if limits.webhook is not None else ()
        self._claim_seconds = CLAIM_SECONDS + 2 * sum(tries)
        self._quiet_until: dict[str, float] = {}  # by name of the claim, on the monotonic clock
        ledger.on_post.append(self.posted)

    def close(self) -> None:
        """Stop watching; webhooks that wait are tried once more."""
        self.ledger.on_post.remove(self.posted)
        if self._sender is not None:
            self._sender.close()

    def posted(self, entries: Sequence[Entry]) -> None:
        """Give word of the shares that budgets of entries, or those above them, have passed. Never raises."""
        for name in dict.fromkeys(entry.budget for entry in entries if entry.nanousd):
            self.look(name)

    def look(self, name: str) -> None:
        """The same of a budget whose calls other processes post. Never raises."""
        try:
            for budget in self.ledger.lineage(name):
                self._check(budget)
        except ViaticumError as error:
            _log.warning("soft limits were not checked: %s", error)

    def _check(self, budget: Budget) -> None:
        if not budget.limit_nanousd:
            return
        for share in sorted(set(self.limits.shares)):
            if budget.posted_nanousd < share * budget.limit_nanousd:
                return
            name, seconds = _claim_of(budget, share)
            if self._claims(name):
                self._give_word(budget, share, name, seconds)

    def _claims(self, name: str) -> bool:
        """Whether it is this object, once, that gives word."""
        with self._lock:
            if self._quiet_until.get(name, 0.0) > time.monotonic():
                return False
            self._quiet_until[name] = time.monotonic() + CLAIM_SECONDS
            return self.ledger.take_lease(name, self._owner, self._claim_seconds) == self._owner

    def _give_word(self, budget: Budget, share: float, name: str, seconds: float) -> None:
        assert budget.limit_nanousd is not None
        event = ShareSpent(
            f"msg_{hashlib.sha256(name.encode()).hexdigest()[:32]}",
            budget.name,
            share,
            budget.posted_nanousd,
            budget.limit_nanousd,
            budget.left_nanousd or 0,
            datetime.now(UTC),
        )
        _log.warning(
            "budget %s has spent %s of %s, which passes its soft limit of %.0f%%",
            event.budget,
            format_usd(event.spent_nanousd),
            format_usd(event.limit_nanousd),
            share * 100,
        )
        if self.limits.on_share is not None:
            try:
                self.limits.on_share(event)
            except Exception:
                _log.exception("on_share failed for budget %s", budget.name)
        if self._sender is None:
            self._end_claim(name, seconds, "delivered")
        else:
            self._sender.send(event.id, event.as_json, partial(self._end_claim, name, seconds))

    def _end_claim(self, name: str, seconds: float, outcome: Outcome) -> None:
        """Word was given: nobody repeats it; or this process ends first, so that another one may."""
        with suppress(ViaticumError):
            if outcome == "closed":
                self.ledger.end_lease(name, self._owner)
            else:
                self.ledger.take_lease(name, f"told {self._owner}", seconds, instead_of=self._owner)


def _claim_of(budget: Budget, share: float) -> tuple[str, float]:
    """The name of the lease of who gives word, and the seconds until the same share may be told again."""
    window = budget.window
    if window is None:
        begin, seconds = 0, FOREVER_SECONDS
    elif window.rolling:
        begin, seconds = 0, float(window.seconds)
    else:
        begin, seconds = window.bucket(datetime.now(UTC)), FOREVER_SECONDS
    return f"soft limit {share} of {budget.limit_nanousd} since {begin}: {budget.name}", seconds
