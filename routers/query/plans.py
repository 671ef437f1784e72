"""Plans: which pairs a question is given to, one after the other, and when their answers settle it.

A plan asks its pairs in order and stops as soon as one answer was given `need` times; where none ever is, the answer
given most often stands, of equals the one asked last. A single pair is the plan of length one. Since the outcome table
holds every pair's answer to every question, what a plan would have done is read from it, not estimated
(`simulate`), and a library of plans worth having is searched for among all of them (`search`).
None of the routing papers has plans; cascades with a judge, as FrugalGPT (arXiv 2305.05176) has them, come closest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from viaticum.errors import InputError
from viaticum.types import Pair

LONGEST = {2: 4, 3: 5}  # most pairs of a plan, by the votes that settle it
CHEAP = 12  # pairs among which every two are tried as a beginning
SHRINK = 20  # questions that the whole table is worth beside the questions of one kind
WEIGHTS = tuple(np.geomspace(0.7, 4000, 16))  # accuracy that a dollar is worth: from spendthrift to miser
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, order=True)
class Plan:
    """pairs: who is asked, in order; need: equal answers that settle it."""

    pairs: tuple[Pair, ...]
    need: int = 2

    def __post_init__(self) -> None:
        if not self.pairs or len(set(self.pairs)) < len(self.pairs):
            raise InputError("a plan asks at least one pair, and each once")
        if self.need < 2:
            raise InputError(f"answers settle a plan by agreeing, so need is 2 or more, got {self.need}")

    def __str__(self) -> str:
        if len(self.pairs) == 1:
            return str(self.pairs[0])
        times = {2: "two", 3: "three"}.get(self.need, str(self.need))
        return f"{', '.join(map(str, self.pairs))} until {times} agree"


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What a router expects of one plan on one query; costs are nano-dollars, p90 of the plan as a whole."""

    plan: Plan
    accuracy: float
    cost_p50: int
    cost_p90: int


@dataclass(frozen=True, slots=True)
class PlanRoute:
    """The plan chosen, its row, and why, in words."""

    plan: Plan
    row: PlanRow
    why: str


Steps = tuple[tuple[int, ...], int]  # a plan by the numbers of its pairs


def simulate(steps: Steps, correct: Array, cost: Array, answers: Array) -> tuple[Array, Array, Array]:
    """What a plan does on every question of a grid whose pairs were all asked: right or not [Q], dollars [Q], calls [Q]."""
    order, need = steps
    questions = len(correct)
    spent, calls = np.zeros(questions), np.zeros(questions, dtype=np.int64)
    done = np.zeros(questions, dtype=bool)
    most, lead = np.zeros(questions), np.full(questions, order[0])
    for place, pair in enumerate(order):
        asked = ~done
        spent[asked] += cost[asked, pair]
        calls[asked] += 1
        votes = np.ones(questions)
        for before in order[:place]:
            votes += answers[:, before] == answers[:, pair]
        ahead = asked & (votes >= most)
        lead[ahead], most[ahead] = pair, votes[ahead]
        done |= asked & (most >= need)
    return correct[np.arange(questions), lead], spent, calls


def search(correct: Array, cost: Array, answers: Array, kinds: Array, *, top: int = 3) -> list[Steps]:
    """Plans worth having: for some kind of question and some worth of a dollar among the best, by beam search.

    kinds: a number for each question [Q], of questions on which pairs do alike. Every single pair that is best
    somewhere is among them.
    """
    pairs = correct.shape[1]
    played: dict[Steps, tuple[Array, Array]] = {}

    def results(plans: Sequence[Steps]) -> tuple[Array, Array]:
        for plan in plans:
            if plan not in played:
                played[plan] = simulate(plan, correct, cost, answers)[:2]
        return np.stack([played[plan][0] for plan in plans], 1), np.stack(
            [played[plan][1] for plan in plans], 1
        )

    def best(plans: Sequence[Steps], count: int) -> list[Steps]:
        right, spent = results(plans)
        kept: set[int] = set()
        for part in (np.ones(len(kinds), dtype=bool), *(kinds == kind for kind in np.unique(kinds))):
            own = part.sum() / (part.sum() + SHRINK)
            accuracy = own * right[part].mean(0) + (1 - own) * right.mean(0)
            dollars = own * spent[part].mean(0) + (1 - own) * spent.mean(0)
            for weight in WEIGHTS:
                kept |= set(np.argsort(weight * dollars - accuracy, kind="stable")[:count].tolist())
        return [plans[number] for number in sorted(kept)]

    singles: list[Steps] = [((pair,), 2) for pair in range(pairs)]
    cheap = np.argsort(cost.mean(0), kind="stable")[:CHEAP].tolist()
    found = set(singles)
    for need, longest in LONGEST.items():
        front: list[Steps] = [(order, need) for order, _ in singles]
        for length in range(2, min(longest, pairs) + 1):
            longer = _unique(
                ((*order, pair), need) for order, _ in front for pair in range(pairs) if pair not in order
            )
            front = best(longer, top)
            if length >= need:
                found |= set(front)
            if length == 2:
                front = _unique([*front, *(((a, b), need) for a in cheap for b in cheap if a != b)])
    return best(sorted(found), top + 1)


def _unique(plans: Iterable[Steps]) -> list[Steps]:
    return list(dict.fromkeys(plans))
