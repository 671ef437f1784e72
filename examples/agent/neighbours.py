"""A router for the comparison: how well a model did on the most similar other tasks it was run on.

Similar are questions that share words. The task itself is never counted, so every prediction is of a task
that it has not seen. `viaticum router fit` makes better ones from more outcomes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from viaticum import Pair, Query, RoutingTable
from viaticum.routers.query import QueryRouter
from viaticum.types import Row

NEAREST = 5


@dataclass(frozen=True)
class Outcome:
    """A run of one model on one task. cost: nano-dollars; tokens: written; steps: calls."""

    question: str
    model: str
    solved: bool
    cost: int
    tokens: int
    steps: int


class NeighbourRouter(QueryRouter):
    """Predicts from runs of each model. Accuracies count one right and one wrong run more, as Laplace did."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self._outcomes = [(_words(each.question), each) for each in outcomes]
        self._models = list(dict.fromkeys(each.model for each in outcomes))

    def table(self, query: Query) -> RoutingTable:
        return RoutingTable(tuple(self._row(model, query.text) for model in self._models))

    def _row(self, model: str, question: str) -> Row:
        words = _words(question)
        others = [each for each in self._outcomes if each[1].model == model and each[1].question != question]
        others.sort(key=lambda each: -len(words & each[0]) / len(words | each[0]))
        near = [each for _, each in others[:NEAREST]]
        accuracy = (1 + sum(each.solved for each in near)) / (2 + len(near))
        costs = [each.cost // max(1, each.steps) for each in near] or [0]
        tokens = [each.tokens // max(1, each.steps) for each in near] or [0]
        middle = len(costs) // 2
        return Row(
            Pair(model, "chat"),
            accuracy,
            sorted(tokens)[middle],
            max(tokens),
            sorted(costs)[middle],
            max(costs),
        )


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower()))
