"""One streamed call of one model: its worst case is reserved before it, its actual cost settled after it.

`Calls` is for code that calls a model without the workflow (the chat model, the server's named models). The
nodes of the workflow do the same in steps, with a checkpoint after each. Leaves out strategies and routers.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import count
from typing import Any, TypeVar

from viaticum.agents.workflow.deadlines import Deadline
from viaticum.agents.workflow.serialization import completion_to_json, parse_completion
from viaticum.agents.workflow.telemetry import CallSpan, current
from viaticum.agents.workflow.threads import is_caller_gone
from viaticum.budgets import Entry, Hold, Ledger
from viaticum.budgets.records import digest
from viaticum.catalogue import Catalogue
from viaticum.errors import HoldError, LedgerError, ModelError, ProviderTimeout
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.models.base import Generation, Model, StreamPiece
from viaticum.models.settings import prompt, resolve
from viaticum.strategies import get as get_strategy
from viaticum.types import Completion, Message, Pair, Query, ThinkingDelta
from viaticum.valid_text import ValidPieces, valid_text

_ALWAYS_STORED = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop", "extra")
_DEFAULTS = Generation()
UNUSED_NUMBERS = 3  # calls in a row that held nothing, after which a request made no further one
NOBODY_WAITS = "nobody waits for this answer any more; what was read and written is charged"


def generation_parameters(generation: Generation) -> dict[str, Any]:
    """The settings of a call as the ledger stores them.

    Settings that came later are left out where they are not set, so that calls which earlier versions made
    keep their digest.
    """
    names = [each.name for each in fields(Generation)]
    return {
        name: getattr(generation, name)
        for name in names
        if name in _ALWAYS_STORED or getattr(generation, name) != getattr(_DEFAULTS, name)
    }


E = TypeVar("E", bound=Exception)


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One call: the model, the messages, how to generate, and all of it as the ledger stores it."""

    model: Model
    messages: list[Message]
    generation: Generation

    @classmethod
    def of(
        cls,
        model: Model,
        catalogue: Catalogue,
        pair: Pair,
        query: Query,
        settings: GenerationSettings = NO_SETTINGS,
        sample: int = 0,
    ) -> ModelCall:
        """The call that the strategy of a pair makes.

        Args:
            catalogue: with the entry of the model.
            settings: what the caller sets.
            sample: index among the samples of the strategy, added to the seed.
        """
        strategy = get_strategy(pair.strategy)
        generation = resolve(catalogue, pair.model, strategy, settings, sample=sample)
        return cls(model, prompt(catalogue[pair.model], strategy, query, settings), generation)

    @property
    def parameters(self) -> dict[str, Any]:
        generation = generation_parameters(self.generation)
        return {"model": self.model.name, "messages": self.messages, **generation}


def next_try(ledger: Ledger, first: str, parameters: str, *, runs_here: bool) -> tuple[str, Hold | None, int]:
    """The key of the next try of a call, its hold if a valid one exists, and the cost of earlier tries.

    Args:
        first: the key of the first try.
        parameters: the digest of the parameters of the call.
        runs_here: of the model (see `Model`). If it does not, a call that was sent and of which no text is
            kept is marked unknown: it may be charged for.

    Returns:
        key, hold or None, nano-dollars posted for earlier tries.
    """
    wasted = 0
    for key, found in tries(ledger, first):
        is_lost = found is not None and is_unanswered(found) and not runs_here
        hold = ledger.abandon(key) if is_lost else found
        if hold is None or (hold.parameters == parameters and is_valid(hold)):
            return key, hold, wasted
        posts = [entry for entry in ledger.entries(key=key) if entry.kind == "post"]
        wasted += sum(entry.nanousd for entry in posts)
    raise AssertionError("numbers do not end")


def tries(ledger: Ledger, first: str) -> Iterator[tuple[str, Hold | None]]:
    """The keys of the tries of a call and their holds, without end; None for a key not used yet."""
    for number in count(1):
        key = first + (f".{number}" if number > 1 else "")
        yield key, ledger.hold(key)


def existing_tries(ledger: Ledger, first: str) -> Iterator[Hold]:
    """The holds of the tries that were made of a call."""
    for _, hold in tries(ledger, first):
        if hold is None:
            return
        yield hold


def holds_of(ledger: Ledger, key: str) -> Iterator[Hold]:
    """The holds of all calls of a request that can be resumed: of its own key, and of its numbered calls."""
    yield from existing_tries(ledger, key)
    number = missing = 0
    while missing < UNUSED_NUMBERS:
        found = list(existing_tries(ledger, f"{key}/{number}"))
        yield from found
        number, missing = number + 1, 0 if found else missing + 1


def posted_nanousd(ledger: Ledger, key: str) -> int:
    """What a request that can be resumed has cost so far, in nano-dollars."""
    entries = (entry for hold in holds_of(ledger, key) for entry in ledger.entries(key=hold.key))
    return sum(entry.nanousd for entry in entries if entry.kind == "post")


def asked_models(ledger: Ledger, key: str) -> list[str]:
    """The models that a request, whose numbered calls are one for each model, asked before it was stopped.

    Empty for one that came to its end: where all of them failed, all are asked again.
    """
    found: list[Hold] = []
    for number in count():
        tries_of_call = list(existing_tries(ledger, f"{key}/{number}"))
        if not tries_of_call:
            break
        found.append(tries_of_call[-1])
    is_stopped = bool(found) and found[-1].state not in ("void", "expired")
    return [hold.tags["model"] for hold in found] if is_stopped else []


def is_unanswered(hold: Hold) -> bool:
    """Whether a call was sent, and its text has not been kept."""
    return hold.state == "dispatched" and hold.result is None


def is_valid(hold: Hold) -> bool:
    """Whether a hold belongs to a call that can continue, or has its text."""
    if hold.state in ("void", "expired"):
        return False
    return hold.result is not None or hold.state in ("reserved", "dispatched")


@dataclass(frozen=True, slots=True)
class SettledCall:
    """A finished call, and the entry that posted its cost."""

    completion: Completion
    entry: Entry


@dataclass(frozen=True)
class Calls:
    """Makes paid calls of named models.

    Args:
        model: returns a model by its name.
        deadline: when a call has to end; None for no limit.
        labels: returns where the data of a model's calls goes, for budgets that restrict it.
        resumes: a key whose call ended without a text, or was lost in a kill, has further tries under keys of
            their own (`next_try`); without it such a key is an error.
    """

    catalogue: Catalogue
    ledger: Ledger
    model: Callable[[str], Model]
    deadline: Deadline | None = None
    labels: Callable[[str], Iterable[str]] = lambda model: ()
    resumes: bool = False

    def stream(
        self,
        budget: str,
        key: str,
        model: str,
        messages: Sequence[Message],
        generation: Generation,
        *,
        tags: Mapping[str, str] | None = None,
    ) -> Iterator[str | ThinkingDelta | SettledCall]:
        """Yield pieces of text and thought as they arrive, then the settled call.

        Reserves at the first piece. The same key and call again yields the stored text and charges nothing.
        Closing the iterator early posts what was counted until then; a model that fails before its first
        piece frees the hold.

        Args:
            budget: the scope that pays.
            key: idempotency key of the call.
            model: name of the model.
            tags: stored with the hold, in addition to the model.

        Raises:
            BudgetExceeded, BudgetClosed, UnknownPrice, PromptTooLong, ModelNotAllowed: the call cannot be
                reserved.
            ModelError: the model failed.
            DeadlineExceeded: the deadline has passed.
            HoldError: the key belongs to another call, or to one that ended without a text.
        """
        if self.deadline is not None:
            self.deadline.check()
        opened = self.model(model)
        parameters = {"model": model, "messages": messages, **generation_parameters(generation)}
        hold = None
        if self.resumes:
            key, hold, _ = next_try(self.ledger, key, digest(parameters), runs_here=opened.runs_here)
        if hold is None:
            worst = opened.worst_case_of(messages, generation)
            hold = self.ledger.reserve(
                budget,
                key,
                worst,
                self.catalogue.prices(worst),
                parameters=parameters,
                tags={"model": model, **(tags or {})},
                hint=opened.counting_hint,
                labels=self.labels(model),
            )
        with CallSpan(current(), self.catalogue[model], generation, hold) as span:
            if hold.result is None:
                if hold.state != "reserved" and not self.resumes:
                    raise HoldError(
                        f"the call {key!r} is {hold.state}, and no text of it was kept; take another key"
                    )
                completion = yield from self._generate(opened, key, messages, generation)
                text = json.dumps(completion_to_json(completion))
            else:
                text = hold.result
                completion = parse_completion(text, f"the text of the call {key} in the ledger")
                if completion.thinking:
                    yield ThinkingDelta(completion.thinking)
                yield completion.text
            entry = self.ledger.settle(key, completion.usage.models, text)
            left = [each.left_nanousd for each in self.ledger.lineage(budget)] if span.is_recording else []
            least = min((each for each in left if each is not None), default=None)
            span.end(completion, entry, least, stored=hold.result is not None)
        yield SettledCall(completion, entry)

    def _generate(
        self, model: Model, key: str, messages: Sequence[Message], generation: Generation
    ) -> Generator[str | ThinkingDelta, None, Completion]:
        """Yield pieces; return the completion."""
        self.ledger.dispatch(key)
        with settle_on_failure(self.ledger, key, model, messages, generation) as pieces:
            for piece in pieces:
                if isinstance(piece, Completion):
                    return piece
                if is_caller_gone():
                    raise pieces.ended_by_caller(ModelError(NOBODY_WAITS))
                check_deadline(pieces, self.deadline, model)
                yield piece
        raise AssertionError("a stream ends with its completion")


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
    """

    is_ended_by_caller = False

    def __init__(self, model: Model, messages: Sequence[Message], generation: Generation) -> None:
        self._begin = partial(model.stream, messages, generation)
        self._pieces: Iterator[StreamPiece] | None = None
        self._written: list[str] = []
        self._valid, self._ready = ValidPieces(), deque[StreamPiece]()

    def __next__(self) -> StreamPiece:
        if self._pieces is None:
            self._pieces = self._begin()
        if not self._ready:
            self._ready += self._valid.add(next(self._pieces))
        piece = self._ready.popleft()
        if not isinstance(piece, Completion):
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
        return self._pieces is not None and getattr(self._pieces, "is_sent", True)

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
    """Stream a call whose hold is dispatched. An error inside the context ends the hold: see `end_hold`."""
    stream = CallStream(model, messages, generation)
    try:
        yield stream
    except BaseException as error:
        cancelled = stream.is_sent and (stream.is_ended_by_caller or is_caller_cancelled(error))
        stream.close()  # first, since it takes what has arrived and was not yielded
        with suppress(LedgerError):  # the error to raise is the one that stopped the model
            end_hold(ledger, key, model, stream.written, cancelled=cancelled)
        raise
    finally:
        stream.close()


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


def check_deadline(pieces: CallStream, deadline: Deadline | None, model: Model) -> None:
    """End a call whose deadline has passed, by `DeadlineExceeded`."""
    if deadline is not None and deadline.left <= 0:
        raise pieces.ended_by_caller(
            deadline.exceeded(f"{model.name} did not end by then; what it read and wrote is charged")
        )


def timed_out(model: Model, seconds: float) -> ProviderTimeout:
    """The error of a call that the caller ends because it takes too long. No further try: each is charged."""
    return ProviderTimeout(
        f"{model.name} did not end within {seconds:g} seconds; what it read and wrote is charged"
    )


def is_caller_cancelled(error: BaseException) -> bool:
    """Whether the caller ended the call, not the model: an interrupt, a closed stream, a timeout."""
    return not isinstance(error, Exception) or isinstance(error, ProviderTimeout)
