"""Completions, rows and routes as plain JSON values and back, for checkpoints, events and the ledger.

Plain values stay readable across versions and need no pickle. The plan that a call belongs to is stored in
the tags of its hold. Leaves out where the values are stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, astuple, fields
from typing import Any

from viaticum.budgets import Hold
from viaticum.errors import DataError
from viaticum.routers.query import Plan
from viaticum.types import Completion, Pair, Route, Row, TokenCount, Usage

_FIRST_COUNTS = 5  # always in a list of counts; the later one only where it is not 0
_OPTIONAL_OF_ROW = [each.name for each in fields(Row) if each.default is not MISSING]


def count_to_list(count: TokenCount) -> list[int]:
    """The counts in the order of the fields of `TokenCount`, without later ones that are 0."""
    values = list(astuple(count))
    return values if any(values[_FIRST_COUNTS:]) else values[:_FIRST_COUNTS]


def completion_to_json(completion: Completion) -> dict[str, Any]:
    """A completion without its trace; token counts as lists in the order of the fields of `TokenCount`."""
    data: dict[str, Any] = {
        "text": completion.text,
        "usage": {name: count_to_list(count) for name, count in completion.usage.models.items()},
        "seconds": completion.usage.seconds,
        "finish_reason": completion.finish_reason,
        "tool_calls": [dict(call) for call in completion.tool_calls],
        "logprobs": [dict(token) for token in completion.logprobs],
        "reported_nanousd": completion.reported_nanousd,
        "warnings": list(completion.warnings),
    }
    later = {"thinking": completion.thinking, "stop_string": completion.stop_string}
    return data | {name: value for name, value in later.items() if value}


def parse_completion(text: str, source: str) -> Completion:
    """Parse a completion. Raises `DataError` where the text is damaged; source: where it lies."""
    try:
        return completion_from_json(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{source} is damaged: no completion ({type(error).__name__}: {error})") from None


def completion_from_json(data: Mapping[str, Any]) -> Completion:
    usage = {name: TokenCount(*counts) for name, counts in data["usage"].items()}
    return Completion(
        data["text"],
        Usage(usage, data["seconds"]),
        data["finish_reason"],
        tool_calls=tuple(data.get("tool_calls", ())),
        logprobs=tuple(data.get("logprobs", ())),
        reported_nanousd=data.get("reported_nanousd"),
        warnings=tuple(data.get("warnings", ())),
        thinking=data.get("thinking", ""),
        stop_string=data.get("stop_string", ""),
    )


def row_to_json(row: Row) -> dict[str, Any]:
    """The fields of a row; those that are optional only where they are set."""
    later = {name: getattr(row, name) for name in _OPTIONAL_OF_ROW}
    return {
        "pair": str(row.pair),
        "accuracy": row.accuracy,
        "tokens_p50": row.tokens_p50,
        "tokens_p90": row.tokens_p90,
        "cost_p50": row.cost_p50,
        "cost_p90": row.cost_p90,
        **{name: value for name, value in later.items() if value not in (None, "")},
    }


def row_from_json(data: Mapping[str, Any]) -> Row:
    return Row(**(dict(data) | {"pair": Pair.parse(data["pair"])}))


def route_to_json(route: Route) -> dict[str, Any]:
    return {"pair": str(route.pair), "why": route.why, "row": row_to_json(route.row)}


def route_from_json(data: Mapping[str, Any]) -> Route:
    return Route(Pair.parse(data["pair"]), row_from_json(data["row"]), data["why"])


def plan_to_tags(pairs: Sequence[str], need: int) -> dict[str, str]:
    """The tag that names the plan of a call; none for a single pair, whose other tags name it."""
    return {"plan": json.dumps([need, *pairs])} if len(pairs) > 1 else {}


def plan_from_hold(hold: Hold) -> Plan | None:
    """The plan that the call of a hold belongs to, read from its tags; None if they name none."""
    if "plan" in hold.tags:
        need, *pairs = json.loads(hold.tags["plan"])
        return Plan(tuple(map(Pair.parse, pairs)), need, stored=True)
    if {"model", "strategy"} <= set(hold.tags):
        return Plan((Pair(hold.tags["model"], hold.tags["strategy"]),))
    return None
