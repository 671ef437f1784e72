"""Calls through `auto` that have no strategy: with tools, an answer in a form, or images.

Such a call is one plain chat of one model. Each model that can do it stands for its best pair in the router's
table, and the policy chooses among them; where one fails before its first piece, the next one is called.
Leaves out how one call is made (`viaticum.agents.completions`, `viaticum.agents.integrations.chat_model`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

from viaticum.agents.client import Viaticum
from viaticum.agents.workflow.approval import nanousd_left
from viaticum.agents.workflow.deadlines import Deadline, in_time, with_seconds
from viaticum.agents.workflow.failover import FAILOVER
from viaticum.agents.workflow.sessions import choose_turn
from viaticum.budgets.records import digest
from viaticum.catalogue import ModelSpec
from viaticum.errors import BudgetExceeded, InputError
from viaticum.generation import GenerationSettings
from viaticum.messages import images_in
from viaticum.models.remote.prices import thinks_by_default
from viaticum.residency import Residency
from viaticum.routers.query import Policy, QueryRouter, choose
from viaticum.routers.query.limits import Limit, limit_table
from viaticum.shadow_samples import GivenAnswer
from viaticum.types import ROLES, Message, Query, RoutingTable, Row, Usage, split_model

Need = Literal["tools", "json_schema", "vision"]
_FORMS = ("tools", "response_format")  # parameters that no strategy takes
_CAN = {
    "tools": "call tools",
    "json_schema": "answer by a JSON schema",
    "vision": "read images, and says in its entry (image_tokens) how many tokens one has at most",
}
_log = logging.getLogger("viaticum")
Event = TypeVar("Event")


def is_plain(messages: Sequence[Message], extra: Mapping[str, Any]) -> bool:
    """Whether a request can only be a plain chat: strategies know no tools, forms or images."""
    has_parts = any(_has_tools(message) or images_in(message) for message in messages)
    return has_parts or any(extra.get(name) for name in _FORMS)


def needs_of(messages: Sequence[Message], extra: Mapping[str, Any]) -> set[Need]:
    """What a model has to be able to do. A JSON mode without a schema is no need: most models have it."""
    needs = set[Need]()
    if extra.get("tools") or any(map(_has_tools, messages)):
        needs.add("tools")
    if (extra.get("response_format") or {}).get("type") == "json_schema":
        needs.add("json_schema")
    if any(map(images_in, messages)):
        needs.add("vision")
    return needs


def _has_tools(message: Message) -> bool:
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def models_in_order(
    client: Viaticum,
    messages: Sequence[Message],
    extra: Mapping[str, Any],
    *,
    scope: str,
    policy: Policy | None = None,
    limit: int | None = None,
    deadline: Deadline | None = None,
    session: str | None = None,
) -> Iterator[str]:
    """The models that can do a request, in the order in which the policy prefers them at what is left.

    Models that the router does not know come last, the cheaper ones first.

    Args:
        scope: the budget that pays.
        policy: None for the client's.
        limit: most new tokens of the call.
        deadline: when the call has to end: models that are likely to take longer come after the others.
        session: the conversation's name: its model comes first while that is worth it.

    Raises:
        InputError: no model of the catalogue can do it.
        ViaticumError: those that can cannot be used here; it says why.
    """
    needs = needs_of(messages, extra)
    able = [spec for spec in client.catalogue.models() if _can(spec, needs)]
    usable = {spec.name: spec for spec in able if client.is_usable(spec.name)}
    if not able:
        wanted = " and ".join(_CAN[need] for need in sorted(needs)) or "answer in another form than text"
        raise InputError(
            f"no model here can {wanted}; add one that does: viaticum models add openai/gpt-5-mini"
        )
    if not usable:
        raise client.why_unusable(spec.name for spec in able)
    rows = best_rows(client.router, question_of(messages), usable, lambda pair: limit)
    chosen = policy or client.policy
    if rows and chosen.reads_seconds:
        timed = with_seconds(list(rows.values()), client.seconds_of)
        chosen.check(timed)
        rows = {row.pair.model: row for row in timed}
    if rows and session is not None:
        quick_rows = in_time(list(rows.values()), client.seconds_of, deadline) or list(rows.values())
        name = _choice_of_session(client, quick_rows, scope, chosen, session, messages)
        yield name
        del rows[name]
        del usable[name]
    while rows:
        quick = in_time(list(rows.values()), client.seconds_of, deadline) or list(rows.values())
        yield (name := _choice(client, quick, scope, chosen))
        del rows[name]
        del usable[name]
    yield from sorted(usable, key=lambda name: usable[name].output_price or 0)


def _can(spec: ModelSpec, needs: Collection[Need]) -> bool:
    """Whether an entry may be routed to, and says of no need that it cannot."""
    if spec.kind != "remote" or not spec.default or ("vision" in needs and spec.image_tokens is None):
        return False
    return all(getattr(spec, need) is not False for need in needs)


def _choice(client: Viaticum, rows: Sequence[Row], scope: str, policy: Policy) -> str:
    try:
        left = nanousd_left(client.ledger.lineage(scope))
        return choose(RoutingTable(tuple(rows)), left, policy).pair.model
    except BudgetExceeded:  # by estimates: the ledger decides by the worst case
        return min(rows, key=lambda row: row.cost_p90).pair.model


def _choice_of_session(
    client: Viaticum,
    rows: Sequence[Row],
    scope: str,
    policy: Policy,
    session: str,
    messages: Sequence[Message],
) -> str:
    in_loop = messages[-1]["role"] == "tool"
    state = client.sessions.state(session, messages, in_loop=in_loop)
    try:
        left = nanousd_left(client.ledger.lineage(scope))
        by_model = {row.pair.model: row for row in rows}
        return choose_turn(by_model, state, client.catalogue, policy, left).model
    except BudgetExceeded:
        return min(rows, key=lambda row: row.cost_p90).pair.model


def best_rows(router: QueryRouter, query: Query, models: Collection[str], limit: Limit) -> dict[str, Row]:
    """Of each of these models its row with the highest accuracy, under limits of new tokens."""
    best: dict[str, Row] = {}
    for row in limit_table(router.table(query), limit):
        name = row.pair.model
        if name in models and (name not in best or row.accuracy > best[name].accuracy):
            best[name] = row
    return best


def question_of(messages: Sequence[Message]) -> Query:
    """What the router reads: the last turn of the user, after the conversation before it."""
    turns = [
        index for index, each in enumerate(messages) if each["role"] == "user" and each["content"].strip()
    ]
    if not turns and any(map(images_in, messages)):
        return Query("What does the image show?")
    if not turns:
        raise InputError("no user turn with a text among the messages; add what you want answered")
    before = [each for each in messages[: turns[-1]] if each["role"] in ROLES and each["content"]]
    history: list[Message] = [{"role": each["role"], "content": each["content"]} for each in before]
    return Query(messages[turns[-1]]["content"], messages=tuple(history))


def settings_for(client: Viaticum, name: str, settings: GenerationSettings) -> GenerationSettings:
    """The settings without an effort of thought where a model does not think, as in the workflow."""
    if settings.reasoning_effort is None:
        return settings
    if client.catalogue.thinking_format(name).thinks or thinks_by_default(client.catalogue[name]):
        return settings
    return settings.model_copy(update={"reasoning_effort": None})


def first_that_answers(
    names: Iterator[str],
    ask: Callable[[str, int], Generator[Event, None, None]],
    *,
    shows: Callable[[Event], bool],
    whole: bool = False,
) -> Iterator[Event]:
    """The events of the first model that answers. Each is asked under keys, and a hold, of its own.

    Args:
        ask: starts the call of a model; also given its position in the order.
        shows: whether an event shows something of the answer, after which no other model can give it.
        whole: nobody sees the events before the last one, so that a call may fail at any time.

    Raises:
        BudgetExceeded, ModelError, PromptTooLong: of the first model, where none answers.
    """
    first: Exception | None = None
    for position, name in enumerate(names):
        events, kept, has_begun = ask(name, position), list[Event](), False
        try:
            for event in events:
                if whole and shows(event):
                    kept.append(event)
                    continue
                has_begun = has_begun or shows(event)
                yield event
            yield from kept
            return
        except (BudgetExceeded, *FAILOVER) as error:
            if has_begun:
                raise
            first = first or error
            _log.warning("another model is asked, since %s failed: %s", name, error)
        finally:
            events.close()
    assert first is not None, "there is a model to ask"
    raise first


def offer_chat(
    client: Viaticum,
    request: str,
    messages: Sequence[Message],
    live: GivenAnswer,
    worst_case: Callable[[], int],
    residency: Residency,
    ask: Callable[[str, str, str], GivenAnswer],
) -> None:
    """Offer a finished chat for a shadow call (`viaticum.agents.workflow.shadow`).

    Args:
        request: id of the request.
        live: its answer.
        worst_case: returns that of the call which gave it, in nano-dollars.
        residency: where its data may go, by the request and the budget that paid for it.
        ask: makes the chat once more, given the model, the scope that pays and the ledger key.
    """
    if client.shadow is None:
        return
    name, _ = split_model(client.shadow.sampling.model)
    texts = [message["content"] for message in messages if message["role"] == "user"]
    text = texts[-1] if texts else ""
    again = partial(ask, name)
    client.shadow.offer_chat(request, text, live, worst_case, residency, again)


def given_answer(
    model: str, text: str, tool_calls: Sequence[Mapping[str, Any]], cost: int, usage: Usage
) -> GivenAnswer:
    """An answer by a digest of its text and of the tools that it calls, whatever the ids of the calls are."""
    calls = [each.get("function") for each in tool_calls]
    return GivenAnswer(model, digest([text, calls])[:16], cost, usage.seconds)
