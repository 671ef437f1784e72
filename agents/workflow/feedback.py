"""Feedback: whether an answer was right, as a row of the live outcomes that routers are fitted on again.

Leaves out what a router makes of it (`viaticum.agents.workflow.watched_router`).
"""

from __future__ import annotations

from pathlib import Path

from viaticum.agents.workflow.settings import LIVE_OUTCOMES
from viaticum.agents.workflow.telemetry import record_feedback
from viaticum.agents.workflow.watched_router import now
from viaticum.errors import InputError
from viaticum.outcomes import append_outcome
from viaticum.questions import digest_of
from viaticum.routers.query import QueryRouter
from viaticum.types import Answer, Outcome, Query


def record_outcome(folder: Path, router: QueryRouter, query: Query, answer: Answer, correct: bool) -> Path:
    """Add a row for the last pair of an answer to the outcomes of a folder; returns their file.

    Args:
        router: that chose the pair.

    Raises:
        InputError: no pair gave the answer.
    """
    if not answer.routes:
        raise InputError("no pair gave this answer, so there is nothing to learn from it")
    last, is_only_pair = answer.routes[-1], len(answer.routes) == 1
    row = Outcome(
        dataset="live",
        question_id=digest_of(query.text),
        question=query.text,
        model=last.pair.model,
        strategy=last.pair.strategy,
        answer=answer.value,
        correct=correct,
        input_tokens=answer.usage.input_tokens if is_only_pair else None,
        output_tokens=answer.usage.output_tokens if is_only_pair else None,
        cost_nanousd=answer.cost if is_only_pair else None,
        seconds=answer.usage.seconds if is_only_pair else None,
        finish_reason=answer.finish_reason,
    )
    expected = router.expectation(query, last.row)
    others: dict[str, object] = {"at": now()}
    if expected is not None and is_only_pair:
        others |= {"expected_accuracy": last.row.accuracy, "profile": expected.profile}
    append_outcome(folder / LIVE_OUTCOMES, row, others)
    record_feedback(str(last.pair), correct, last.row.accuracy if is_only_pair else None)
    return folder / LIVE_OUTCOMES
