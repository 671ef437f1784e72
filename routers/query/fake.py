"""A router with a fixed table, for tests of applications without a fitted router."""

from __future__ import annotations

from collections.abc import Mapping

from viaticum.errors import InputError
from viaticum.routers.query.base import QueryRouter
from viaticum.types import Pair, Query, RoutingTable, Row

NANOUSD_PER_TOKEN = 1_000  # one dollar a million tokens, input and output: the price of a `ScriptedModel`
EXPECTED_TOKENS = (100, 20)  # input and output tokens of a call


class FakeRouter(QueryRouter):
    """Ranks the pairs in the given order, or by the given accuracies.

    Args:
        pairs: `model+strategy` texts, or mappings of them to accuracies (0 to 1).
        cost: expected cost of a call in nano-dollars.

    Raises:
        InputError: no pair, or an accuracy out of range.
    """

    def __init__(self, *pairs: str | Mapping[str, float], cost: int | None = None) -> None:
        accuracies: dict[str, float] = {}
        for index, each in enumerate(pairs):
            accuracies |= each if isinstance(each, Mapping) else {each: 0.9 - 0.9 * index / len(pairs)}
        if not accuracies or not all(0 <= accuracy <= 1 for accuracy in accuracies.values()):
            raise InputError(f"a router wants pairs with accuracies from 0 to 1, got {accuracies or 'none'}")
        expected = sum(EXPECTED_TOKENS) * NANOUSD_PER_TOKEN if cost is None else cost
        tokens = EXPECTED_TOKENS[1]
        self._table = RoutingTable(
            tuple(
                Row(Pair.parse(pair), accuracy, tokens, 2 * tokens, expected, 2 * expected)
                for pair, accuracy in accuracies.items()
            )
        )

    def table(self, query: Query) -> RoutingTable:
        return self._table
