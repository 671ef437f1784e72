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
transaction, and `settle` posts once and keeps the text. Leaves out which pairs are left and how one is chosen
(`viaticum.agents.workflow.candidates`), and the steps of one call (`viaticum.agents.workflow.node_calls`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, cast

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime
from langgraph.types import Checkpointer, Command, RetryPolicy

from viaticum.agents.workflow.allowances import (
    ResolvedAllowance,
    allowance_in,
    deadline_of,
    row_allowance,
    until_of,
)
from viaticum.agents.workflow.approval import (
    approval_request,
    ask_person,
    decision_needed,
    raise_limit,
    tightest_scope,
)
from viaticum.agents.workflow.call_streams import settle_on_failure
from viaticum.agents.workflow.calls import NOBODY_WAITS, next_try
from viaticum.agents.workflow.candidates import Candidates, decided_plan, was_left_out
from viaticum.agents.workflow.deadlines import Deadline, in_time, too_slow, with_seconds
from viaticum.agents.workflow.failover import (
    FAILOVER,
    Failure,
    cost_of_tries,
    has_written,
    last_failure,
    next_call_is_known,
)
from viaticum.agents.workflow.node_calls import NodeCall
from viaticum.agents.workflow.nodes import Node, is_stopped
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.serialization import completion_from_json, route_to_json, row_to_json
from viaticum.agents.workflow.sessions import count_tokens
from viaticum.agents.workflow.state import (
    Allowance,
    AnswerOutput,
    QuestionInput,
    State,
    after_call,
    new_question,
    query_from_input,
    query_of,
    turns_of,
)
from viaticum.agents.workflow.voting import pair_of, vote_of_samples, why_next
from viaticum.budgets.records import digest
from viaticum.errors import BudgetExceeded, DeadlineExceeded, ModelError, ModelUnavailable
from viaticum.money import usd_digits
from viaticum.routers.query import Plan, PlanRow, choose_plan
from viaticum.strategies import get as get_strategy
from viaticum.types import Pair, Route, Row

JITTER_SECONDS = 1.0  # that LangGraph may add to the wait before a further try
_log = logging.getLogger("viaticum")
Graph = CompiledStateGraph[State, Allowance, QuestionInput, AnswerOutput]
Next = Literal["route", "call", "parse", "approval", "__end__"]


class Workflow:
    """The nodes, as methods over one set of resources; `build` compiles them into a graph."""

    def __init__(self, resources: WorkflowResources) -> None:
        self.resources = resources

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
        candidates = self._candidates(state, runtime)
        deadline = deadline_of(self.resources, state, runtime)
        if deadline is not None and deadline.left <= 0:
            return self._on_deadline(state, deadline.exceeded("no further call is made"))
        plan, pending = state["plan"], in_time(candidates.pending(), candidates.seconds_of_pair, deadline)
        if plan and pending:
            why = last_failure(state) or why_next(state)
            return self._select_pair(candidates, runtime, Pair.parse(pending[0]), why, plan)
        if state["votes"]:
            return self._finish(state)  # the other pairs of the plan could not be paid for
        decided = decided_plan(self.resources.ledger, state, runtime)
        if decided is not None:
            self._stream_table(candidates, runtime)
            return self._start_plan(candidates, runtime, decided, "planned")
        return self._choose_plan(candidates, runtime, deadline)

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
        candidates, allowance = self._candidates(state, runtime), self._allowance(state, runtime)
        deadline, ledger = deadline_of(self.resources, state, runtime), self.resources.ledger
        call = NodeCall.of(candidates, runtime, allowance, deadline)
        if is_stopped(runtime):  # while it waited for a further try
            raise ModelError(NOBODY_WAITS)
        if deadline is not None:
            deadline.check()
        if runtime.execution_info is not None and runtime.execution_info.node_attempt > 1:
            runtime.stream_writer({"again": runtime.execution_info.node_attempt})
        first, sent, row = f"{state['run']}/{state['call']}", call.sent, row_allowance(runtime)
        if row and was_left_out(candidates, first):
            return Command(goto="route")
        parameters = digest(sent.parameters)
        key, hold, wasted = next_try(ledger, first, parameters, runs_here=sent.model.runs_here)
        if hold is None and key != first and row and next_call_is_known(ledger, first):
            return self._ask_another(state, Failure(str(pair_of(state)), "", "before a kill"))
        with settle_on_failure(ledger, key, sent.model, sent.messages, sent.generation) as pieces:
            if hold is None:
                try:
                    hold = call.reserve(key)
                except BudgetExceeded as error:
                    return self._on_budget_exceeded(candidates, runtime, error, wasted)
            elif hold.state == "reserved":
                hold = ledger.dispatch(key)
            settled = call.settle(hold, pieces)
        update = after_call(state, settled.completion, hold, settled.entry, wasted)
        return Command(update=update, goto="parse")

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

    def _candidates(self, state: State, runtime: Runtime[Allowance]) -> Candidates:
        return Candidates.of(self.resources, state, runtime)

    def _allowance(self, state: State, runtime: Runtime[Allowance]) -> ResolvedAllowance:
        return ResolvedAllowance.of(self.resources, state, runtime)

    def _choose_plan(
        self, candidates: Candidates, runtime: Runtime[Allowance], deadline: Deadline | None
    ) -> Command[Next]:
        """Start the plan of untried pairs that the policy prefers, in time and within the budget."""
        state, ledger = candidates.state, self.resources.ledger
        allowance, tried = self._allowance(state, runtime), state["tried"]
        rows = candidates.untried()
        if not rows and not tried:
            raise candidates.none_usable()
        rows = allowance.policy.filter_fallbacks(rows) if tried else rows
        of_plan = candidates.seconds_of_plan
        quick = in_time(rows, of_plan, deadline)
        if rows and not quick and deadline is not None:
            reason = too_slow(rows, of_plan, deadline)
            return self._on_deadline(state, DeadlineExceeded(f"nothing can end in time: {reason}"))
        slow, rows = len(rows) - len(quick), quick
        if allowance.policy.reads_seconds:
            rows = with_seconds(rows, of_plan)
            if not tried:
                allowance.policy.check(rows)
        if tried and not rows:
            return self._finish(state)
        self._stream_table(candidates, runtime)
        lineage = ledger.lineage(allowance.budget)
        try:
            route = candidates.choose(rows, lineage, allowance)
        except BudgetExceeded as error:
            if allowance.on_short == "ask" and rows:
                preferred = choose_plan(rows, None, allowance.policy).row
                error.budget = tightest_scope(lineage)
                request = approval_request(error, ledger, preferred, rows, allowance.policy, "route")
                return self._request_approval(runtime, request)
            if allowance.on_short == "stop" or not state["routes"]:
                raise
            return self._finish(state, {"reason": f"{state['reason']}; then {error}"})
        failure = last_failure(state)
        why = f"{failure}; {route.why}" if failure else route.why
        why += f"; without {slow} that would take too long" if slow else ""
        return self._start_plan(candidates, runtime, route.plan, why)

    def _stream_table(self, candidates: Candidates, runtime: Runtime[Allowance]) -> None:
        """Report the routing table to the caller, once a question."""
        if not candidates.state["tried"]:
            runtime.stream_writer({"table": [row_to_json(row) for row in candidates.table]})

    def _start_plan(
        self, candidates: Candidates, runtime: Runtime[Allowance], plan: Plan, why: str
    ) -> Command[Next]:
        pairs = [str(pair) for pair in plan.pairs]
        why = why if len(pairs) == 1 else f"{why}: {plan}"
        return self._select_pair(candidates, runtime, plan.pairs[0], why, {"pairs": pairs, "need": plan.need})

    def _select_pair(
        self, candidates: Candidates, runtime: Runtime[Allowance], pair: Pair, why: str, plan: dict[str, Any]
    ) -> Command[Next]:
        row = next((row for row in candidates.table if row.pair == pair), Row(pair, 0.0, 0, 0, 0, 0))
        route = route_to_json(Route(pair, row, why))
        update: State = {
            "route": route,
            "tried": [*candidates.state["tried"], str(pair)],
            "completion": None,
            "plan": plan,
        }
        if not pair.is_check:
            runtime.stream_writer({"route": route})
            update["pair"] = str(pair)
        return Command(update=update, goto="call")

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
        candidates = self._candidates(after, runtime)
        rows = self._allowance(state, runtime).policy.filter_fallbacks(candidates.untried())
        rows = in_time(rows, candidates.seconds_of_plan, deadline)
        if not (candidates.pending() or rows or state["samples"] or state["routes"]):
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
        self, candidates: Candidates, runtime: Runtime[Allowance], error: BudgetExceeded, wasted: int
    ) -> Command[Next]:
        """The worst case of the call does not fit: request approval, stop, or use what fits (on_short)."""
        state, rows = candidates.state, candidates.untried()
        allowance = self._allowance(state, runtime)
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
