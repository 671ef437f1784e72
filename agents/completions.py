"""Completions under any model name: `auto`, a model of the catalogue, or `model+strategy`.

`auto` is the routed workflow; a model alone is called directly, with one paid call of a plain chat; a pair
goes through the workflow with its strategy, and no other pair is tried. With tools or a form of the answer
`auto` is one plain chat, routed among the models that can do it. All yield the same events.
Leaves out HTTP.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from langgraph.checkpoint.memory import InMemorySaver

from viaticum import strategies
from viaticum.agents.cancellation import CallerGone, CancellableModel, CancellationToken
from viaticum.agents.capable import (
    first_that_answers,
    given_answer,
    is_plain,
    models_in_order,
    offer_chat,
    settings_for,
)
from viaticum.agents.client import Viaticum
from viaticum.agents.workflow.calls import Calls, SettledCall, asked_models
from viaticum.agents.workflow.deadlines import Deadline, given_deadline
from viaticum.agents.workflow.events import CallSettled, RouteChosen, TextPiece, ThinkingPiece
from viaticum.agents.workflow.sessions import count_tokens
from viaticum.agents.workflow.settings import AUTO
from viaticum.agents.workflow.state import Allowance, RowAllowance
from viaticum.errors import InputError, UnknownName, ViaticumError
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.messages import (
    query_from_messages,
    refuse_cache_marks,
    refuse_parts,
    without_cache_marks,
    without_marks,
)
from viaticum.models.base import Generation, Model
from viaticum.models.remote.prices import may_write_cache
from viaticum.models.settings import chat_messages, resolve
from viaticum.residency import NO_RESTRICTION, Residency
from viaticum.routers.query import Policy
from viaticum.routers.query.single_pair import SinglePairRouter
from viaticum.shadow_samples import GivenAnswer
from viaticum.types import (
    Answer,
    Message,
    Pair,
    ThinkingDelta,
    Usage,
    split_model,
)

MAX_TOKENS = 1024  # default limit of new tokens of a plain chat


@dataclass(frozen=True)
class CompletionRequest:
    """One question or chat under a name.

    Args:
        name: `auto`, a model, or model+strategy.
        messages: the conversation; the last message is the user's.
        scope: the budget that pays.
        key: ledger key of a plain chat, or thread id of the workflow.
        settings: how each call is generated; what is left out is the strategy's or the catalogue entry's. A
            plain chat without a limit has `MAX_TOKENS`.
        extra: further parameters of a plain chat with a remote model, such as tools.
        policy: None for the client's.
        residency: where its data may go, beside what the client allows.
        deadline: when it has to end; None for no limit but the client's.
        session: of `auto`, the name of the conversation, which keeps its model while that is worth it.
        is_streamed: the text reaches its reader as it comes, so that no other pair can answer once some has.
        resumes: the same key may be asked again, after a kill too: calls that were paid for under it are not
            made again, and routes that were chosen are kept.
        is_lenient: what a model cannot do of these hints is left out, where it is an error else: marks for a
            provider's cache, an effort of thought, a limit of new tokens above what the context leaves.
    """

    name: str
    messages: Sequence[Message]
    scope: str
    key: str
    settings: GenerationSettings = NO_SETTINGS
    extra: Mapping[str, Any] = field(default_factory=dict)
    policy: Policy | None = None
    is_streamed: bool = True
    residency: Residency = NO_RESTRICTION
    is_lenient: bool = False
    deadline: Deadline | None = None
    session: str | None = None
    resumes: bool = False


@dataclass(frozen=True, slots=True)
class CompletionStarted:
    """The model, or model+strategy, that generates the text that follows.

    Its worst case is reserved by now. prompt_tokens: those of the prompt, roughly, until they are counted.
    """

    route: str
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CompletionFinished:
    """The end of a completion.

    text: all of it; thinking: of the last call; answer: what the strategy read from the text, if there was a
    strategy; cost: nano-dollars; stop_string: the one that ended a plain chat, "" for none that is known;
    why: the last route's reason; switched_from: the model of the session's last turn, where that was another
    one; key: ledger key of a plain chat.
    """

    text: str
    finish_reason: str
    usage: Usage
    cost: int
    routes: tuple[str, ...]
    answer: str | None = None
    reason: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    logprobs: tuple[Mapping[str, Any], ...] = ()
    thinking: str = ""
    stop_string: str = ""
    why: str = ""
    switched_from: str = ""
    key: str = ""


CompletionEvent = CompletionStarted | str | ThinkingDelta | CompletionFinished


def available_names(client: Viaticum) -> list[str]:
    """Every name that can be used here: `auto`, and each usable model alone and with each strategy."""
    usable = [spec.name for spec in client.catalogue.models() if client.is_usable(spec.name)]
    pairs = (str(Pair(name, strategy)) for name in usable for strategy in strategies.names())
    return [AUTO, *usable, *pairs]


def check_name(client: Viaticum, name: str) -> None:
    """Raises `UnknownName` for a model or a strategy that does not exist."""
    models = [spec.name for spec in client.catalogue.models()]
    model, strategy = split_model(name)
    if not strategy and name != AUTO and name not in models:
        raise UnknownName("model", name, [AUTO, *models])
    if strategy:
        if model not in models:
            raise UnknownName("model", model, models)
        strategies.get(strategy)


def complete(
    client: Viaticum, request: CompletionRequest, token: CancellationToken
) -> Iterator[CompletionEvent]:
    """Yield the start, pieces of text and thought as they arrive (empty ones too), then the end.

    Closing the iterator or the token ends the current call and charges what was read and generated.

    Raises:
        UnknownName, InputError, WeightsError: the request cannot be answered.
        BudgetExceeded, BudgetClosed, UnknownPrice, PromptTooLong: the call cannot be reserved.
        ModelError: a model failed.
        DeadlineExceeded: it did not end in time.
        ModelNotAllowed: no model that could answer may be used.
        CallerGone: the token was closed.
    """
    check_name(client, request.name)
    client = _restricted(client, request)
    request = _checked(client, request)
    if request.name in client.catalogue:
        yield from client.chatting(_chat(client, request))
    elif request.name == AUTO and is_plain(request.messages, request.extra):
        yield from client.chatting(_routed_chat(client, request))
    elif request.extra:
        extra = ", ".join(request.extra)
        raise InputError(f"{request.name} answers in words; it cannot do: {extra}")
    else:
        yield from _solve(client, request, token)


def count_prompt(client: Viaticum, request: CompletionRequest) -> int:
    """Tokens that the prompt of a plain chat likely has; of `auto`, at the model that counts the most.

    Nothing is called and nothing held. Raises what `complete` does for a request that cannot be answered.
    """
    check_name(client, request.name)
    client = _restricted(client, request)
    messages, extra = without_cache_marks(request.messages), without_marks(request.extra)
    name, _ = split_model(request.name)
    if name != AUTO:
        return client.model(name).prompt_tokens(messages, Generation(extra=extra))
    if is_plain(messages, extra):
        able = list(models_in_order(client, messages, extra, scope=request.scope))
    else:
        able = [spec.name for spec in client.catalogue.models() if client.is_usable(spec.name)]
    if not able:
        raise client.why_unusable(spec.name for spec in client.catalogue.models())
    return max(client.model(each).prompt_tokens(messages, Generation(extra=extra)) for each in able)


def _restricted(client: Viaticum, request: CompletionRequest) -> Viaticum:
    """The client under the restrictions of the request and of the budget that pays."""
    residency = _residency(client, request)
    return client.derive(residency=residency) if residency else client


def _residency(client: Viaticum, request: CompletionRequest) -> Residency:
    return request.residency & client.ledger.residency(request.scope)


def _checked(client: Viaticum, request: CompletionRequest) -> CompletionRequest:
    """The request without what its name fulfils anyway. Raises `InputError` for what it cannot do."""
    name, _ = split_model(request.name)
    spec = client.catalogue.get(name)
    if spec is not None and spec.kind == "remote" and request.name == name:
        return request
    if request.name == AUTO and is_plain(request.messages, request.extra):
        if not request.is_lenient:
            refuse_cache_marks(request.name, request.messages)
    else:
        request = _without_hints(client, request) if request.is_lenient else request
        refuse_parts(request.name, request.messages)
    effort = request.settings.reasoning_effort
    is_local = spec is not None and spec.kind != "remote"
    if is_local and effort not in (None, "none") and not client.catalogue.thinking_format(name).thinks:
        raise InputError(f"{request.name} does not think; leave reasoning_effort out")
    extra = dict(request.extra)
    if extra.get("service_tier") == "default":
        del extra["service_tier"]
    return replace(request, extra=extra)


def _without_hints(client: Viaticum, request: CompletionRequest) -> CompletionRequest:
    """The request without the hints that strategies and local models cannot heed."""
    name, _ = split_model(request.name)
    settings = request.settings if name == AUTO else settings_for(client, name, request.settings)
    return replace(request, messages=without_cache_marks(request.messages), settings=settings)


def _routed_chat(client: Viaticum, request: CompletionRequest) -> Generator[CompletionEvent, None, None]:
    """One paid call of the model that the router prefers, or of the next one where that fails."""
    request = replace(request, deadline=given_deadline(request.deadline, client.max_seconds))
    names = models_in_order(
        client,
        request.messages,
        request.extra,
        scope=request.scope,
        policy=request.policy,
        limit=request.settings.over(client.settings).max_new_tokens or MAX_TOKENS,
        deadline=request.deadline,
        session=request.session,
    )
    asked = asked_models(client.ledger, request.key) if request.resumes else []
    if asked:  # those before the last one failed, and another was asked
        names = chain(asked[-1:], (name for name in names if name not in asked))

    def ask(name: str, position: int) -> Generator[CompletionEvent, None, None]:
        key = f"{request.key}.{position + 1}" if position else request.key
        if request.resumes:
            key = f"{request.key}/{max(0, len(asked) - 1) + position}"
        settings = settings_for(client, name, request.settings)
        return _chat(client, replace(request, name=name, key=key, settings=settings))

    before = None if request.session is None else client.sessions.model(request.session)
    events = first_that_answers(names, ask, shows=lambda event: event != "", whole=not request.is_streamed)
    for event in events:
        if isinstance(event, CompletionFinished) and request.session is not None:
            (model,) = event.routes
            tokens = count_tokens(request.messages, event.text)
            client.sessions.note(request.session, model, tokens, answered=True)
            event = replace(event, switched_from="" if before in (None, model) else str(before))
        if isinstance(event, CompletionFinished):
            _offer_chat(client, request, event)
        yield event


def _offer_chat(client: Viaticum, request: CompletionRequest, done: CompletionFinished) -> None:
    def ask(name: str, scope: str, key: str) -> GivenAnswer:
        settings = settings_for(client, name, request.settings)
        again = replace(request, name=name, scope=scope, key=key, settings=settings, deadline=None)
        *_, last = _chat(client, again)
        assert isinstance(last, CompletionFinished)
        return _as_given(last)

    def worst_case() -> int:
        hold = client.ledger.hold(done.key)
        return 0 if hold is None else hold.held_nanousd

    residency = _residency(client, request)
    offer_chat(client, request.key, request.messages, _as_given(done), worst_case, residency, ask)


def _as_given(done: CompletionFinished) -> GivenAnswer:
    return given_answer(done.routes[-1], done.text, done.tool_calls, done.cost, done.usage)


def _chat(client: Viaticum, request: CompletionRequest) -> Generator[CompletionEvent, None, None]:
    """One paid call of one model."""
    model, spec = client.model(request.name), client.catalogue[request.name]
    settings = request.settings.over(client.settings)
    messages, extra = chat_messages(spec, list(request.messages), settings), request.extra
    if request.is_lenient and not may_write_cache([messages, extra], spec.price):
        messages, extra = without_cache_marks(messages), without_marks(extra)
    limit = _default_limit(model, spec.usable_context, messages)
    generation = resolve(client.catalogue, spec.name, call=settings, default_limit=limit)
    generation = replace(generation, extra=extra)
    prompt = 0
    if request.is_lenient:
        prompt = model.prompt_tokens(messages, generation)
        room = max(1, spec.usable_context - prompt)
        generation = replace(generation, max_new_tokens=min(generation.max_new_tokens, room))
    deadline = given_deadline(request.deadline, client.max_seconds)
    calls = Calls(
        client.catalogue, client.ledger, client.model, deadline, client.labels, resumes=request.resumes
    )
    started = False
    events = calls.stream(
        request.scope, request.key, request.name, messages, generation, tags={"strategy": "chat"}
    )
    with closing(events):
        for event in events:
            if not started and event != "":  # an error before the first text is one of the request
                yield CompletionStarted(request.name, prompt)
                started = True
            yield _chat_end(request, event) if isinstance(event, SettledCall) else event


def _chat_end(request: CompletionRequest, call: SettledCall) -> CompletionFinished:
    done = call.completion
    return CompletionFinished(
        done.text,
        done.finish_reason,
        done.usage,
        call.entry.nanousd,
        (request.name,),
        tool_calls=done.tool_calls,
        logprobs=done.logprobs,
        thinking=done.thinking,
        stop_string=done.stop_string,
        key=request.key,
    )


def _default_limit(model: Model, context: int, messages: Sequence[Message]) -> int:
    """New tokens of a chat without a limit: `MAX_TOKENS`, or what the context leaves."""
    prompt = max(count.input_tokens for count in model.worst_case(messages, 1).values())
    return max(1, min(MAX_TOKENS, context - prompt))


def _solve(
    client: Viaticum, request: CompletionRequest, token: CancellationToken
) -> Iterator[CompletionEvent]:
    """Convert the events of `Viaticum.stream`.

    A stream cannot take back text: that of a further call follows after an empty line. If the answer is not
    in the text (a program's output), it comes last.
    """
    pair, started, settled = "", False, False
    prompt = count_tokens(request.messages)
    if request.deadline is not None:
        request.deadline.check()
    seconds = None if request.deadline is None else request.deadline.left
    allowance = Allowance(settings=request.settings, max_seconds=seconds, session=request.session)
    if request.resumes:
        allowance = RowAllowance(**vars(allowance), run=request.key)
    events = _derive(client, request, token).stream(
        query_from_messages(request.messages), thread_id=request.key, allowance=allowance
    )
    before = None if request.session is None else client.sessions.model(request.session)
    try:
        for event in events:
            if isinstance(event, Answer):
                tail = missing_answer(event)
                if tail:
                    yield tail
                yield _finished(event, event.text + tail, before)
            elif isinstance(event, RouteChosen):
                pair = str(event.route.pair)
            elif isinstance(event, ThinkingPiece | TextPiece):
                if not started:
                    yield CompletionStarted(pair, max(1, prompt))
                    started = True
                if isinstance(event, ThinkingPiece):
                    yield ThinkingDelta(event.text)
                    continue
                yield f"\n\n{event.text}" if settled else event.text
                settled = False
            elif isinstance(event, CallSettled):
                settled = started
    except Exception:  # it ended the stream
        raise
    except BaseException:  # the reader left, or an interrupt came while the stream waited
        token.close()
        with suppress(CallerGone, ViaticumError):
            events.close()  # type: ignore[attr-defined]  # settles the current call; no other is made
        raise


def _finished(answer: Answer, text: str, before: str | None) -> CompletionFinished:
    """before: the model of the session's last turn."""
    last = answer.routes[-1] if answer.routes else None
    switched = last is not None and before not in (None, last.pair.model)
    return CompletionFinished(
        text,
        answer.finish_reason,
        answer.usage,
        answer.cost,
        tuple(str(route.pair) for route in answer.routes),
        answer.value,
        answer.reason,
        thinking=answer.thinking,
        why="" if last is None else last.why,
        switched_from=str(before) if switched else "",
    )


def missing_answer(answer: Answer) -> str:
    """What a text lacks to contain its answer: a program's output, the vote of several samples."""
    if answer.value is None or answer.value in answer.text:
        return ""
    return f"\n\n{answer.value}" if answer.text else answer.value


def _derive(client: Viaticum, request: CompletionRequest, token: CancellationToken) -> Viaticum:
    """The client with the request's budget, policy and pair, and with models that check the token.

    Its checkpoints are in memory: a finished request is never resumed.
    """
    router = client.router
    if request.name != AUTO:
        router = SinglePairRouter(Pair.parse(request.name), estimates=client.router)
    return client.derive(
        checkpointer=InMemorySaver(),
        router=router,
        budget=request.scope,
        policy=request.policy or client.policy,
        sync=lambda: None,
        can_restart=not request.is_streamed,
        model=lambda name: CancellableModel(client.model(name), token),
    )
