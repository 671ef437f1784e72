"""Two runs compared, question by question: paired differences in accuracy, cost and time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from viaticum.reports.intervals import Estimate, mean
from viaticum.reports.runs import Run

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class RunComparison:
    """A run against the base, the first one, on the questions both have: this run less the base.

    Attributes:
        of: shared questions; graded: those whose right answer is known in both.
        unlike: ids that stand for another question in the other run; left out.
        won, lost: questions that this run alone, or the base alone, got right.
        accuracy, cost, seconds: paired differences; cost in nano-dollars a question.
        base_cost: mean nano-dollars a question of the base.
        why: why nothing, or no accuracy, is compared.
    """

    run: str
    base: str
    of: int
    graded: int
    unlike: int
    won: int
    lost: int
    accuracy: Estimate | None
    cost: Estimate | None
    seconds: Estimate | None
    base_cost: float
    why: str = ""


def compare(base: Run, base_costs: Array, other: Run, other_costs: Array) -> RunComparison:
    """Compare a run with the base on the questions both have.

    Rows are paired by id; where no id is shared, by the text of the question.

    Args:
        base_costs: nano-dollars of each row of the base.
        other_costs: nano-dollars of each row of the other run.
    """
    one, two = base.rows, other.rows
    first_rows, second_rows, unlike = _shared(base, other)
    names = (other.name, base.name)
    if not len(first_rows):
        why = "they share no question" if not unlike else "the ids they share stand for other questions"
        return RunComparison(*names, 0, 0, unlike, 0, 0, None, None, None, 0.0, why)
    graded = one.graded[first_rows] & two.graded[second_rows]
    left, right = one.right[first_rows][graded], two.right[second_rows][graded]
    return RunComparison(
        *names,
        of=len(first_rows),
        graded=int(graded.sum()),
        unlike=unlike,
        won=int((right & ~left).sum()),
        lost=int((left & ~right).sum()),
        accuracy=mean(right.astype(float) - left.astype(float)),
        cost=mean((other_costs[second_rows] - base_costs[first_rows]).astype(float)),
        seconds=mean(two.seconds[second_rows] - one.seconds[first_rows]),
        base_cost=float(base_costs[first_rows].mean()),
        why="" if graded.any() else "no question they share has a known right answer in both",
    )


def _shared(one: Run, two: Run) -> tuple[Array, Array, int]:
    """Row indices in both runs of the questions they share, and how many shared ids are unlike questions."""
    row_of_id = {name: n for n, name in enumerate(two.rows.ids)}
    found, unlike = list[tuple[int, int]](), 0
    for n, (name, text) in enumerate(zip(one.rows.ids, one.rows.text, strict=True)):
        at = row_of_id.get(name)
        if at is None:
            continue
        if text and two.rows.text[at] and text != two.rows.text[at]:
            unlike += 1
            continue
        found.append((n, at))
    if not found:
        texts = {int(text): n for n, text in enumerate(two.rows.text) if text}
        found = [(n, texts[int(text)]) for n, text in enumerate(one.rows.text) if int(text) in texts]
        unlike = unlike if not found else 0
    pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], unlike
