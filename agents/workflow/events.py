"""The events that `Viaticum.stream` yields before the `Answer`: one frozen dataclass per event.

The workflow writes plain dicts to LangGraph's custom stream, each with one of the keys below;
`event_from_json` converts them.

    {"table": [...]}                     TableMade
    {"route": {...}}                     RouteChosen
    {"text": "..."}                      TextPiece
    {"thinking": "..."}                  ThinkingPiece
    {"again": 2}                         TriedAgain
    {"cost": 1, "left": 2, "key": "..."} CallSettled
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from viaticum.agents.workflow.serialization import route_from_json, row_from_json
from viaticum.money import as_usd
from viaticum.types import Route, RoutingTable


@dataclass(frozen=True, slots=True)
class TableMade:
    """The router's estimates for each pair."""

    table: RoutingTable


@dataclass(frozen=True, slots=True)
class RouteChosen:
    """The pair that is called next, and why."""

    route: Route


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A piece of the text that the model generates."""

    text: str


@dataclass(frozen=True, slots=True)
class ThinkingPiece:
    """A piece of the thought that the model writes before its text; not part of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class TriedAgain:
    """The model was unavailable and is called again; the text of this call starts over.

    attempt: number of this try, 2 for the first repetition.
    """

    attempt: int


@dataclass(frozen=True, slots=True)
class CallSettled:
    """A call was settled.

    cost: nano-dollars; left: nano-dollars left after it, None for no limit; key: of the call in the ledger.
    """

    cost: int
    left: int | None
    key: str

    @property
    def cost_usd(self) -> Decimal:
        """The cost in dollars, exactly."""
        return as_usd(self.cost)

    @property
    def left_usd(self) -> Decimal | None:
        return None if self.left is None else as_usd(self.left)


Event = TableMade | RouteChosen | TextPiece | ThinkingPiece | TriedAgain | CallSettled


def event_from_json(data: Mapping[str, Any]) -> Event | None:
    """The event of a dict from the custom stream; None for a dict of another source."""
    if "text" in data:
        return TextPiece(data["text"])
    if "thinking" in data:
        return ThinkingPiece(data["thinking"])
    if "table" in data:
        return TableMade(RoutingTable(tuple(row_from_json(row) for row in data["table"])))
    if "route" in data:
        return RouteChosen(route_from_json(data["route"]))
    if "again" in data:
        return TriedAgain(data["again"])
    if "cost" in data:
        return CallSettled(data["cost"], data["left"], data["key"])
    return None
