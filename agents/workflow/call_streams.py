"""The stream of one call, and how its hold ends where it stops early: by an error, its caller, an interrupt.

Leaves out keys and tries (`viaticum.agents.workflow.calls`).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from viaticum.agents.workflow.deadlines import Deadline
from viaticum.agents.workflow.serialization import completion_to_json
from viaticum.budgets import Ledger
from viaticum.errors import LedgerError, ProviderTimeout
from viaticum.models.base import Generation, Model, StreamPiece
from viaticum.types import Completion, Message, ThinkingDelta
from viaticum.valid_text import ValidPieces, valid_text

E = TypeVar("E", bound=Exception)


class WatchedStream(Iterator[StreamPiece]):
    """Another stream, watched. What else it offers (`close`, what it received) is offered here too.

    Args:
        before: called before each piece but the first is requested; an error ends the stream.
        seen: called with each piece that came.
    """

    def __init__(
        self,
        pieces: Iterator[StreamPiece],
        *,
        before: Callable[[], None] = lambda: None,
        seen: Callable[[StreamPiece], None] = lambda piece: None,
    ) -> None:
        self._pieces, self._before, self._seen = pieces, before, seen
        self._is_first = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pieces, name)

    def __next__(self) -> StreamPiece:
        if not self._is_first:
            self._before()
        piece = next(self._pieces)
        self._is_first = isinstance(piece, Completion)
        self._seen(piece)
        return piece


class CallStream(Iterator[StreamPiece]):
    """The stream of one call, begun when the first piece is requested. written: what is billed so far.

    is_ended_by_caller: the model did nothing wrong, so that at least the prompt is charged.
    is_held: what is under the key of the call is its hold, if there is one, and not that of another call.
    completion: at its end.
    """

    is_ended_by_caller = False
    is_held = True
    completion: Completion | None = None
    _is_asked = False

    def __init__(self, model: Model, messages: Sequence[Message], generation: Generation) -> None:
        self.model, self._begin = model, partial(model.stream, messages, generation)
        self._pieces: Iterator[StreamPiece] | None = None
        self._written: list[str] = []
        self._valid, self._ready = ValidPieces(), deque[StreamPiece]()

    def __next__(self) -> StreamPiece:
        if self._pieces is None:
            self._pieces = self._begin()
        if not self._ready:
            self._is_asked = True
            self._ready += self._valid.add(next(self._pieces))
        piece = self._ready.popleft()
        if isinstance(piece, Completion):
            self.completion = piece
        else:
            self._written.append(piece.text if isinstance(piece, ThinkingDelta) else piece)
        return piece

    @property
    def written(self) -> str:
        # received: all that a remote model sent, such as tool calls and tags, which it does not yield
        received = getattr(self._pieces, "received", None)
        return "".join(self._written) if received is None else valid_text(received)

    @property
    def is_sent(self) -> bool:
        """Whether a provider may be at work, which no model is before the first piece was requested."""
        return self._is_asked and getattr(self._pieces, "is_sent", True)

    @property
    def is_waiting(self) -> bool:
        """Whether the call waits for the limit of its provider, before it is sent or sent again."""
        return self._is_asked and not self.is_sent

    def ended_by_caller(self, error: E) -> E:
        """The error to raise where the caller ends a call that was sent."""
        self.is_ended_by_caller = True
        return error

    def close(self) -> None:
        """Free the slot of a local model or the connection of a remote one."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()


@contextmanager
def settle_on_failure(
    ledger: Ledger, key: str, model: Model, messages: Sequence[Message], generation: Generation
) -> Iterator[CallStream]:
    """Stream a call that is reserved, sent and settled in the context. An error in it ends its hold.

    So does an interrupt, whatever step it comes in: the hold is settled as reported where the call had ended,
    else as `end_hold` says.
    """
    stream = CallStream(model, messages, generation)
    try:
        yield stream
    except BaseException as error:
        cancelled = stream.is_sent and (stream.is_ended_by_caller or is_caller_cancelled(error))
        try:
            stream.close()  # first, since it takes what has arrived and was not yielded
        finally:  # a second interrupt
            with suppress(LedgerError):  # the error to raise is the one that stopped the model
                _end_stream(ledger, key, stream, error, cancelled=cancelled)
        raise
    finally:
        stream.close()


def _end_stream(
    ledger: Ledger, key: str, stream: CallStream, error: BaseException, *, cancelled: bool
) -> None:
    hold = ledger.hold(key)
    if hold is None or hold.result is not None:  # a kept text is settled by the next try, if it is not yet
        return
    if not stream.is_held and (isinstance(error, Exception) or hold.state != "reserved"):
        return
    if stream.completion is None:
        end_hold(ledger, key, stream.model, stream.written, cancelled=cancelled)
    else:
        result = json.dumps(completion_to_json(stream.completion))
        ledger.settle(key, stream.completion.usage.models, result)


def end_hold(ledger: Ledger, key: str, model: Model, text: str, *, cancelled: bool) -> None:
    """End the hold of a call that stopped early: void it, or settle what was counted.

    It is voided if nothing was generated and the caller did not end the call.
    Settled are the held input tokens, since each model of a pair read the prompt, and the tokens of the text,
    at most the held output tokens of each model.

    Args:
        text: what was generated so far, thoughts included.
        cancelled: the caller ended the call, so that at least the prompt was read and is charged.
    """
    hold = ledger.hold(key)
    if hold is not None and (text or cancelled):
        generated = model.count(text)
        used = {
            name: replace(worst, output_tokens=min(generated, worst.output_tokens))
            for name, worst in hold.usage.items()
        }
        ledger.settle(key, used)
    else:
        ledger.void(key)


def check_budget(pieces: CallStream, ledger: Ledger, budget: str) -> None:
    """End a call that waits to be sent where its budget is not open any more, by `BudgetClosed`."""
    if pieces.is_waiting:
        ledger.check_open(budget)


def check_deadline(pieces: CallStream, deadline: Deadline | None) -> None:
    """End a call whose deadline has passed, by `DeadlineExceeded`."""
    if deadline is not None and deadline.left <= 0:
        raise pieces.ended_by_caller(
            deadline.exceeded(f"{pieces.model.name} did not end by then; what it read and wrote is charged")
        )


def timed_out(model: Model, seconds: float) -> ProviderTimeout:
    """The error of a call that the caller ends because it takes too long. No further try: each is charged."""
    return ProviderTimeout(
        f"{model.name} did not end within {seconds:g} seconds; what it read and wrote is charged"
    )


def is_caller_cancelled(error: BaseException) -> bool:
    """Whether the caller ended the call, not the model: an interrupt, a closed stream, a timeout."""
    return not isinstance(error, Exception) or isinstance(error, ProviderTimeout)
