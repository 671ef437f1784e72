"""Input, state and output of the workflow: plain JSON values, no objects of this package.

A checkpoint thus stays readable across versions and needs no pickle. What applies to one run and is not
stored, such as the scope that pays, is an `Allowance`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from langchain_core.messages import convert_to_messages, convert_to_openai_messages
from langgraph.channels.ephemeral_value import EphemeralValue
from typing_extensions import TypedDict  # which pydantic can make schemas of

from viaticum.agents.workflow.deadlines import Deadline
from viaticum.agents.workflow.failover import Failure
from viaticum.agents.workflow.serialization import completion_to_json, count_to_list, route_from_json
from viaticum.agents.workflow.sessions import checked_session
from viaticum.budgets import Entry, Hold
from viaticum.budgets.planner import WhenShort
from viaticum.checks import checked_seconds, checked_text, checked_type
from viaticum.errors import InputError
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.residency import Only, Residency, checked_only
from viaticum.routers.query import Plan, Policy, as_policy
from viaticum.types import ROLES, Answer, Completion, Message, Pair, Query, TokenCount, Usage


@dataclass(frozen=True)
class Allowance:
    """The terms of one run where they differ from the graph's settings. Passed as the graph's `context`.

    Args:
        budget: the scope that pays.
        policy: "within:DISTANCE", "best", "cheapest:ACCURACY", "fastest:ACCURACY", "weighted:PER_DOLLAR" or a
            `Policy`.
        on_short: "cheaper", "ask" or "stop": what to do when the preferred plan does not fit.
        timeout: seconds that one call may take.
        settings: how calls are generated. They are stored with the question: a run that is continued keeps
            those that it began with.
        only: labels of models, one of which a model has to have to be used: "local", a region or a tag of its
            entry. Stored with the question, and added to what the client allows.
        max_seconds: that the run may take, all its calls together, from when it begins or is continued.
        deadline: of something larger that the run is a part of, such as all nodes of a graph around it.
        session: a name of the conversation that the question belongs to: it keeps its model while that is
            worth it (`viaticum.agents.workflow.sessions`).

    Raises:
        InputError: a value is of another type, on_short or the policy is unknown, or the timeout is not
            above zero.
    """

    budget: str | None = None
    policy: str | Policy | None = None
    on_short: WhenShort | None = None
    timeout: float | None = None
    settings: GenerationSettings = NO_SETTINGS
    only: Only | None = None
    max_seconds: float | None = None
    session: str | None = None
    deadline: Deadline | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            checked_text("a budget's name", self.budget)
        if self.policy is not None:
            as_policy(self.policy)
        if self.on_short is not None and self.on_short not in get_args(WhenShort):
            raise InputError(
                f"unknown policy {self.on_short!r} for when money runs short; use cheaper, ask or stop"
            )
        if self.timeout is not None:
            checked_seconds("timeout", self.timeout)
        if self.session is not None:
            checked_session(self.session)
        if self.max_seconds is not None:
            checked_seconds("max_seconds", self.max_seconds)
        if self.deadline is not None:
            checked_type("deadline", self.deadline, Deadline, "a Deadline")
        checked_type("settings", self.settings, GenerationSettings, "GenerationSettings")
        if self.only is not None:
            object.__setattr__(self, "only", checked_only(self.only))


@dataclass(frozen=True)
class RowAllowance(Allowance):
    """For a question that is a row of a job; its earlier calls are found by ledger keys, not a checkpoint.

    run: prefix of all its ledger keys; a call that was paid for under them is not made again. plan: the plan
    to start with, whatever the policy; plans chosen later are stored with the holds. failure: of its first
    call, which was made without the graph, so that another pair is asked.
    """

    run: str = ""
    plan: Plan | None = None
    failure: Failure | None = None


class QuestionInput(TypedDict, total=False):
    """A question.

    messages: the conversation before it, as dicts or LangChain messages; without a question, their last one,
    which has to be the user's, is the question.
    """

    question: Annotated[str, EphemeralValue]
    kind: Annotated[str, EphemeralValue]
    messages: Annotated[list[Any], EphemeralValue]


class AnswerOutput(TypedDict, total=False):
    """The answer.

    value: None if no pair gave an answer; reason then says why. pair: the last one called, as model+strategy;
    routes: each pair called, its row and why; checks of answers are not among them. cost: nano-dollars,
    wasted tries included; cost_usd: the same in dollars, exactly, as a text; held: nano-dollars of the worst
    cases that were held. thinking: what the last call thought before its text. usage: by model, [input,
    output, cached input, reasoning tokens, milliseconds]. messages: the text as a message, for graphs whose
    state is a conversation.
    """

    value: str | None
    text: str
    thinking: str
    reason: str
    pair: str | None
    routes: list[dict[str, Any]]
    cost: int
    cost_usd: str
    held: int
    usage: dict[str, list[int]]
    seconds: float
    finish_reason: str
    messages: Annotated[list[Any], EphemeralValue]


class State(QuestionInput, AnswerOutput, total=False):
    """The state of one question. Inputs last one step, so that a thread may be given another question.

    run: prefix of all ledger keys of this question. asked: the question, its kind, the messages before it,
    the settings of its calls, where its data may go, and its session.
    call: number of the current call, from 0. tried: pairs already used, as model+strategy. failures:
    calls that another pair answers instead, as [pair, class of the error, message]. plan: pairs to
    call, as model+strategy, and `need`, the number of equal answers that settles it, 1 where a check does.
    votes: their answers so far, as [pair, value]. route: the current pair, its row and why. completion: the
    result of the current call. samples: the readings of this pair's calls so far, as [value, reason], while
    its strategy needs more. short: the approval request, while a person decides. on_short: what was decided,
    for the rest of the question. done: an answer was accepted, or no pair is left. until: when the run has to
    end, in seconds of `time.time`, of a graph that is called without the client.
    """

    run: str
    asked: dict[str, Any]
    call: int
    tried: list[str]
    failures: list[list[str]]
    plan: dict[str, Any] | None
    votes: list[list[str]]
    route: dict[str, Any] | None
    completion: dict[str, Any] | None
    samples: list[list[str | None]]
    short: dict[str, Any] | None
    on_short: WhenShort | None
    done: bool
    until: float | None


OUTPUT = list(State.__annotations__)  # keys that a caller asks a run for


def new_question(
    run: str,
    query: Query,
    settings: GenerationSettings = NO_SETTINGS,
    only: Only | None = None,
    session: str | None = None,
) -> State:
    """The initial state; it replaces all values that an earlier question of the thread left."""
    groups = [list(group) for group in Residency.of(only).groups]
    return {
        "run": run,
        "asked": {
            "question": query.text,
            "kind": query.kind,
            "messages": [dict(message) for message in query.messages],
            "settings": settings.model_dump(mode="json"),
            **({"only": groups} if groups else {}),
            **({} if session is None else {"session": session}),
        },
        "call": 0,
        "tried": [],
        "failures": [],
        "plan": None,
        "votes": [],
        "route": None,
        "completion": None,
        "samples": [],
        "short": None,
        "on_short": None,
        "done": False,
        "until": None,
        "value": None,
        "text": "",
        "thinking": "",
        "reason": "",
        "pair": None,
        "routes": [],
        "cost": 0,
        "cost_usd": "0",
        "held": 0,
        "usage": {},
        "seconds": 0.0,
        "finish_reason": "",
    }


def after_call(state: State, completion: Completion, hold: Hold, entry: Entry, wasted: int) -> State:
    """The update after a call: its text, and the question's totals with its cost and usage.

    A check adds to the totals alone. wasted: nano-dollars of its earlier tries.
    """
    usage = dict(state["usage"])
    for name, tokens in completion.usage.models.items():
        usage[name] = count_to_list(TokenCount(*usage.get(name, ())) + tokens)
    assert state["route"] is not None
    first = [] if state["samples"] else [state["route"]]
    totals: State = {
        "completion": completion_to_json(completion),
        "cost": state["cost"] + entry.nanousd + wasted,
        "held": state["held"] + hold.held_nanousd,
        "usage": usage,
        "seconds": state["seconds"] + completion.usage.seconds,
    }
    if Pair.parse(state["route"]["pair"]).is_check:
        return totals
    return {
        **totals,
        "routes": [*state["routes"], *first],
        "text": completion.text,
        "thinking": completion.thinking,
        "finish_reason": completion.finish_reason,
    }


def query_from_input(given: Mapping[str, Any]) -> Query:
    """The query of an input. Raises `InputError` if it has none."""
    messages = plain_messages(given.get("messages") or ())
    text: Any = given.get("question")
    kind: Any = given.get("kind") or "auto"
    if text is None:
        if not messages or messages[-1]["role"] != "user":
            raise InputError('no question; give {"question": "..."}, or messages that end with the user\'s')
        text, messages = messages[-1]["content"], messages[:-1]
    if not isinstance(text, str):
        raise InputError(f"the question is a text, got {text!r}")
    return Query(text, kind, messages=tuple(messages))


def query_of(state: State) -> Query:
    asked = state["asked"]
    return Query(asked["question"], asked["kind"], messages=tuple(asked["messages"]))


def settings_of(state: State) -> GenerationSettings:
    """The settings of the question's calls. Checkpoints of earlier versions have none."""
    return GenerationSettings.of(**state["asked"].get("settings", {}))


def residency_of(state: State) -> Residency:
    """The restrictions that the question began with."""
    return Residency.of(*state["asked"].get("only", ()))


def turns_of(state: State) -> list[Message]:
    """The conversation and the question."""
    query = query_of(state)
    return [*query.messages, {"role": "user", "content": query.text}]


def plain_messages(messages: Sequence[Any]) -> list[Message]:
    """Dicts or LangChain messages as dicts of role and content, without tool calls and their results."""
    if all(isinstance(each, dict) and set(each) == {"role", "content"} for each in messages):
        return list(messages)
    try:
        converted = convert_to_openai_messages(convert_to_messages(messages), text_format="string")
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"messages cannot be read: {error}") from None
    kept = [each for each in converted if each["role"] in ROLES and isinstance(each.get("content"), str)]
    return [{"role": each["role"], "content": each["content"]} for each in kept if each["content"]]


def answer_of(values: Mapping[str, Any], seconds: float) -> Answer:
    """The `Answer` of a finished state. seconds: how long the caller waited."""
    models = {name: TokenCount(*counts) for name, counts in values.get("usage", {}).items()}
    return Answer(
        value=values.get("value"),
        text=values.get("text", ""),
        routes=tuple(route_from_json(route) for route in values.get("routes", [])),
        usage=Usage(models, values.get("seconds", 0.0)),
        cost=values.get("cost", 0),
        held=values.get("held", 0),
        finish_reason=values.get("finish_reason", ""),
        seconds=seconds,
        reason=values.get("reason", ""),
        thinking=values.get("thinking", ""),
    )
