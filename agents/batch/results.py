"""Builds the `JobRow` of a row: its answer, parsed and graded, and its calls as the ledger has them.

Leaves out making calls (`agents.batch.executor`) and writing rows (`agents.batch.output`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from viaticum.agents.batch.cache import is_cached
from viaticum.agents.batch.planned_rows import PlannedRow
from viaticum.agents.workflow.calls import ModelCall, existing_tries
from viaticum.budgets import Ledger
from viaticum.budgets.records import Hold
from viaticum.jobs import Call, JobRow, RowState
from viaticum.strategies import equivalent
from viaticum.strategies import get as get_strategy
from viaticum.strategies.answers import is_right
from viaticum.strategies.verify import NO, YES, verdict_of
from viaticum.types import VERIFY, Completion, Pair, TokenCount

BATCH_TAG = "provider_batch"  # of a hold: the provider's batch that its call is part of


@dataclass(frozen=True, slots=True)
class CallResult:
    """A settled call: its completion, and its cost in nano-dollars."""

    completion: Completion
    cost: int

    def by_model(self, call: ModelCall | None) -> list[list[str]] | None:
        """[model, text] in the order of the text; None where one model wrote all of it."""
        trace = self.completion.trace
        tokenizer = getattr(call.model, "tokenizer", None) if call is not None else None
        if trace is None or tokenizer is None or len(set(trace.made_by)) < 2:
            return None
        tokens = zip(trace.made_by, trace.tokens, strict=True)
        return [
            [trace.models[model], tokenizer.decode([token for _, token in each], skip_special_tokens=True)]
            for model, each in itertools.groupby(tokens, key=lambda one: one[0])
        ]


def read_row(planned: PlannedRow, pair: Pair, completion: Completion) -> tuple[str | None, str]:
    """The answer in a text, or None, and the reason."""
    reading = get_strategy(pair.strategy).read(completion, planned.query)
    return reading.value, reading.reason


def call_record(planned: PlannedRow, key: str, paid: CallResult, answer: str | None) -> Call:
    """The record of a row's one call."""
    done = paid.completion
    assert planned.plan is not None
    return Call(
        str(planned.plan.pairs[0]),
        key,
        paid.cost,
        {name: [count.input_tokens, count.output_tokens] for name, count in done.usage.models.items()},
        round(done.usage.seconds, 6),
        done.finish_reason,
        readable(answer),
        is_cached({"warnings": list(done.warnings)}),
        done.reported_nanousd,
        done.usage.reasoning_tokens,
    )


def paid_calls(ledger: Ledger, run: str, votes: Sequence[Sequence[str]] = ()) -> tuple[tuple[Call, ...], int]:
    """The paid calls under the keys of a row, in order, and the cost of all their tries in nano-dollars.

    run: prefix of the keys. votes: [pair, answer].
    """
    calls: list[Call] = []
    total, answers = 0, {pair: readable(value) for pair, value in votes}
    for found, cost in posted_holds(ledger, run):
        total += cost
        payload = json.loads(found.result) if found.result is not None else {}
        usage = {name: TokenCount(*each) for name, each in payload.get("usage", {}).items()}
        pair = f"{found.tags.get('model', '')}+{found.tags.get('strategy', '')}"
        calls.append(
            Call(
                pair,
                found.key,
                cost,
                {name: [each.input_tokens, each.output_tokens] for name, each in usage.items()},
                round(payload.get("seconds", 0.0), 6),
                payload.get("finish_reason", "aborted"),
                answers.get(pair) if found.tags.get("strategy") != VERIFY else _verdict(payload),
                is_cached(payload),
                payload.get("reported_nanousd"),
                sum(each.reasoning_tokens for each in usage.values()),
            )
        )
    return tuple(calls), total


def _verdict(payload: Mapping[str, Any]) -> str | None:
    """What a check said: yes or no."""
    verdict = verdict_of(payload.get("text", ""), payload.get("finish_reason", "aborted"))
    return None if verdict is None else YES if verdict else NO


def posted_holds(ledger: Ledger, run: str) -> Iterator[tuple[Hold, int]]:
    """The holds under the keys of a row whose cost is posted, in order, and the cost in nano-dollars."""
    for number in itertools.count():
        holds = list(existing_tries(ledger, f"{run}/{number}"))
        if not holds:
            return
        for hold in holds:
            paid = [entry.nanousd for entry in ledger.entries(key=hold.key) if entry.kind == "post"]
            if paid:
                yield hold, sum(paid)


def build_row(
    planned: PlannedRow,
    state: RowState,
    reason: str = "",
    *,
    answer: str | None = None,
    pair: str = "",
    calls: tuple[Call, ...] = (),
    cost: int = 0,
    text: str | None = None,
    thinking: str | None = None,
    pieces: list[list[str]] | None = None,
) -> JobRow:
    row, query = planned.row, planned.row.query
    answer, text = readable(answer), readable(text)
    correct = None
    if row.gold is not None and state != "skipped":
        correct = is_right(answer, row.accepted, query.kind if query else "auto")
    return JobRow(
        row.id,
        query.text if query is not None else "",
        state,
        readable(reason),
        answer,
        " or ".join(row.accepted) or None,
        correct,
        text,
        "" if planned.plan is None else str(planned.plan),
        pair,
        planned.accuracy,
        planned.cost_p50,
        planned.cost_p90,
        planned.tokens_p50,
        planned.tokens_p90,
        cost,
        sum(call.seconds for call in calls),
        calls,
        None if pieces is None else [[model, readable(piece)] for model, piece in pieces],
        row.number,
        readable(thinking) or None,
        planned.seen,
    )


@overload
def readable(text: str) -> str: ...


@overload
def readable(text: str | None) -> str | None: ...


def readable(text: str | None) -> str | None:
    """Replace lone surrogates, which models can write in JSON and UTF-8 cannot encode."""
    return text if text is None or text.isascii() else text.encode("utf-8", "replace").decode()


def row_from_workflow(
    planned: PlannedRow, values: Mapping[str, Any], calls: tuple[Call, ...], cost: int, with_text: bool
) -> JobRow:
    """The row of a finished workflow. values: its last state."""
    value = values.get("value")
    kind = planned.query.kind
    voted = [pair for pair, answer in values.get("votes", ()) if equivalent(answer, value, kind)]
    return build_row(
        planned,
        "failed" if value is None else "answered",
        values.get("reason", ""),
        answer=value,
        pair=voted[-1] if voted else values.get("pair") or "",
        calls=calls,
        cost=cost,
        text=values.get("text") if with_text else None,
        thinking=values.get("thinking") if with_text else None,
    )
