"""What `Viaticum.stream` yields before the `Answer`: frozen data, one class an event.

The workflow itself writes plain dicts to LangGraph's custom stream, each with one of the names below; `event_from_json`
makes an event of one.

    {"table": [...]}                     TableMade
    {"route": {...}}                     RouteChosen
    {"text": "..."}                      TextPiece
    {"again": 2}                         TriedAgain
    {"cost": 1, "left": 2, "key": "..."} CallSettled
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from viaticum.agents.workflow.serialization import route_from_json, row_from_json
from viaticum.types import Route, RoutingTable


@dataclass(frozen=True, slots=True)
class TableMade:
    """What the router expects of each pair."""

    table: RoutingTable


@dataclass(frozen=True, slots=True)
class RouteChosen:
    """The pair that is asked next, and why."""

    route: Route


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A piece of what the model writes."""

    text: str


@dataclass(frozen=True, slots=True)
class TriedAgain:
    """The model was unavailable and is asked anew, the `attempt`-th time; the text of this call begins again."""

    attempt: int


@dataclass(frozen=True, slots=True)
class CallSettled:
    """A call was paid for: its cost and what is left then, in nano-dollars (None: no limit), and its ledger key."""

    cost: int
    left: int | None
    key: str


Event = TableMade | RouteChosen | TextPiece | TriedAgain | CallSettled


def event_from_json(said: Mapping[str, Any]) -> Event | None:
    """The event of a dict from the custom stream; None for a dict that is not the workflow's."""
    if "text" in said:
        return TextPiece(said["text"])
    if "table" in said:
        return TableMade(RoutingTable(tuple(row_from_json(row) for row in said["table"])))
    if "route" in said:
        return RouteChosen(route_from_json(said["route"]))
    if "again" in said:
        return TriedAgain(said["again"])
    if "cost" in said:
        return CallSettled(said["cost"], said["left"], said["key"])
    return None
