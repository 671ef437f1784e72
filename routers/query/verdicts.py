"""Verdicts of verifiers on the answers of an outcome table, beside its matrix; how often they are right.

Leaves out their form on disk (`viaticum.outcomes`) and plans with a check (`viaticum.routers.query.plans`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from viaticum.errors import DataError
from viaticum.outcomes import checked_pair
from viaticum.types import Outcome, Pair

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Verdicts:
    """Verdicts in V columns, one a verifier and pair that it checked; NaN where it was not asked.

    Args:
        columns: index of the checked pair among those of the matrix, and the verifier, of each column.
        yes: 1 where the verifier said that the answer is right, else 0 [Q, V].
        cost: dollars; NaN also where they are not known [Q, V].
        seconds: NaN also where they are not known [Q, V].
    """

    columns: tuple[tuple[int, str], ...]
    yes: Array
    cost: Array
    seconds: Array

    def select(self, index: Array) -> Verdicts:
        return Verdicts(self.columns, self.yes[index], self.cost[index], self.seconds[index])

    def columns_of(self, numbers: Sequence[int]) -> Verdicts:
        arrays = (each[:, list(numbers)] for each in (self.yes, self.cost, self.seconds))
        return Verdicts(tuple(self.columns[number] for number in numbers), *arrays)

    def concat(self, other: Verdicts) -> Verdicts:
        """The rows of both; a column that one lacks is unknown there."""
        columns = tuple(dict.fromkeys((*self.columns, *other.columns)))
        sides = [each._laid_out(columns) for each in (self, other)]
        return Verdicts(columns, *(np.concatenate(arrays) for arrays in zip(*sides, strict=True)))

    def _laid_out(self, columns: Sequence[tuple[int, str]]) -> list[Array]:
        found = [np.full((len(self.yes), len(columns)), np.nan) for _ in range(3)]
        for number, column in enumerate(columns):
            if column in self.columns:
                own = self.columns.index(column)
                for array, known in zip(found, (self.yes, self.cost, self.seconds), strict=True):
                    array[:, number] = known[:, own]
        return found

    @classmethod
    def none(cls, questions: int) -> Verdicts:
        return cls((), *(np.zeros((questions, 0)) for _ in range(3)))


def lay_out(
    verdicts: Iterable[Outcome],
    pairs: Sequence[Pair],
    rows: Mapping[tuple[str, str], int],
    correct: Array,
    costs: Sequence[float],
    *,
    live: bool = False,
) -> Verdicts:
    """The verdicts on answers of a matrix.

    Those on other pairs or questions are left out, and those of a model on its own answers.

    Args:
        verdicts: rows of verdicts.
        pairs: of the matrix.
        rows: its row of each data set and question id.
        correct: its outcomes [Q, P].
        costs: dollars of each verdict; NaN where they are not known.
        live: of verdicts that contradict each other the last counts.

    Raises:
        DataError: a verdict is on an answer that is another one in the table, or two contradict each other.
    """
    numbers = {pair: number for number, pair in enumerate(pairs)}
    cells: list[tuple[Outcome, float, int, tuple[int, str]]] = []
    for row, cost in zip(verdicts, costs, strict=True):
        number, pair = rows.get((row.dataset, str(row.question_id))), checked_pair(row)
        if number is None or pair not in numbers or pair.model == row.model:
            continue
        column = (numbers[pair], row.model)
        is_yes = row.answer == "yes"
        if not np.isnan(correct[number, column[0]]) and (correct[number, column[0]] == is_yes) != row.correct:
            raise DataError(
                f"{row.dataset} {row.question_id}: the verdict of {row.model} is on another answer of {pair} "
                "than the table has; remove the verdict, or ask for it again"
            )
        cells.append((row, cost, number, column))
    columns = tuple(sorted({column for *_, column in cells}))
    yes, dollars, seconds = (np.full((len(rows), len(columns)), np.nan) for _ in range(3))
    for row, cost, number, column in cells:
        cell, is_yes = (number, columns.index(column)), row.answer == "yes"
        if not live and yes[cell] == (not is_yes):
            raise DataError(
                f"{row.dataset} {row.question_id}: one verdict of {row.model} on {checked_pair(row)} says "
                "yes, another does not; remove one of them"
            )
        yes[cell] = is_yes
        dollars[cell] = dollars[cell] if np.isnan(cost) else cost
        seconds[cell] = seconds[cell] if row.seconds is None else row.seconds
    return Verdicts(columns, yes, dollars, seconds)


def verifier_facts(verdicts: Verdicts, pairs: Sequence[Pair], correct: Array) -> list[dict[str, Any]]:
    """Of each verifier and pair: how often it says yes to right and to wrong answers, and what it costs.

    None where no answer was right, or wrong, and where no cost is known; `without_cost` counts those that are
    not. correct: of the matrix [Q, P].
    """
    found = []
    for number, (pair, verifier) in enumerate(verdicts.columns):
        known = ~np.isnan(verdicts.yes[:, number])
        right = known & (correct[:, pair] == 1)
        wrong = known & (correct[:, pair] == 0)
        costs = verdicts.cost[known & ~np.isnan(verdicts.cost[:, number]), number]
        found.append(
            {
                "verifier": verifier,
                "pair": str(pairs[pair]),
                "answers": int(known.sum()),
                "yes_if_right": _share(verdicts.yes[right, number]),
                "yes_if_wrong": _share(verdicts.yes[wrong, number]),
                "cost": float(costs.mean()) if len(costs) else None,
                "without_cost": int(known.sum()) - len(costs),
            }
        )
    return found


def _share(values: Array) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None
