"""The workflow: begin -> call -> read -> (another sample: call | no answer: route, call | end), and `ask` beside it.

    begin   what is asked, what all ledger keys of this question begin with, and the first route
    route   the next pair of the plan, or a new plan of pairs not tried yet, that is worth its price
    call    reserve the worst case and dispatch, let the model write, settle what it cost
    read    the answer out of the text; a vote of samples, or of the pairs of a plan
    ask     a person decides, where the budget is short and the policy is to ask

A strategy that takes several samples goes round from read to call until its vote is settled; a plan of several
pairs goes round from read to route until enough of their answers agree.

A node may run again after a kill, a retry or a replay; the ledger, not the checkpoint, prevents a second charge. The key
of a call is the task id of `begin`, which is the same whenever this run is taken up again and another for every other
question of the thread, and the call's number; each further try of the call reserves under a key of its own. A key that
has a hold keeps it: `reserve` also dispatches, in one transaction, and `settle` posts once and keeps the text.
Knows nothing of how models decode or strategies ask.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any, Literal, cast

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime
from langgraph.types import Checkpointer, Command, RetryPolicy, interrupt

from viaticum.agents.workflow.approval import (
    decided,
    decision_needed,
    left_of,
    raise_limit,
    shortage,
    tightest,
)
from viaticum.agents.workflow.callbacks import StreamReporter
from viaticum.agents.workflow.calls import (
    ModelCall,
    next_try,
    settle_on_failure,
)
from viaticum.agents.workflow.nodes import Node, ThreadPool, is_stopped
from viaticum.agents.workflow.serialization import (
    completion_from_json,
    completion_to_json,
    plan_from_hold,
    plan_to_tags,
    route_to_json,
    row_to_json,
)
from viaticum.agents.workflow.settings import TRIES, as_policy
from viaticum.agents.workflow.state import (
    Allowance,
    AnswerOutput,
    QuestionInput,
    RowAllowance,
    State,
    new_question,
    query_given,
    query_of,
)
from viaticum.agents.workflow.voting import pair_of, vote_of_samples
from viaticum.budgets import Budget, Entry, Hold, Ledger
from viaticum.budgets.planner import Option, WhenShort
from viaticum.budgets.planner import plan as plan_within
from viaticum.budgets.records import digest
from viaticum.catalogue import Catalogue
from viaticum.errors import BudgetExceeded, InputError, ModelError, ModelUnavailable
from viaticum.models.base import Model
from viaticum.routers.query import Plan, PlanRoute, PlanRow, Policy, QueryRouter, choose_plan
from viaticum.strategies import get as get_strategy
from viaticum.types import Completion, Pair, Route, Row, TokenCount

Graph = CompiledStateGraph[State, Allowance, QuestionInput, AnswerOutput]
Next = Literal["route", "call", "parse", "approval", "__end__"]
BACKOFF = 0.5  # seconds before the second try, doubled before each further one


@dataclass(frozen=True)
class WorkflowResources:
    """What the nodes work with. budget: the scope that pays; model: a model by its name; usable: whether a pair's model
    is here. sync: makes the checkpoints so far survive a power cut, where the checkpointer does not wait for the disk
    itself; done before each hold. policy, on_short and timeout as in `Allowance`, which has the last word. tries: of one call, where the model
    is unavailable, the second after `backoff` seconds. threads: where nodes run that an event loop calls."""

    catalogue: Catalogue
    router: QueryRouter
    policy: Policy
    ledger: Ledger
    budget: str
    model: Callable[[str], Model]
    is_usable: Callable[[Pair], bool]
    sync: Callable[[], None] = lambda: None
    on_short: WhenShort = "cheaper"
    timeout: float | None = None
    tries: int = TRIES
    backoff: float = BACKOFF
    threads: ThreadPool = field(default_factory=lambda: ThreadPool(16))


class Workflow:
    """The nodes, as methods over one set of tools; `build` compiles them into a graph."""

    def __init__(self, resources: WorkflowResources) -> None:
        self.resources = resources

    def build(
        self, checkpointer: Checkpointer | BaseCheckpointSaver[Any] = None, name: str = "viaticum"
    ) -> Graph:
        """checkpointer: None inherits that of the graph which this one is a part of."""
        graph = StateGraph(State, Allowance, input_schema=QuestionInput, output_schema=AnswerOutput)
        retry = RetryPolicy(
            initial_interval=self.resources.backoff,
            max_attempts=self.resources.tries,
            retry_on=ModelUnavailable,
        )
        graph.add_node("start", self._node(self.start), destinations=("call", "approval", END))
        graph.add_node("route", self._node(self.route), destinations=("call", "approval", END))
        graph.add_node(
            "call",
            self._node(self.call),
            retry_policy=retry,
            destinations=("parse", "route", "approval", END),
        )
        graph.add_node("parse", self._node(self.parse), destinations=("call", "route", END))
        graph.add_node("approval", self._node(self.approval), destinations=("route", "call", END))
        graph.add_edge(START, "start")
        return graph.compile(checkpointer=checkpointer, name=name)

    def _node(self, function: Callable[[State, Runtime[Allowance]], Any]) -> Node:
        return Node(function, self.resources.threads)

    # Nodes

    def start(self, state: State, runtime: Runtime[Allowance]) -> Command[Next]:
        """Take the question in, and choose who is asked first: one step, so that one checkpoint holds both.

        Raises `InputError` where there is no question.
        """
        assert runtime.execution_info is not None, "a task has its execution info"
        row = _row_allowance(runtime)
        new = new_question(row.run if row else runtime.execution_info.task_id, query_given(state))
        first = self.route(new, runtime)
        return Command(update={**new, **cast(State, first.update)}, goto=first.goto)

    def route(self, state: State, runtime: Runtime[Allowance]) -> Command[Next]:
        """The next pair of the plan; without one, or where it gave no answer, choose one of pairs not tried yet.

        With none left, or none that fits, the last reading stands.
        """
        now, tried = state["plan"], state["tried"]
        left_of_plan = [pair for pair in now["pairs"] if pair not in tried] if now else []
        if now and left_of_plan:
            why = f"{len(state['votes'])} answers so far, and no {now['need']} agree"
            return self._take(state, runtime, Pair.parse(left_of_plan[0]), why, now)
        if state["votes"]:
            return self._end(state)  # what the plan's other pairs would have said cannot be paid for
        run, decided_before = self._allowance(state, runtime), self._plan_kept(state, runtime)
        rows = self._untried(state)
        rows = run.policy.filter_fallbacks(rows) if tried else rows
        if tried and not rows and decided_before is None:
            return self._end(state)
        if not tried:
            table = [row_to_json(row) for row in self.resources.router.table(query_of(state))]
            runtime.stream_writer({"table": table})
        if decided_before is not None:
            return self._begin_plan(state, runtime, decided_before, "planned")
        lineage = self.resources.ledger.lineage(run.budget)
        try:
            route = _choose(rows, lineage, run)
        except BudgetExceeded as error:
            if run.on_short == "ask" and rows:
                wanted = choose_plan(rows, None, run.policy).row
                error.budget = tightest(lineage)
                return self._ask(
                    runtime, shortage(error, self.resources.ledger, wanted, rows, run.policy, "route")
                )
            if run.on_short == "stop" or not state["routes"]:
                raise
            return self._end(state, {"reason": f"{state['reason']}; then {error}"})
        return self._begin_plan(state, runtime, route.plan, route.why)

    def call(self, state: State, runtime: Runtime[Allowance]) -> Command[Next]:
        """Hold the worst case, let the model write, post what it cost: once, however often this node runs.

        A pair whose worst case does not fit is left out and another one chosen. A model that fails before its first
        word frees its hold; one that fails later, or is interrupted, is charged for what it wrote. A further try, in
        this run or when the thread is taken up again, reserves anew. So does one whose hold's lease ran out: a hold
        that was never dispatched is free again, one that was stays charged as unknown until it is reconciled.
        """
        run, asked = self._allowance(state, runtime), self._asked(state)
        if runtime.execution_info is not None and runtime.execution_info.node_attempt > 1:
            runtime.stream_writer({"again": runtime.execution_info.node_attempt})
        key, hold, wasted = self._try(state, asked)
        if hold is None:
            try:
                hold = self._reserve(state, runtime, run.budget, key, asked)
            except BudgetExceeded as error:
                return self._unaffordable(state, runtime, error, wasted)
        if hold.result is None:
            completion = self._write(key, asked, runtime, run.timeout)
            kept = json.dumps(completion_to_json(completion))
            entry = self.resources.ledger.settle(key, completion.usage.models, kept)
        else:
            completion = completion_from_json(json.loads(hold.result))
            entry = self.resources.ledger.settle(key, completion.usage.models)
        left = left_of(self.resources.ledger.lineage(run.budget))
        runtime.stream_writer({"cost": entry.nanousd, "left": left, "key": key})
        return Command(update=_settled(state, completion, hold, entry, wasted), goto="parse")

    def parse(self, state: State, runtime: Runtime[Allowance]) -> Command[Next]:
        """Read the answer out of the text; of several samples, take the vote.

        An answer: end. A vote that is not settled: ask again. No answer: escalate to the next pair.
        """
        assert state["completion"] is not None
        completion = completion_from_json(state["completion"])
        reading = get_strategy(pair_of(state).strategy).read(completion, query_of(state))
        samples = [*state["samples"], [reading.value, reading.reason]]
        update: State = {
            "completion": None,
            "call": state["call"] + 1,
            **vote_of_samples({**state, "samples": samples}),
        }
        if update["done"]:
            return self._end(state, update)
        return Command(update=update, goto="call" if update["samples"] else "route")

    def approval(self, state: State, runtime: Runtime[Allowance]) -> Command[Next]:
        """Let a person decide. Resumed with what they said: see `shortage.decided`. Nonsense is asked again."""
        short, problem = state["short"], ""
        assert short is not None
        while True:
            answer = interrupt({**short, "problem": problem} if problem else short)
            try:
                decision = decided(answer, short)
                break
            except InputError as error:
                problem = str(error)
        if decision.do == "stop":
            return self._end(state, {"short": None, "reason": f"stopped: {short['why']}"})
        if decision.do == "raise":
            raise_limit(self.resources.ledger, decision, short)
            return Command(update={"short": None}, goto=short["then"])
        return Command(update={"short": None, "on_short": "cheaper"}, goto="route")

    # Steps of them

    def _allowance(self, state: State, runtime: Runtime[Allowance]) -> _Run:
        """What this run may do: as the tools say, where its context does not say otherwise."""
        given = _context(runtime.context)
        return _Run(
            budget=given.budget or self.resources.budget,
            policy=as_policy(given.policy if given.policy is not None else self.resources.policy),
            on_short=state.get("on_short") or given.on_short or self.resources.on_short,
            timeout=given.timeout if given.timeout is not None else self.resources.timeout,
        )

    def _plan_kept(self, state: State, runtime: Runtime[Allowance]) -> Plan | None:
        """Of a row of a job, the plan that was decided before this run: by who planned it, or by a run that was killed."""
        row = _row_allowance(runtime)
        if row is None:
            return None
        if not state["tried"] and row.plan is not None:
            return row.plan
        hold = self.resources.ledger.hold(f"{state['run']}/{state['call']}")
        return None if hold is None else plan_from_hold(hold)

    def _begin_plan(self, state: State, runtime: Runtime[Allowance], plan: Plan, why: str) -> Command[Next]:
        pairs = [str(pair) for pair in plan.pairs]
        why = why if len(pairs) == 1 else f"{why}: {plan}"
        return self._take(state, runtime, plan.pairs[0], why, {"pairs": pairs, "need": plan.need})

    def _take(
        self, state: State, runtime: Runtime[Allowance], pair: Pair, why: str, plan: dict[str, Any]
    ) -> Command[Next]:
        table = self.resources.router.table(query_of(state))
        row = next((row for row in table if row.pair == pair), Row(pair, 0.0, 0, 0, 0, 0))
        route = route_to_json(Route(pair, row, why))
        runtime.stream_writer({"route": route})
        update: State = {
            "route": route,
            "pair": str(pair),
            "tried": [*state["tried"], str(pair)],
            "completion": None,
            "plan": plan,
        }
        return Command(update=update, goto="call")

    def _try(self, state: State, asked: ModelCall) -> tuple[str, Hold | None, int]:
        return next_try(self.resources.ledger, f"{state['run']}/{state['call']}", digest(asked.parameters))

    def _reserve(
        self, state: State, runtime: Runtime[Allowance], budget: str, key: str, asked: ModelCall
    ) -> Hold:
        worst = asked.model.worst_case_of(asked.messages, asked.generation)
        self.resources.sync()
        info = runtime.execution_info
        thread = info.thread_id if info is not None else None
        tags = {"model": asked.model.name, "strategy": pair_of(state).strategy}
        if thread and thread.isprintable() and thread.strip():
            tags["thread"] = thread
        if _row_allowance(runtime) and state["plan"]:
            tags |= plan_to_tags(state["plan"]["pairs"], state["plan"]["need"])
        return self.resources.ledger.reserve(
            budget,
            key,
            worst,
            self.resources.catalogue.prices(worst),
            parameters=asked.parameters,
            tags=tags,
            dispatch=True,
        )

    def _unaffordable(
        self, state: State, runtime: Runtime[Allowance], error: BudgetExceeded, wasted: int
    ) -> Command[Next]:
        """The worst case of the call does not fit: what the policy says."""
        run, rows = self._allowance(state, runtime), self._untried(state)
        # What its tries cost is counted here; whatever is called next has a number of its own. Of a row of a job, one
        # that no try was made under stays free: what is found under it is then what was decided.
        used = 1 if _row_allowance(runtime) is None or wasted else 0
        paid: State = {"call": state["call"] + used, "cost": state["cost"] + wasted}
        if run.on_short == "ask":
            assert state["route"] is not None
            row = state["route"]["row"]
            wanted = PlanRow(Plan((pair_of(state),)), row["accuracy"], row["cost_p50"], row["cost_p90"])
            asked = shortage(error, self.resources.ledger, wanted, rows, run.policy, "call")
            return self._ask(runtime, asked, paid)
        if run.on_short == "stop":
            raise error
        if state["samples"]:  # no further sample can be paid for: those that were made decide
            update: State = {**paid, **vote_of_samples(state, last=True)}
            return self._end(state, update) if update["done"] else Command(update=update, goto="route")
        if not state["routes"] and not rows:
            raise error
        return Command(update=paid, goto="route")

    def _ask(
        self, runtime: Runtime[Allowance], short: dict[str, Any], update: State | None = None
    ) -> Command[Next]:
        if runtime.execution_info is None or runtime.execution_info.thread_id is None:
            raise decision_needed(short)  # without a checkpointer there is nothing to come back to
        return Command(update={**(update or {}), "short": short}, goto="approval")

    def _write(
        self, key: str, asked: ModelCall, runtime: Runtime[Allowance], timeout: float | None
    ) -> Completion:
        began, ledger = time.monotonic(), self.resources.ledger
        telling = StreamReporter(runtime, f"answer-{key}", asked.model.name, asked.messages)
        with settle_on_failure(ledger, key, asked.model, asked.messages, asked.generation) as pieces:
            try:
                for piece in pieces:
                    if isinstance(piece, Completion):
                        telling.end(piece)
                        return piece
                    telling.piece(piece)
                    if is_stopped(runtime):
                        raise ModelError("nobody waits for this answer any more; what was written is charged")
                    if timeout is not None and time.monotonic() - began > timeout:
                        raise ModelUnavailable(
                            f"{asked.model.name} did not end within {timeout:g} seconds; what it wrote is charged"
                        )
            except BaseException as error:
                telling.fail(error)
                raise
        raise AssertionError("a stream ends with its completion")

    def _untried(self, state: State) -> list[PlanRow]:
        """The plans of usable pairs that this question has not been given to."""
        tried = set(state["tried"])
        return [
            row
            for row in self.resources.router.plans_for(query_of(state))
            if not tried & {str(pair) for pair in row.plan.pairs}
            and all(map(self.resources.is_usable, row.plan.pairs))
        ]

    def _asked(self, state: State) -> ModelCall:
        pair = pair_of(state)
        return ModelCall.of(self.resources.model(pair.model), pair, query_of(state), len(state["samples"]))

    def _end(self, state: State, update: State | None = None) -> Command[Next]:
        last: State = {**(update or {}), "done": True, "messages": []}
        if state["text"]:
            last["messages"] = [
                {"role": "assistant", "content": state["text"], "id": f"answer-{state['run']}"}
            ]
        return Command(update=last, goto="__end__")


@dataclass(frozen=True, slots=True)
class _Run:
    """An `Allowance` without gaps."""

    budget: str
    policy: Policy
    on_short: WhenShort
    timeout: float | None


def _context(context: object) -> Allowance:
    """The allowance of a run. Inside another graph the context is that graph's: it may be one, or have one."""
    if context is not None and not isinstance(context, Allowance):
        name = "allowance"
        context = context.get(name) if isinstance(context, Mapping) else getattr(context, name, None)
    return context if isinstance(context, Allowance) else Allowance()


def _row_allowance(runtime: Runtime[Allowance]) -> RowAllowance | None:
    return runtime.context if isinstance(runtime.context, RowAllowance) else None


def _choose(rows: list[PlanRow], lineage: list[Budget], run: _Run) -> PlanRoute:
    """The way that the policy wants: of those that fit, or, where money running short is not for us to decide, of all.

    Raises `BudgetExceeded` where it does not fit.
    """
    left = left_of(lineage)
    if run.on_short == "cheaper":
        return choose_plan(rows, left, run.policy)
    wanted = choose_plan(rows, None, run.policy)
    options = [Option(str(wanted.plan), 1.0, wanted.row.cost_p50, wanted.row.cost_p90)]
    plan_within(lineage, options, run.on_short)
    return wanted


def _settled(state: State, completion: Completion, hold: Hold, entry: Entry, wasted: int) -> State:
    """What a call adds to the question's accounts."""
    usage = dict(state["usage"])
    for name, tokens in completion.usage.models.items():
        usage[name] = list(astuple(TokenCount(*usage.get(name, ())) + tokens))
    assert state["route"] is not None
    first = [] if state["samples"] else [state["route"]]
    return {
        "completion": completion_to_json(completion),
        "cost": state["cost"] + entry.nanousd + wasted,
        "held": state["held"] + hold.held_nanousd,
        "usage": usage,
        "seconds": state["seconds"] + completion.usage.seconds,
        "routes": [*state["routes"], *first],
        "text": completion.text,
        "finish_reason": completion.finish_reason,
    }
