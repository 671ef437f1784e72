"""One call of the workflow: what is sent, its hold, its stream, and its settlement.

Leaves out which pair is asked (`viaticum.agents.workflow.candidates`), and what follows from the answer or
from an error (`viaticum.agents.workflow.graph`).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from langgraph.runtime import Runtime

from viaticum.agents.workflow.allowances import ResolvedAllowance, row_allowance
from viaticum.agents.workflow.approval import nanousd_left
from viaticum.agents.workflow.call_streams import CallStream, check_budget, check_deadline, timed_out
from viaticum.agents.workflow.callbacks import StreamReporter
from viaticum.agents.workflow.calls import NOBODY_WAITS, ModelCall, SettledCall
from viaticum.agents.workflow.candidates import Candidates
from viaticum.agents.workflow.deadlines import Deadline
from viaticum.agents.workflow.nodes import StoppableRun, is_stopped
from viaticum.agents.workflow.serialization import (
    completion_to_json,
    parse_completion,
    plan_to_tags,
    row_from_json,
)
from viaticum.agents.workflow.sessions import session_tags
from viaticum.agents.workflow.state import Allowance, State, query_of, settings_of
from viaticum.agents.workflow.telemetry import CallSpan, current, route_metadata
from viaticum.agents.workflow.voting import pair_of
from viaticum.agents.workflow.watched_router import expected_tags
from viaticum.budgets import Hold
from viaticum.errors import ModelError
from viaticum.generation import NO_SETTINGS
from viaticum.strategies.verify import AnsweredQuery
from viaticum.types import Completion


@dataclass(frozen=True)
class NodeCall:
    """The call of the pair that a state asks.

    Args:
        candidates: of the state.
        sent: the model, the messages, and how to generate.
        deadline: when the call has to end; None for no limit.
    """

    candidates: Candidates
    runtime: Runtime[Allowance]
    allowance: ResolvedAllowance
    sent: ModelCall
    deadline: Deadline | None

    @classmethod
    def of(
        cls,
        candidates: Candidates,
        runtime: Runtime[Allowance],
        allowance: ResolvedAllowance,
        deadline: Deadline | None,
    ) -> NodeCall:
        resources, state = candidates.resources, candidates.state
        pair, query, settings, value = pair_of(state), query_of(state), settings_of(state), state["value"]
        if pair.is_check and value is not None:
            query, settings = AnsweredQuery.of(query, value), NO_SETTINGS
        model = resources.model(pair.model)
        sent = ModelCall.of(model, resources.catalogue, pair, query, settings, len(state["samples"]))
        return cls(candidates, runtime, allowance, sent, deadline)

    def reserve(self, key: str) -> Hold:
        """Hold the worst case and mark it as sent, in one step.

        Raises:
            BudgetExceeded, BudgetClosed, UnknownPrice, PromptTooLong, ModelNotAllowed: it cannot be reserved.
        """
        resources, sent = self.candidates.resources, self.sent
        worst = sent.model.worst_case_of(sent.messages, sent.generation)
        resources.sync()
        return resources.ledger.reserve(
            self.allowance.budget,
            key,
            worst,
            resources.catalogue.prices(worst),
            parameters=sent.parameters,
            tags=self._tags(self.candidates.state),
            dispatch=True,
            hint=sent.model.counting_hint,
            labels=resources.labels(pair_of(self.candidates.state).model),
        )

    def _tags(self, state: State) -> dict[str, str]:
        resources, info, pair = self.candidates.resources, self.runtime.execution_info, pair_of(state)
        thread = info.thread_id if info is not None else None
        tags = {"model": self.sent.model.name, "strategy": pair.strategy}
        if state["route"] is not None:
            row = row_from_json(state["route"]["row"])
            tags |= expected_tags(resources.router, query_of(state), row)
        if not pair.is_check:  # its model is not the session's
            tags |= session_tags(resources.sessions, state["asked"].get("session"), self.sent.model.name)
        if thread and thread.isprintable() and thread.strip():
            tags["thread"] = thread
        if row_allowance(self.runtime) and state["plan"]:
            tags |= plan_to_tags(state["plan"]["pairs"], state["plan"]["need"])
        return tags

    def settle(self, hold: Hold, pieces: CallStream) -> SettledCall:
        """Let the model generate, unless the ledger has the text already, and post the cost.

        Raises:
            ModelError: the model failed, or nobody waits any more.
            DeadlineExceeded: the deadline has passed.
        """
        ledger = self.candidates.resources.ledger
        with self._span(hold) as span:
            if hold.result is None:
                completion = self._generate(hold.key, pieces)
                result = json.dumps(completion_to_json(completion))
            else:
                result = hold.result
                completion = parse_completion(result, f"the text of the call {hold.key} in the ledger")
            entry = ledger.settle(hold.key, completion.usage.models, result)
            left = nanousd_left(ledger.lineage(self.allowance.budget))
            span.end(completion, entry, left, stored=hold.result is not None)
        self.runtime.stream_writer({"cost": entry.nanousd, "left": left, "key": hold.key})
        return SettledCall(completion, entry)

    def _span(self, hold: Hold) -> CallSpan:
        run = self.runtime.control if isinstance(self.runtime.control, StoppableRun) else None
        return CallSpan(
            current() if run is None else run.trace,
            self.candidates.resources.catalogue[self.sent.model.name],
            self.sent.generation,
            hold,
            route=self.candidates.state["route"],
            candidates=self.candidates.usable_pairs,
        )

    def _generate(self, key: str, pieces: CallStream) -> Completion:
        began, timeout, runtime = time.monotonic(), self.allowance.timeout, self.runtime
        reporter = self._reporter(key)
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
                    raise timed_out(self.sent.model, timeout)
                check_deadline(pieces, self.deadline)
                check_budget(pieces, self.candidates.resources.ledger, self.allowance.budget)
        except BaseException as error:
            reporter.fail(error)
            raise
        raise AssertionError("a stream ends with its completion")

    def _reporter(self, key: str) -> StreamReporter:
        route, sent = self.candidates.state["route"], self.sent
        return StreamReporter(
            self.runtime,
            f"answer-{key}",
            sent.model.name,
            sent.messages,
            route_metadata(route, sent.generation),
            is_check=pair_of(self.candidates.state).is_check,
        )
