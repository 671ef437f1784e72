"""A router with a fixed table, so that users test their apps offline, without a fitted router."""

from __future__ import annotations

from collections.abc import Mapping

from viaticum.errors import InputError
from viaticum.routers.query.base import QueryRouter
from viaticum.types import Pair, Query, RoutingTable, Row

NANOUSD_PER_TOKEN = 1_000  # a dollar a million tokens, input and output alike: the price of a `ScriptedModel`
TYPICAL = (100, 20)  # input and output tokens expected of every call


class FakeRouter(QueryRouter):
    """Wants the pairs in the order given, or by the accuracies given.

    pairs: `model+strategy` texts, or a mapping of them to accuracies (0 to 1). cost: nano-dollars it expects of a call.
    Raises `InputError` for no pair, or an accuracy out of range.
    """

    def __init__(self, *pairs: str | Mapping[str, float], cost: int | None = None) -> None:
        wanted: dict[str, float] = {}
        for place, each in enumerate(pairs):
            wanted |= each if isinstance(each, Mapping) else {each: 0.9 - 0.9 * place / len(pairs)}
        if not wanted or not all(0 <= accuracy <= 1 for accuracy in wanted.values()):
            raise InputError(f"a router wants pairs with accuracies from 0 to 1, got {wanted or 'none'}")
        expected = sum(TYPICAL) * NANOUSD_PER_TOKEN if cost is None else cost
        self._table = RoutingTable(
            tuple(
                Row(Pair.parse(pair), accuracy, TYPICAL[1], 2 * TYPICAL[1], expected, 2 * expected)
                for pair, accuracy in wanted.items()
            )
        )

    def table(self, query: Query) -> RoutingTable:
        return self._table
