"""What a model's name means to the outside world: `auto`, a model of the catalogue, or `model+strategy`.

`auto` is the routed workflow; a model alone is asked as it is, one paid call of a plain chat; a pair goes through its
strategy and no other is tried. Whatever the name, the same few events come out. Knows nothing of HTTP.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from langgraph.checkpoint.memory import InMemorySaver

from viaticum import strategies
from viaticum.agents.cancellation import CallerGone, CancellationToken
from viaticum.agents.workflow.calls import Calls, SettledCall
from viaticum.agents.workflow.events import CallSettled, RouteChosen, TextPiece
from viaticum.agents.workflow.graph import Workflow
from viaticum.errors import InputError, ModelError, UnknownName, ViaticumError
from viaticum.models.base import Generation, Model
from viaticum.routers.query import Policy, QueryRouter
from viaticum.types import (
    Answer,
    Completion,
    Message,
    Pair,
    Query,
    RoutingTable,
    Row,
    TokenCount,
    Usage,
    split_model,
)

if TYPE_CHECKING:
    from viaticum.agents.client import Viaticum

AUTO = "auto"
NEW_TOKENS = 1024  # of a plain chat that does not say how many


@dataclass(frozen=True)
class CompletionRequest:
    """One question or chat under a name. scope: the budget that pays; key: what its holds are called.

    limit: new tokens at most (of each call), None for the strategy's own or `NEW_TOKENS`. generation: how a plain
    chat is written; a strategy keeps its own temperature, and takes `stop` and `seed` besides its own.
    """

    name: str
    messages: Sequence[Message]
    scope: str
    key: str
    limit: int | None = None
    generation: Generation = field(default_factory=Generation)
    policy: Policy | None = None


@dataclass(frozen=True, slots=True)
class CompletionStarted:
    """Who writes what follows: a model, or model+strategy. Comes once its worst case is held."""

    route: str


@dataclass(frozen=True, slots=True)
class CompletionFinished:
    """The end. text: all of it; answer: what was read from it, where a strategy did; cost in nano-dollars."""

    text: str
    finish_reason: str
    usage: Usage
    cost: int
    routes: tuple[str, ...]
    answer: str | None = None
    reason: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    logprobs: tuple[Mapping[str, Any], ...] = ()


def available_names(client: Viaticum) -> list[str]:
    """Every name that can be asked for here: models whose weights are on this machine, each alone and with each
    strategy."""
    here = [spec.name for spec in client.catalogue.models() if _is_here(client, spec.name)]
    return [AUTO, *here, *(str(Pair(name, each)) for name in here for each in strategies.names())]


def check_name(client: Viaticum, name: str) -> None:
    """Raises `UnknownName` for a model or strategy that is none."""
    models = [spec.name for spec in client.catalogue.models()]
    model, strategy = split_model(name)
    if not strategy and name != AUTO and name not in models:
        raise UnknownName("model", name, [AUTO, *models])
    if strategy:
        if model not in models:
            raise UnknownName("model", model, models)
        strategies.get(strategy)


def complete(
    client: Viaticum, asked: CompletionRequest, guard: CancellationToken
) -> Iterator[CompletionStarted | str | CompletionFinished]:
    """Who writes, pieces of text as they come (empty ones too), then the end.

    Closing the iterator, and closing the guard, ends the call at hand and charges what was read and written. Raises
    `UnknownName`, `InputError`, `BudgetExceeded`, `BudgetClosed`, `UnknownPrice`, `PromptTooLong`, `WeightsError`,
    `ModelError`, and `CallerGone` where the guard said so.
    """
    check_name(client, asked.name)
    if asked.name in client.catalogue:
        yield from _chat(client, asked)
    elif asked.generation.extra:
        raise InputError(f"{asked.name} answers in words; it cannot do: {', '.join(asked.generation.extra)}")
    else:
        yield from _solve(client, asked, guard)


def _chat(
    client: Viaticum, asked: CompletionRequest
) -> Iterator[CompletionStarted | str | CompletionFinished]:
    """One paid call of one model."""
    model = client.model(asked.name)
    limit = asked.limit or _room(model, client.catalogue[asked.name].context_length, asked.messages)
    calls = Calls(client.catalogue, client.ledger, client.model)
    told = False
    for event in calls.stream(
        asked.scope,
        asked.key,
        asked.name,
        asked.messages,
        replace(asked.generation, max_new_tokens=limit),
        tags={"strategy": "chat"},
    ):
        if not told:
            yield CompletionStarted(asked.name)
            told = True
        if isinstance(event, SettledCall):
            done = event.completion
            yield CompletionFinished(
                done.text,
                done.finish_reason,
                done.usage,
                event.entry.nanousd,
                (asked.name,),
                tool_calls=done.tool_calls,
                logprobs=done.logprobs,
            )
        else:
            yield event


def _room(model: Model, context: int, messages: Sequence[Message]) -> int:
    """New tokens that a chat may have which does not say: `NEW_TOKENS`, or what the context leaves."""
    prompt = max(count.input_tokens for count in model.worst_case(messages, 1).values())
    return max(1, min(NEW_TOKENS, context - prompt))


def _solve(
    client: Viaticum, asked: CompletionRequest, guard: CancellationToken
) -> Iterator[CompletionStarted | str | CompletionFinished]:
    """The workflow. Here, and nowhere else, the events of `Viaticum.stream` are read.

    A stream cannot take back what it showed: the text of a further call follows after an empty line. Where the
    answer is not in the text (a program's output), it comes last.
    """
    chosen, told, written = "", False, ""
    events = _under(client, asked, guard).stream(query_from_messages(asked.messages), thread_id=asked.key)
    try:
        for event in events:
            if isinstance(event, Answer):
                tail = ending(event)
                if tail:
                    yield tail
                yield _written(event, event.text + tail)
            elif isinstance(event, RouteChosen):
                chosen = str(event.route.pair)
            elif isinstance(event, TextPiece):
                if not told:
                    yield CompletionStarted(chosen)
                    told = True
                yield f"\n\n{event.text}" if written == "settled" else event.text
                written = "open"
            elif isinstance(event, CallSettled):
                written = "settled" if written else ""
    except GeneratorExit:
        guard.close()
        with suppress(CallerGone, ViaticumError):
            events.close()  # type: ignore[attr-defined]  # the call at hand is settled, and no other is made
        raise


def _written(answer: Answer, text: str) -> CompletionFinished:
    return CompletionFinished(
        text,
        answer.finish_reason,
        answer.usage,
        answer.cost,
        tuple(str(route.pair) for route in answer.routes),
        answer.value,
        answer.reason,
    )


def ending(answer: Answer) -> str:
    """What a text lacks to hold its answer: a program's output, the vote of several samples."""
    if answer.value is None or answer.value in answer.text:
        return ""
    return f"\n\n{answer.value}" if answer.text else answer.value


def query_from_messages(messages: Sequence[Message]) -> Query:
    """A conversation as a question: its last turn, after what went before. Raises `InputError` where that is not the user's."""
    *before, last = messages
    if last["role"] != "user":
        raise InputError(f"the last message is the {last['role']}'s; end with the user's question")
    return Query(last["content"], messages=tuple(before))


def _under(client: Viaticum, asked: CompletionRequest, guard: CancellationToken) -> Viaticum:
    """The client with another budget, policy and models that listen to the guard; what is loaded is shared.

    Its checkpoints are kept in memory: nobody can come back to a request that is over.
    """
    other = copy.copy(client)
    other.budget_name = asked.scope
    tools = replace(
        client._resources,
        budget=asked.scope,
        policy=asked.policy or client.policy,
        router=client.router
        if asked.name == AUTO
        else SinglePairRouter(client.router, Pair.parse(asked.name)),
        sync=lambda: None,
        model=lambda name: CancellableModel(client.model(name), guard, asked),
    )
    other.graph = Workflow(tools).build(InMemorySaver())
    return other


class SinglePairRouter(QueryRouter):
    """Wants one pair. What it expects of it is what another router does, or nothing where that one has no row."""

    def __init__(self, other: QueryRouter, pair: Pair) -> None:
        self.other, self.pair = other, pair

    def table(self, query: Query) -> RoutingTable:
        rows = [row for row in self.other.table(query) if row.pair == self.pair]
        return RoutingTable(tuple(rows or [Row(self.pair, 0.0, 0, 0, 0, 0)]))


class CancellableModel(Model):
    """A model of the workflow that asks before each piece whether anyone still wants it."""

    def __init__(self, model: Model, guard: CancellationToken, asked: CompletionRequest) -> None:
        self.model, self.guard, self.asked = model, guard, asked
        self.name, self.members = model.name, model.members

    def worst_case(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, TokenCount]:
        return self.model.worst_case(messages, self._limit(max_new_tokens))

    def count(self, text: str) -> int:
        return self.model.count(text)

    def worst_case_of(self, messages: Sequence[Message], generation: Generation) -> dict[str, TokenCount]:
        return self.model.worst_case_of(messages, self._wanted(generation))

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str | Completion]:
        try:
            self.guard.wait()
        except CallerGone:  # as an error: nothing was read, so nothing is to be paid
            raise ModelError("whoever asked went away before the model began") from None
        for piece in self.model.stream(messages, self._wanted(generation)):
            yield piece
            if not isinstance(piece, Completion):
                self.guard.wait()

    def _wanted(self, generation: Generation) -> Generation:
        own = self.asked.generation
        return replace(
            generation,
            max_new_tokens=self._limit(generation.max_new_tokens),
            stop=(*generation.stop, *own.stop),
            seed=generation.seed + own.seed,
        )

    def _limit(self, max_new_tokens: int) -> int:
        return min(max_new_tokens, self.asked.limit or max_new_tokens)


def _is_here(client: Viaticum, name: str) -> bool:
    try:
        return client._resources.is_usable(Pair(name, "direct"))
    except ViaticumError:
        return False
