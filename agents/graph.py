"""The workflow: route -> reserve -> generate -> settle -> read -> check -> (escalate: route again | end).

A strategy that takes several samples goes round from read to reserve until its vote is settled; a plan of several
pairs goes round from read to route until enough of their answers agree.

A node may run again after a kill; the ledger, not the checkpoint, prevents a second charge. The key of a
call is the thread and the call's number: `reserve` of a key gives the hold that is there, `generate`
dispatches it and stores the finished completion with the hold before anything else happens, and `settle` posts once.
Knows nothing of how models decode or strategies ask.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.config import get_config, get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from viaticum.agents.calls import completion_from_json, completion_to_json, give_up
from viaticum.agents.models import Generation, Model
from viaticum.agents.state import State
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.errors import BudgetExceeded, LedgerError
from viaticum.routers.query import PlanRow, Policy, QueryRouter, choose_plan
from viaticum.routers.query.grid import canonical
from viaticum.strategies import equivalent
from viaticum.strategies import get as get_strategy
from viaticum.types import (
    Completion,
    Message,
    Pair,
    Query,
    Reading,
    Route,
    Row,
    TokenCount,
)


@dataclass(frozen=True)
class Tools:
    """What the nodes work with. budget: the ledger's name for the allowance; model: a model by its name."""

    catalogue: Catalogue
    router: QueryRouter
    policy: Policy
    ledger: Ledger
    budget: str
    model: Callable[[str], Model]
    usable: Callable[[Pair], bool]


class Workflow:
    """The nodes, as methods over one set of tools; `build` compiles them into a graph."""

    def __init__(self, tools: Tools) -> None:
        self.tools = tools

    def build(
        self, checkpointer: BaseCheckpointSaver[Any] | None = None
    ) -> CompiledStateGraph[State, None, State, State]:
        graph = StateGraph(State)
        for name in ("route", "reserve", "generate", "settle", "read"):
            graph.add_node(name, getattr(self, name))
        graph.add_edge(START, "route")
        graph.add_conditional_edges("route", lambda state: END if state.get("done") else "reserve")
        graph.add_conditional_edges("reserve", lambda state: "generate" if state["route"] else check(state))
        graph.add_conditional_edges("generate", lambda state: "settle" if state["completion"] else "reserve")
        graph.add_edge("settle", "read")
        graph.add_conditional_edges("read", check)
        return graph.compile(checkpointer=checkpointer)

    def route(self, state: State) -> State:
        """The next pair of the plan; without one, or where it gave no answer, choose one of pairs not tried yet.

        With none left, or none that fits, the last reading stands.
        """
        plan, tried = state.get("plan"), state.get("tried", [])
        left_of_plan = [pair for pair in plan["pairs"] if pair not in tried] if plan else []
        if plan and left_of_plan:
            why = f"{len(state.get('votes', []))} answers so far, and no {plan['need']} agree"
            return self._take(state, Pair.parse(left_of_plan[0]), why, plan)
        if state.get("votes"):
            return {"done": True}  # what the plan's other pairs would have said cannot be paid for
        rows = self._untried(state)
        if tried and not rows:
            return {"done": True}
        left = self.tools.ledger.budget(self.tools.budget).left_nanousd
        try:
            route = choose_plan(rows, left, self.tools.policy)
        except BudgetExceeded as error:
            if not state.get("routes"):
                raise
            return {"done": True, "reason": f"{state.get('reason', '')}; then {error}"}
        pairs = [str(pair) for pair in route.plan.pairs]
        why = route.why if len(pairs) == 1 else f"{route.why}: {route.plan}"
        return self._take(state, route.plan.pairs[0], why, {"pairs": pairs, "need": route.plan.need})

    def _take(self, state: State, pair: Pair, why: str, plan: dict[str, Any]) -> State:
        row = next(row for row in self.tools.router.table(query_of(state)) if row.pair == pair)
        route = route_to_json(Route(pair, row, why))
        get_stream_writer()({"route": route})
        return {
            "route": route,
            "tried": [*state.get("tried", []), str(pair)],
            "completion": None,
            "plan": plan,
        }

    def reserve(self, state: State) -> State:
        """Hold the worst case. A pair whose worst case does not fit is left out and another one chosen."""
        held = self.tools.ledger.hold(self._key(state))
        if held is None:
            model, messages, generation = self._call(state)
            worst = model.worst_case(messages, generation.max_new_tokens)
            try:
                held = self.tools.ledger.reserve(
                    self.tools.budget,
                    self._key(state),
                    worst,
                    self.tools.catalogue.prices(worst),
                    parameters={"model": model.name, "messages": messages, **asdict(generation)},
                    tags={"model": model.name, "strategy": _pair(state).strategy},
                )
            except BudgetExceeded:
                if state.get("samples"):  # no further sample can be paid for: those that were made decide
                    return {"route": None, **self._vote(state, last=True)}
                if not state.get("routes") and not self._untried(state):
                    raise
                return {"route": None}
        return {"held": state.get("held", 0) + held.held_nanousd}

    def generate(self, state: State) -> State:
        """Write the text, unless this call was already made: then take what it gave.

        A model that fails before its first word frees its hold; one that fails later, or is interrupted, is charged
        for what it wrote. The same thread run again makes a new call. So it does where the hold's lease ran out: one
        that was never dispatched is free again, one that was stays charged as unknown until it is reconciled.
        """
        key = self._key(state)
        hold = self.tools.ledger.hold(key)
        assert hold is not None, "reserve comes first"
        if hold.state in ("void", "expired") or (hold.state in ("unknown", "posted") and hold.result is None):
            wasted = sum(
                entry.nanousd for entry in self.tools.ledger.entries(key=key) if entry.kind == "post"
            )
            return {
                "completion": None,
                "call": state["call"] + 1,
                "held": state["held"] - hold.held_nanousd,
                "cost": state.get("cost", 0) + wasted,
            }
        if hold.result is None:
            self.tools.ledger.dispatch(key)
            completion = self._write(state, key)
            hold = self.tools.ledger.attach(key, json.dumps(completion_to_json(completion)))
        assert hold.result is not None, "attach kept it"
        return {"completion": json.loads(hold.result)}

    def _write(self, state: State, key: str) -> Completion:
        model, messages, generation = self._call(state)
        show, text = get_stream_writer(), ""
        try:
            for piece in model.stream(messages, generation):
                if isinstance(piece, Completion):
                    return piece
                text += piece
                show({"text": piece})
        except BaseException as error:
            with suppress(LedgerError):  # what stopped the model is the error to tell
                give_up(
                    self.tools.ledger, key, model, messages, text, closed=not isinstance(error, Exception)
                )
            raise
        raise AssertionError("a stream ends with its completion")

    def settle(self, state: State) -> State:
        """Post what was used and free the rest."""
        completion = completion_from_json(_completion(state))
        entry = self.tools.ledger.settle(self._key(state), completion.usage.models)
        usage = dict(state.get("usage", {}))
        for name, count in completion.usage.models.items():
            usage[name] = list(astuple(TokenCount(*usage.get(name, ())) + count))
        get_stream_writer()({"cost": entry.nanousd})
        assert state["route"] is not None
        first = [] if state.get("samples") else [state["route"]]
        return {
            "cost": state.get("cost", 0) + entry.nanousd,
            "usage": usage,
            "seconds": state.get("seconds", 0.0) + completion.usage.seconds,
            "routes": [*state.get("routes", []), *first],
            "text": completion.text,
            "finish_reason": completion.finish_reason,
        }

    def read(self, state: State) -> State:
        """Read the answer out of the text; of several samples, take the vote."""
        strategy = get_strategy(_pair(state).strategy)
        reading = strategy.read(completion_from_json(_completion(state)), query_of(state))
        samples = [*state.get("samples", []), [reading.value, reading.reason]]
        return {"call": state["call"] + 1, **self._vote({**state, "samples": samples})}

    def _vote(self, state: State, *, last: bool = False) -> State:
        readings = [Reading(value, reason or "") for value, reason in state["samples"]]
        verdict = get_strategy(_pair(state).strategy).vote(readings, query_of(state), last=last)
        if verdict is None:
            return {"samples": state["samples"], "done": False}
        return {"samples": [], **self._settled(state, verdict)}

    def _settled(self, state: State, verdict: Reading) -> State:
        """Whether the plan's answers so far settle the question, and what they say: see `Plan`."""
        plan = state.get("plan")
        if plan is None or len(plan["pairs"]) == 1:
            return {"value": verdict.value, "reason": verdict.reason, "done": verdict.answered}
        votes = list(state.get("votes", []))
        if canonical(verdict.value) is not None:
            assert verdict.value is not None
            votes.append([str(_pair(state)), verdict.value])
        asked_all = set(plan["pairs"]) <= set(state["tried"])
        if not votes:
            return {"value": None, "reason": verdict.reason, "done": False}
        kind = query_of(state).kind
        counts = [sum(equivalent(one, other, kind) for _, other in votes) for _, one in votes]
        most = max(counts)
        value = next(
            value for (_, value), count in zip(votes[::-1], counts[::-1], strict=True) if count == most
        )
        done = most >= plan["need"] or asked_all
        return {"votes": votes, "value": value, "reason": "", "done": done}

    def _untried(self, state: State) -> list[PlanRow]:
        """The plans of usable pairs that this question has not been given to."""
        tried = set(state.get("tried", []))
        return [
            row
            for row in self.tools.router.plans_for(query_of(state))
            if not tried & {str(pair) for pair in row.plan.pairs}
            and all(map(self.tools.usable, row.plan.pairs))
        ]

    def _call(self, state: State) -> tuple[Model, list[Message], Generation]:
        """Who is asked, what, and how long the answer may be."""
        pair = _pair(state)
        strategy = get_strategy(pair.strategy)
        generation = Generation(
            max_new_tokens=strategy.max_new_tokens,
            stop=strategy.stop,
            temperature=strategy.temperature,
            seed=len(state.get("samples", [])),
        )
        return self.tools.model(pair.model), strategy.messages(query_of(state)), generation

    def _key(self, state: State) -> str:
        return f"{get_config()['configurable']['thread_id']}/{state['call']}"


def check(state: State) -> str:
    """An answer: end. A vote that is not settled: ask again. No answer: escalate to the next pair."""
    if state.get("done"):
        return END
    return "reserve" if state.get("samples") else "route"


def query_of(state: State) -> Query:
    return Query(state["question"], state.get("kind", "auto"))  # type: ignore[arg-type]


def _pair(state: State) -> Pair:
    assert state["route"] is not None
    return Pair.parse(state["route"]["pair"])


def _completion(state: State) -> dict[str, Any]:
    completion = state["completion"]
    assert completion is not None
    return completion


def route_to_json(route: Route) -> dict[str, Any]:
    row = asdict(route.row) | {"pair": str(route.pair)}
    return {"pair": str(route.pair), "why": route.why, "row": row}


def route_from_json(data: dict[str, Any]) -> Route:
    pair = Pair.parse(data["pair"])
    return Route(pair, Row(**(data["row"] | {"pair": pair})), data["why"])
