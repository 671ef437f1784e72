"""One streamed call of one model: its worst case is reserved before it, its actual cost settled after it.

`Calls` is for code that calls a model without the workflow (the chat model, the server's named models). The
nodes of the workflow do the same in steps, with a checkpoint after each. Leaves out strategies and routers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import Any

from viaticum.agents.workflow.call_streams import CallStream, check_budget, check_deadline, settle_on_failure
from viaticum.agents.workflow.deadlines import Deadline
from viaticum.agents.workflow.serialization import completion_to_json, parse_completion
from viaticum.agents.workflow.telemetry import CallSpan, current
from viaticum.agents.workflow.threads import is_caller_gone
from viaticum.budgets import Entry, Hold, Ledger
from viaticum.budgets.records import digest
from viaticum.catalogue import Catalogue
from viaticum.errors import HoldError, ModelError
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.models.base import Generation, Model
from viaticum.models.settings import prompt, resolve
from viaticum.strategies import get as get_strategy
from viaticum.types import Completion, Message, Pair, Query, ThinkingDelta

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
    ) -> Generator[str | ThinkingDelta | SettledCall, None, None]:
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
        with settle_on_failure(self.ledger, key, opened, messages, generation) as pieces:
            pieces.is_held = self.resumes  # else the key may be that of another call
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
                    completion = yield from self._generate(opened, budget, key, pieces)
                    text = json.dumps(completion_to_json(completion))
                else:
                    text = hold.result
                    completion = parse_completion(text, f"the text of the call {key} in the ledger")
                    if completion.thinking:
                        yield ThinkingDelta(completion.thinking)
                    yield completion.text
                entry = self.ledger.settle(key, completion.usage.models, text)
                left = (
                    [each.left_nanousd for each in self.ledger.lineage(budget)] if span.is_recording else []
                )
                least = min((each for each in left if each is not None), default=None)
                span.end(completion, entry, least, stored=hold.result is not None)
        yield SettledCall(completion, entry)

    def _generate(
        self, model: Model, budget: str, key: str, pieces: CallStream
    ) -> Generator[str | ThinkingDelta, None, Completion]:
        """Yield pieces; return the completion."""
        pieces.is_held = True
        self.ledger.dispatch(key)
        if is_caller_gone():
            raise ModelError(NOBODY_WAITS)
        for piece in pieces:
            if isinstance(piece, Completion):
                return piece
            if is_caller_gone():
                raise pieces.ended_by_caller(ModelError(NOBODY_WAITS))
            check_deadline(pieces, self.deadline)
            check_budget(pieces, self.ledger, budget)
            yield piece
        raise AssertionError("a stream ends with its completion")
