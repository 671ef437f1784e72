"""What every hook does with a call that is about to be sent: who pays, its hold, or why it is refused.

A client may send a call several times by itself; each of these attempts has a hold of its own. Leaves out how
libraries are hooked (`http_hooks`, `bedrock_hooks`, `aiohttp_hooks`), and how calls are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from typing import NamedTuple
from urllib.parse import urlsplit

from viaticum.agents.instrumentation import context
from viaticum.agents.instrumentation.context import Held, Payer
from viaticum.agents.instrumentation.requests import ModelCall, may_cost
from viaticum.errors import BudgetClosed, BudgetExceeded, LedgerError, ModelNotAllowed, ViaticumError
from viaticum.types import TokenCount

_sending: ContextVar[bool] = ContextVar("viaticum_sending", default=False)
_sent: ContextVar[SentCall | None] = ContextVar("viaticum_sent", default=None)  # what is being sent
_elsewhere: set[tuple[str, int | None]] = set()  # hosts and ports whose calls another process holds


class Refused(NamedTuple):
    """Why a call is not sent, with the status and the code of the error that its client gets."""

    status: int
    message: str
    code: str


class SentCall:
    """A call with a hold for each attempt that its client makes to send it; ends as its newest attempt.

    path: of its requests. Others that a client sends meanwhile, such as one for a token, are no attempts.
    """

    def __init__(self, payer: Payer, held: Held, path: str) -> None:
        self.call, self.limit, self.path = replace(held.call, limit=held.limit), held.limit, path
        self._payer, self._held, self._is_sent = payer, held, False

    def settle(self, count: TokenCount | None, kept: Mapping[str, int] | None = None) -> None:
        self._held.settle(count, kept)

    def void(self) -> None:
        self._held.void()

    def begin(self) -> Refused | None:
        """Hold for an attempt that is about to be sent (the first is held already), or why it is not.

        An attempt before it whose end nobody saw may have been charged for.
        """
        if not self._is_sent:
            self._is_sent = True
            return None
        self._held.settle(None)
        again = _reserve(self._payer, self.call)
        if isinstance(again, Refused):
            return again
        self._held = again or self._held
        return None

    def fail(self, error: BaseException, not_sent: Collection[str]) -> None:
        """End the attempt by an error: free where nothing was sent, else it may have been charged for.

        Args:
            error: that the attempt raised.
            not_sent: names of errors, or of their base classes, before anything was sent.
        """
        if any(cls.__name__ in not_sent for cls in type(error).__mro__):
            self._held.void()
        else:
            self._held.settle(None)

    @contextmanager
    def attempt(self, not_sent: Collection[str]) -> Iterator[None]:
        """While an attempt is sent, which ends by the error that it raises."""
        try:
            yield
        except BaseException as error:
            self.fail(error, not_sent)
            raise

    def answered(self, status: int) -> None:
        """End the attempt if its answer is an error. One that is sent on to another address goes on there."""
        if status >= 400:
            self._held.void()
        elif status >= 300:
            self._is_sent = False


def leave_to(address: str) -> None:
    """Leave calls to an address to the process that listens there, which holds them."""
    parts = urlsplit(address)
    _elsewhere.add((parts.hostname or "", parts.port))


def payer_for(url: str) -> Payer | None:
    """Who pays for a post to an address; None where nobody does, or it is met already."""
    parts = urlsplit(url)
    if _sending.get() or (parts.hostname or "", parts.port) in _elsewhere:
        return None
    payer = context.current()
    if payer is None and may_cost("POST", url):
        for each in context.open_budgets():  # several are open, and nothing says whose call this is
            each.note_unheld(f"POST {parts.hostname}{parts.path} of a thread of no budget")
    return payer


def hold(payer: Payer, call: ModelCall, path: str = "") -> SentCall | Refused | None:
    """The hold of a call, or why it is not sent; None where it is sent without one, which is noted.

    path: of its requests.
    """
    held = _reserve(payer, call)
    return held if held is None or isinstance(held, Refused) else SentCall(payer, held, path)


def _reserve(payer: Payer, call: ModelCall) -> Held | Refused | None:
    try:
        return payer.reserve(call)
    except (BudgetExceeded, BudgetClosed) as error:
        payer.note_refusal("the budget is used up")
        return Refused(402, str(error), "budget_exceeded")
    except ModelNotAllowed as error:
        payer.note_refusal(f"{call.model} is not allowed by the budget")
        return Refused(403, str(error), "model_not_allowed")
    except LedgerError as error:
        payer.note_refusal("the ledger failed")
        return Refused(503, str(error), "ledger_error")
    except ViaticumError as error:
        refuses = payer.refuses(f"{call.model}: {error}")
        return Refused(400, str(error), "cannot_be_held") if refuses else None


def unknown(payer: Payer, what: str) -> Refused | None:
    """Why a request that may cost money and is no known call is not sent; None where it is, and noted."""
    if not payer.refuses(what):
        return None
    message = f"{what} is no call whose cost is known before; allow it with unheld='allow'"
    return Refused(400, message, "cannot_be_held")


@contextmanager
def sending(sent: SentCall | None, not_sent: Collection[str]) -> Iterator[None]:
    """While a request is sent, what lies below the client is not met again, except as a further attempt.

    Args:
        sent: the call; None for one without a hold.
        not_sent: names of errors, or of their base classes, before anything was sent.
    """
    token, token_sent = _sending.set(True), _sent.set(sent)
    try:
        with nullcontext() if sent is None else sent.attempt(not_sent):
            yield
    finally:
        _sending.reset(token)
        _sent.reset(token_sent)


def being_sent(path: str | None = None) -> SentCall | None:
    """The call that is being sent in this context; None where there is none, or it has another path."""
    sent = _sent.get()
    return sent if sent is None or path in (None, sent.path) else None


def tell(library: str, verb: str, url: str) -> None:
    """Note what a library that is not held posts to a provider, or that it opens a WebSocket there.

    Raises:
        ConnectionError: the budget refuses what it cannot hold.
    """
    payer = None if _sending.get() else context.current()
    address, costs = url.partition("?")[0], may_cost("POST" if verb == "WebSocket" else verb.upper(), url)
    if payer is not None and costs and payer.refuses(f"{verb} {address} by {library}"):
        raise ConnectionError(f"viaticum: {verb} {address} by {library} cannot be held; allow it with unheld")


@contextmanager
def telling(library: str, verb: str, url: str) -> Iterator[None]:
    """`tell`, once: what lies below the library is not told again. Raises as it does."""
    tell(library, verb, url)
    token = _sending.set(True)
    try:
        yield
    finally:
        _sending.reset(token)
