"""The workflow graph: start -> call -> parse -> (call | route -> call | end), and approval.

    start     the question, the prefix of its ledger keys, and the first route
    route     the next pair of the plan, or a new plan of pairs not tried yet that is worth its price
    call      reserve the worst case and dispatch, let the model generate, settle the cost
    parse     the answer from the text; a vote of samples, or of the pairs of a plan
    approval  a person decides, if the budget is short and on_short is "ask"

A strategy with several samples loops from parse to call until its vote is settled; a plan of several pairs
loops from parse to route until enough of their answers agree, or a check says that the first one is right. A
check is a call like others; its text is not shown.

Where a model cannot answer a call, the next pair is asked, with a hold of its own (see
`viaticum.agents.workflow.failover`); where no pair is left the error ends the run.

A node may run again after a kill, a retry or a replay; the ledger, not the checkpoint, prevents a second
charge. The key of a call is the task id of `start` and the number of the call. The task id is the same
whenever this run is continued, and differs for every other question of the thread. Each further try of a call
reserves under a key of its own. A key that has a hold keeps it: `reserve` also dispatches, in one
transaction, and `settle` posts once and keeps the text. Leaves out how models decode and what strategies
prompt.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime
from langgraph.types import Checkpointer, Command, RetryPolicy

from viaticum.agents.workflow.allowances import (
    ResolvedAllowance,
    allowance_in,
    check_fits,
    choose_within,
    deadline_of,
    pending_pairs,
    restricted_for,
    row_allowance,
    until_of,
)
from viaticum.agents.workflow.approval import (
    approval_request,
    ask_person,
    decision_needed,
    nanousd_left,
    raise_limit,
    tightest_scope,
)
from viaticum.agents.workflow.call_streams import (
    CallStream,
    check_budget,
    check_deadline,
    settle_on_failure,
    timed_out,
)
from viaticum.agents.workflow.callbacks import StreamReporter
from viaticum.agents.workflow.calls import NOBODY_WAITS, ModelCall, next_try
from viaticum.agents.workflow.deadlines import (
    Deadline,
    SecondsOf,
    in_time,
    seconds_of_pair,
    seconds_of_plan,
    too_slow,
    with_seconds,
)
from viaticum.agents.workflow.estimates import estimate, output_limit
from viaticum.agents.workflow.failover import (
    FAILOVER,
    Failure,
    cost_of_tries,
    has_written,
    last_failure,
    may_ask,
    next_call_is_known,
)
from viaticum.agents.workflow.latencies import CallLatencies
from viaticum.agents.workflow.nodes import Node, StoppableRun, is_stopped
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.serialization import (
    completion_from_json,
    completion_to_json,
    parse_completion,
    plan_from_hold,
    plan_to_tags,
    route_to_json,
    row_from_json,
    row_to_json,
)
from viaticum.agents.workflow.sessions import count_tokens, route_turn, session_tags
from viaticum.agents.workflow.state import (
    Allowance,
    AnswerOutput,
    QuestionInput,
    State,
    after_call,
    new_question,
    query_from_input,
    query_of,
    settings_of,
    turns_of,
)
from viaticum.agents.workflow.telemetry import CallSpan, current, route_metadata
from viaticum.agents.workflow.voting import pair_of, vote_of_samples, why_next
from viaticum.agents.workflow.watched_router import expected_tags
from viaticum.budgets import Budget, Hold
from viaticum.budgets.records import digest
from viaticum.errors import BudgetExceeded, DeadlineExceeded, ModelError, ModelUnavailable
from viaticum.generation import NO_SETTINGS
from viaticum.money import usd_digits
from viaticum.routers.query import Plan, PlanRoute, PlanRow, as_policy, choose_plan
from viaticum.strategies import get as get_strategy
from viaticum.strategies.verify import AnsweredQuery
from viaticum.types import Completion, Pair, Route, RoutingTable, Row

JITTER_SECONDS = 1.0  # that LangGraph may add to the wait before a further try
_log = logging.getLogger("viaticum")
Graph = CompiledStateGraph[State, Allowance, QuestionInput, AnswerOutput]
Next = Literal["route", "call", "parse", "approval", "__end__"]


class Workflow:
    """The nodes, as methods over one set of resources; `build` compiles them into a graph."""

    def __init__(self, resources: WorkflowResources) -> None:
        self.resources = resources
        self._latencies = CallLatencies(resources.ledger)

    def build(
        self, checkpointer: Checkpointer | BaseCheckpointSaver[Any] = None, name: str = "viaticum"
    ) -> Graph:
        """Compile the graph. checkpointer: None inherits that of the enclosing graph."""
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
        """Store the question and choose the first pair: one step, so that one checkpoint holds both.

        Raises:
            InputError: there is no question.
        """
        assert runtime.execution_info is not None, "a task has its execution info"
        row = row_allowance(runtime)
        run = row.run if row else runtime.execution_info.task_id
        given = allowance_in(runtime.context)
        settings = given.settings.over(self.resources.settings)
        new = new_question(run, query_from_input(state), settings, given.only, given.session)
        new["until"] = until_of(self.resources, runtime)
        if (
            row is not None and row.failure is not None
        ):  # of its first call, which was made outside this graph
            new |= {"call": 1, "tried": [row.failure.pair], "failures": [row.failure.as_list]}
            new["cost"] = cost_of_tries(self.resources.ledger, f"{run}/0")
        first = self.route(new, runtime)
        return Command(update={**new, **cast(State, first.update)}, goto=first.goto)

    def route(self, state: State, runtime: Runtime[Allowance]) -> Command[Next]:
        """Choose the next pair of the plan, or, if it has none or gave no answer, a plan of untried pairs.

        With none left, or none that fits, the last reading is the answer.
        """
        plan, tried = state["plan"], state["tried"]
        resources = restricted_for(self.resources, state, runtime)
        deadline = deadline_of(self.resources, state, runtime)
        if deadline is not None and deadline.left <= 0:
            return self._on_deadline(state, deadline.exceeded("no further call is made"))
        pending, failure = pending_pairs(state, resources), last_failure(state)
        of_pair, of_plan = self._seconds(state)
        pending = in_time(pending, of_pair, deadline)
        if plan and pending:
            why = failure or why_next(state)
            return self._select_pair(state, runtime, Pair.parse(pending[0]), why, plan)
        if state["votes"]:
            return self._finish(state)  # the other pairs of the plan could not be paid for
        allowance, decided_plan = self._allowance(state, runtime), self._decided_plan(state, runtime)
        rows = self._untried_plans(state, resources)
        if not rows and not tried and decided_plan is None:
            raise resources.none_usable(row.pair for row in self._estimate(state)[0])
        rows = allowance.policy.filter_fallbacks(rows) if tried else rows
        quick = in_time(rows, of_plan, deadline)
        if rows and not quick and deadline is not None and decided_plan is None:
            reason = too_slow(rows, of_plan, deadline)
            return self._on_deadline(state, DeadlineExceeded(f"nothing can end in time: {reason}"))
        slow, rows = len(rows) - len(quick), quick
        if allowance.policy.reads_seconds and decided_plan is None:
            rows = with_seconds(rows, of_plan)
            if not tried:
                allowance.policy.check(rows)
        if tried and not rows and decided_plan is None:
            return self._finish(state)
        if not tried:
            table = [row_to_json(row) for row in self._estimate(state)[0]]
            runtime.stream_writer({"table": table})
        if decided_plan is not None:
            return self._start_plan(state, runtime, decided_plan, "planned")
        lineage = self.resources.ledger.lineage(allowance.budget)
        try:
            route = self._route_turn(state, rows, lineage, allowance) or choose_within(
                rows, lineage, allowance
            )
        except BudgetExceeded as error:
            if allowance.on_short == "ask" and rows:
                preferred = choose_plan(rows, None, allowance.policy).row
                error.budget = tightest_scope(lineage)
                request = approval_request(
                    error, self.resources.ledger, preferred, rows, allowance.policy, "route"
                )
                return self._request_approval(runtime, request)
            if allowance.on_short == "stop" or not state["routes"]:
                raise
            return self._finish(state, {"reason": f"{state['reason']}; then {error}"})
        why = f"{failure}; {route.why}" if failure else route.why
        why += f"; without {slow} that would take too long" if slow else ""
        return self._start_plan(state, runtime, route.plan, why)

    def call(self, state: State, runtime: Runtime[Allowance]) -> Command[Next]:
        """Reserve the worst case, let the model generate, post the cost: once, however often this node runs.

        If the worst case of a pair does not fit, another pair is chosen. A model that fails before its first
        piece of text frees its hold; one that fails later, or is interrupted, is charged for what it
        generated. A further try, in this run or when the thread is continued, reserves anew. So does a try
        after its hold's lease ran out, or after a kill while the model was answering: a hold that was never
        dispatched is free again, a dispatched one stays charged as unknown until it is reconciled.

        Where the pair cannot answer (`FAILOVER`), another one is asked.
        """
        try:
            return self._call(state, runtime)
        except FAILOVER as error:
            return self._on_failure(state, runtime, error)
        except DeadlineExceeded as error:
            return self._on_deadline(state, error)

    def _call(self, state: State, runtime: Runtime[Allowance]) -> Command[Next]:
        allowance, call = self._allowance(state, runtime), self._model_call(state, runtime)
        if is_stopped(runtime):  # while it waited for a further try
            raise ModelError(NOBODY_WAITS)
        deadline = deadline_of(self.resources, state, runtime)
        if deadline is not None:
            deadline.check()
        if runtime.execution_info is not None and runtime.execution_info.node_attempt > 1:
            runtime.stream_writer({"again": runtime.execution_info.node_attempt})
        ledger = self.resources.ledger
        first, parameters = f"{state['run']}/{state['call']}", digest(call.parameters)
        if row_allowance(runtime) and self._was_left_out(state, runtime, first):
            return Command(goto="route")
        key, hold, wasted = next_try(ledger, first, parameters, runs_here=call.model.runs_here)
        if hold is None and key != first and row_allowance(runtime) and next_call_is_known(ledger, first):
            return self._ask_another(state, Failure(str(pair_of(state)), "", "before a kill"))
        with settle_on_failure(ledger, key, call.model, call.messages, call.generation) as pieces:
            if hold is None:
                try:
                    hold = self._reserve(state, runtime, allowance.budget, key, call)
                except BudgetExceeded as error:
                    return self._on_budget_exceeded(state, runtime, error, wasted)
            elif hold.state == "reserved":
                hold = ledger.dispatch(key)
            with self._span(state, runtime, call, hold) as span:
                if hold.result is None:
                    completion = self._generate(
                        key, call, pieces, runtime, allowance, deadline, state["route"]
                    )
                    result = json.dumps(completion_to_json(completion))
                    entry = ledger.settle(key, completion.usage.models, result)
                else:
                    completion = parse_completion(
                        hold.result, f"the text of the call {hold.key} in the ledger"
                    )
                    entry = ledger.settle(key, completion.usage.models)
                left = nanousd_left(ledger.lineage(allowance.budget))
                span.end(completion, entry, left, stored=hold.result is not None)
        runtime.stream_writer({"cost": entry.nanousd, "left": left, "key": key})
        return Command(update=after_call(state, completion, hold, entry, wasted), goto="parse")

    def parse(self, state: State, runtime: Runtime[Allowance]) -> Command[Next]:
        """Read the answer from the text; of several samples, take the vote.

        An answer ends the question, an unsettled vote calls the model again, and no answer routes to the next
        pair.
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
            return self._finish(state, update)
        return Command(update=update, goto="call" if update["samples"] else "route")

    def approval(self, state: State, runtime: Runtime[Allowance]) -> Command[Next]:
        """Interrupt until a person decides (see `approval.parse_decision`).

        An invalid decision is asked again.
        """
        request = state["short"]
        assert request is not None
        decision = ask_person(request)
        if decision.do == "stop":
            return self._finish(state, {"short": None, "reason": f"stopped: {request['why']}"})
        update: State = {"short": None, "until": until_of(self.resources, runtime)}
        if decision.do == "raise":
            raise_limit(self.resources.ledger, decision, request)
            return Command(update=update, goto=request["then"])
        return Command(update={**update, "on_short": "cheaper"}, goto="route")

    # Steps of the nodes

    def _allowance(self, state: State, runtime: Runtime[Allowance]) -> ResolvedAllowance:
        given, resources = allowance_in(runtime.context), self.resources
        return ResolvedAllowance(
            budget=given.budget or resources.budget,
            policy=as_policy(given.policy if given.policy is not None else resources.policy),
            on_short=state.get("on_short") or given.on_short or resources.on_short,
            timeout=given.timeout if given.timeout is not None else resources.timeout,
        )

    def _decided_plan(self, state: State, runtime: Runtime[Allowance]) -> Plan | None:
        """For a row of a job, the plan decided before this run: by the planner, or by a killed run."""
        row = row_allowance(runtime)
        if row is None:
            return None
        if not state["tried"] and row.plan is not None:
            return row.plan
        hold = self.resources.ledger.hold(f"{state['run']}/{state['call']}")
        return None if hold is None else plan_from_hold(hold)

    def _was_left_out(self, state: State, runtime: Runtime[Allowance], key: str) -> bool:
        """Whether an earlier run of this row could not pay for this pair, and asked a later one here."""
        hold = self.resources.ledger.hold(key)
        if hold is None or hold.result is None:
            return False
        asked = f"{hold.tags.get('model')}+{hold.tags.get('strategy')}"
        return asked in pending_pairs(state, restricted_for(self.resources, state, runtime))

    def _start_plan(self, state: State, runtime: Runtime[Allowance], plan: Plan, why: str) -> Command[Next]:
        pairs = [str(pair) for pair in plan.pairs]
        why = why if len(pairs) == 1 else f"{why}: {plan}"
        return self._select_pair(state, runtime, plan.pairs[0], why, {"pairs": pairs, "need": plan.need})

    def _select_pair(
        self, state: State, runtime: Runtime[Allowance], pair: Pair, why: str, plan: dict[str, Any]
    ) -> Command[Next]:
        table, _ = self._estimate(state)
        row = next((row for row in table if row.pair == pair), Row(pair, 0.0, 0, 0, 0, 0))
        route = route_to_json(Route(pair, row, why))
        update: State = {
            "route": route,
            "tried": [*state["tried"], str(pair)],
            "completion": None,
            "plan": plan,
        }
        if not pair.is_check:
            runtime.stream_writer({"route": route})
            update["pair"] = str(pair)
        return Command(update=update, goto="call")

    def _span(self, state: State, runtime: Runtime[Allowance], call: ModelCall, hold: Hold) -> CallSpan:
        run = runtime.control if isinstance(runtime.control, StoppableRun) else None
        resources = restricted_for(self.resources, state, runtime)

        def candidates() -> list[str]:
            rows = self._estimate(state)[0]
            return [str(row.pair) for row in rows if resources.is_usable(row.pair)]

        return CallSpan(
            current() if run is None else run.trace,
            resources.catalogue[call.model.name],
            call.generation,
            hold,
            route=state["route"],
            candidates=candidates,
        )

    def _route_turn(
        self, state: State, rows: list[PlanRow], lineage: list[Budget], allowance: ResolvedAllowance
    ) -> PlanRoute | None:
        """The plan of the first call of a session's turn; None without a session."""
        session = state["asked"].get("session")
        if session is None or state["tried"]:
            return None
        step = self.resources.sessions.state(session, turns_of(state))
        left = nanousd_left(lineage) if allowance.on_short == "cheaper" else None
        table = self._estimate(state)[0]
        if allowance.policy.reads_seconds:
            of_pair = self._seconds(state)[0]
            table = RoutingTable(tuple(with_seconds(table.rows, lambda row: of_pair(str(row.pair)))))
        route = route_turn(rows, table, step, self.resources.catalogue, allowance.policy, left)
        if route is not None and allowance.on_short != "cheaper":
            check_fits(route, lineage, allowance.on_short)
        return route

    def _reserve(
        self, state: State, runtime: Runtime[Allowance], budget: str, key: str, call: ModelCall
    ) -> Hold:
        worst = call.model.worst_case_of(call.messages, call.generation)
        self.resources.sync()
        info = runtime.execution_info
        thread = info.thread_id if info is not None else None
        tags = {"model": call.model.name, "strategy": pair_of(state).strategy}
        if state["route"] is not None:
            tags |= expected_tags(
                self.resources.router, query_of(state), row_from_json(state["route"]["row"])
            )
        if not pair_of(state).is_check:  # its model is not the session's
            tags |= session_tags(self.resources.sessions, state["asked"].get("session"), call.model.name)
        if thread and thread.isprintable() and thread.strip():
            tags["thread"] = thread
        if row_allowance(runtime) and state["plan"]:
            tags |= plan_to_tags(state["plan"]["pairs"], state["plan"]["need"])
        return self.resources.ledger.reserve(
            budget,
            key,
            worst,
            self.resources.catalogue.prices(worst),
            parameters=call.parameters,
            tags=tags,
            dispatch=True,
            hint=call.model.counting_hint,
            labels=self.resources.labels(pair_of(state).model),
        )

    def _on_failure(self, state: State, runtime: Runtime[Allowance], error: Exception) -> Command[Next]:
        """The pair cannot answer: ask another one, or raise the error where none is left."""
        attempt = 1 if runtime.execution_info is None else runtime.execution_info.node_attempt
        deadline = deadline_of(self.resources, state, runtime)
        wait = self.resources.backoff * 2 ** (attempt - 1) + JITTER_SECONDS
        is_time_left = deadline is None or deadline.left > wait
        if isinstance(error, ModelUnavailable) and attempt < self.resources.tries and is_time_left:
            raise error  # the graph tries again
        first = f"{state['run']}/{state['call']}"
        failure = Failure.of(str(pair_of(state)), error)
        after: State = {**state, "failures": [*state.get("failures", []), failure.as_list]}
        resources = restricted_for(self.resources, after, runtime)
        rows = self._allowance(state, runtime).policy.filter_fallbacks(self._untried_plans(after, resources))
        rows = in_time(rows, self._seconds(state)[1], deadline)
        if not (pending_pairs(after, resources) or rows or state["samples"] or state["routes"]):
            raise error
        is_shown = not pair_of(state).is_check
        if is_shown and not self.resources.can_restart and has_written(self.resources.ledger, first):
            raise error
        _log.warning("another pair is asked, since %s", failure.why)
        return self._ask_another(state, failure)

    def _on_deadline(self, state: State, error: DeadlineExceeded) -> Command[Next]:
        """The time is over: what earlier calls gave is the answer; without any, the error is raised."""
        if not (state["samples"] or state["routes"]):
            raise error
        first = f"{state['run']}/{state['call']}"
        paid: State = {"cost": state["cost"] + cost_of_tries(self.resources.ledger, first)}
        if state["samples"]:
            paid |= vote_of_samples(state, last=True)
        reason = paid.get("reason", state["reason"])
        if paid.get("value", state["value"]) is None:
            paid["reason"] = f"{reason}; then {error}" if reason else str(error)
        return self._finish(state, paid)

    def _ask_another(self, state: State, failure: Failure) -> Command[Next]:
        """Leave a pair that failed. The cost of its tries is added; the next call has its own keys."""
        paid: State = {
            "call": state["call"] + 1,
            "cost": state["cost"] + cost_of_tries(self.resources.ledger, f"{state['run']}/{state['call']}"),
            "failures": [*state.get("failures", []), failure.as_list],
        }
        if state["samples"]:
            return self._decide_by_samples(state, paid)
        reason = f"{state['reason']}; then {failure.why}" if state["reason"] else failure.why
        return Command(update={**paid, "reason": reason}, goto="route")

    def _decide_by_samples(self, state: State, paid: State) -> Command[Next]:
        """No further sample can be made: those that were made decide."""
        update: State = {**paid, **vote_of_samples(state, last=True)}
        if update["done"]:
            return self._finish(state, update)
        return Command(update=update, goto="route")

    def _on_budget_exceeded(
        self, state: State, runtime: Runtime[Allowance], error: BudgetExceeded, wasted: int
    ) -> Command[Next]:
        """The worst case of the call does not fit: request approval, stop, or use what fits (on_short)."""
        allowance = self._allowance(state, runtime)
        rows = self._untried_plans(state, restricted_for(self.resources, state, runtime))
        # The cost of its tries is added here, and the next call has a number of its own. For a row of a job,
        # a number without any try stays free: a hold found under it then names the plan that was decided.
        used = 1 if row_allowance(runtime) is None or wasted else 0
        paid: State = {"call": state["call"] + used, "cost": state["cost"] + wasted}
        if allowance.on_short == "ask":
            assert state["route"] is not None
            row = state["route"]["row"]
            preferred = PlanRow(Plan((pair_of(state),)), row["accuracy"], row["cost_p50"], row["cost_p90"])
            request = approval_request(
                error, self.resources.ledger, preferred, rows, allowance.policy, "call"
            )
            return self._request_approval(runtime, request, paid)
        if allowance.on_short == "stop":
            raise error
        if state["samples"]:
            return self._decide_by_samples(state, paid)
        if not state["routes"] and not rows:
            raise error
        return Command(update=paid, goto="route")

    def _request_approval(
        self, runtime: Runtime[Allowance], request: dict[str, Any], update: State | None = None
    ) -> Command[Next]:
        if runtime.execution_info is None or runtime.execution_info.thread_id is None:
            raise decision_needed(request)  # without a checkpointer no run can be resumed
        return Command(update={**(update or {}), "short": request}, goto="approval")

    def _generate(
        self,
        key: str,
        call: ModelCall,
        pieces: CallStream,
        runtime: Runtime[Allowance],
        allowance: ResolvedAllowance,
        deadline: Deadline | None,
        route: Mapping[str, Any] | None,
    ) -> Completion:
        began, timeout = time.monotonic(), allowance.timeout
        reporter = StreamReporter(
            runtime,
            f"answer-{key}",
            call.model.name,
            call.messages,
            route_metadata(route, call.generation),
            is_check=route is not None and Pair.parse(route["pair"]).is_check,
        )
        try:
            if is_stopped(runtime):
                raise ModelError(NOBODY_WAITS)
            for piece in pieces:
                if isinstance(piece, Completion):
                    reporter.end(piece)
                    return piece
                if piece:
                    reporter.piece(piece)
                if is_stopped(runtime):
                    raise pieces.ended_by_caller(ModelError(NOBODY_WAITS))
                if timeout is not None and time.monotonic() - began > timeout:
                    raise timed_out(call.model, timeout)
                check_deadline(pieces, deadline, call.model)
                check_budget(pieces, self.resources.ledger, allowance.budget)
        except BaseException as error:
            reporter.fail(error)
            raise
        raise AssertionError("a stream ends with its completion")

    def _estimate(self, state: State) -> tuple[RoutingTable, list[PlanRow]]:
        limit = output_limit(self.resources.catalogue, settings_of(state))
        return estimate(self.resources.router, query_of(state), limit)

    def _seconds(self, state: State) -> tuple[SecondsOf[str], SecondsOf[PlanRow]]:
        """Functions from a pair, and from a row of a plan, to what their calls are expected to take."""
        of_pair = seconds_of_pair(
            self.resources.latencies or self._latencies, lambda: self._estimate(state)[0]
        )
        return of_pair, seconds_of_plan(of_pair)

    def _untried_plans(self, state: State, resources: WorkflowResources) -> list[PlanRow]:
        """The plans whose pairs are all usable and not tried yet for this question."""
        tried = set(state["tried"])
        return [
            row
            for row in self._estimate(state)[1]
            if not tried & {str(pair) for pair in row.plan.pairs}
            and resources.can_follow(row.plan)
            and all(may_ask(state, pair) for pair in row.plan.pairs)
        ]

    def _model_call(self, state: State, runtime: Runtime[Allowance]) -> ModelCall:
        pair, resources = pair_of(state), restricted_for(self.resources, state, runtime)
        query, settings, value = query_of(state), settings_of(state), state["value"]
        if pair.is_check and value is not None:
            query, settings = AnsweredQuery.of(query, value), NO_SETTINGS
        model = resources.model(pair.model)
        return ModelCall.of(model, resources.catalogue, pair, query, settings, len(state["samples"]))

    def _finish(self, state: State, update: State | None = None) -> Command[Next]:
        last: State = {**(update or {}), "done": True, "messages": []}
        last["cost_usd"] = usd_digits(last.get("cost", state["cost"]))
        session = state["asked"].get("session")
        if session is not None and state["routes"]:
            wrote, answered = state["routes"][-1]["pair"], last.get("value", state["value"]) is not None
            model = Pair.parse(wrote).model  # not the one that is asked now and may never have answered
            tokens = count_tokens(turns_of(state), state["text"])
            self.resources.sessions.note(session, model, tokens, answered=answered)
        if state["text"]:
            last["messages"] = [
                {"role": "assistant", "content": state["text"], "id": f"answer-{state['run']}"}
            ]
        return Command(update=last, goto="__end__")
