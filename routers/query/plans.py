"""Plans: the pairs that a question is given to, one after the other, and the agreement that ends it.

A plan calls its pairs in order and stops as soon as `need` of them gave the same answer; where that never
happens, the most frequent answer counts, among equals the latest. A single pair is the plan of length one.
A plan with a check asks a pair, then another model whether that answer is right (strategy `verify`). A yes
ends the plan; else its last pair is asked, whose answer counts where it gives one. No model checks its own
answer: what it got wrong once it mostly calls right (arXiv 2310.01798).

Since the outcome table holds every pair's answer to every question, the result of a plan is read from it, not
estimated (`simulate`), and a library of useful plans is searched for (`search`). The routing papers have no
plans; cascades with a judge, as in FrugalGPT (arXiv 2305.05176), are closest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np

from viaticum.errors import InputError
from viaticum.types import Pair

MAX_LENGTH = {2: 4, 3: 5}  # most pairs of a plan, by the equal answers that it needs
CHEAP_PAIRS = 12  # pairs among which every two are tried as the first two of a plan
PRIOR_QUESTIONS = 20  # weight of the whole table beside the questions of one cluster
COST_WEIGHTS = tuple(np.geomspace(0.7, 4000, 16))  # values of a dollar in units of accuracy
Array = np.ndarray[Any, Any]
# Indices of the pairs, and `Plan.need`. Verdicts come after the pairs (`OutcomeMatrix.with_verdicts`).
IndexedPlan = tuple[tuple[int, ...], int]
BY_CHECK = 1  # `Plan.need` where a check decides
SELF_CHECK = (
    "it finds its own errors right (arXiv 2310.01798, 2404.13076): name another model as the verifier"
)


@dataclass(frozen=True, slots=True, order=True)
class Plan:
    """One pair, or several that are called until their answers agree, or until a check says yes.

    Args:
        pairs: called in this order. The second of three may be a check, as `judge+verify`.
        need: equal answers that end the plan; 1 where a check does.
        stored: read from what an earlier version may have written, whose models could check their own
            answers. Such a plan is not followed.

    Raises:
        InputError: no pairs, one of them twice, a check elsewhere, or a model that checks its own answer.
    """

    pairs: tuple[Pair, ...]
    need: int = 2
    stored: InitVar[bool] = False

    def __post_init__(self, stored: bool) -> None:
        if not self.pairs or len(set(self.pairs)) < len(self.pairs):
            raise InputError("a plan asks at least one pair, and each once")
        checks = [pair.is_check for pair in self.pairs]
        if checks == [False, True, False] and self.need == BY_CHECK:
            if self.pairs[0].model == self.pairs[1].model and not stored:
                raise InputError(f"{self.pairs[0].model} does not check its own answers; {SELF_CHECK}")
            return
        if len(checks) > 1 and any(checks):
            raise InputError("a plan with a check is a pair, the check and another pair, and needs 1 answer")
        if self.need < 2:
            raise InputError(f"answers settle a plan by agreeing, so need is 2 or more, got {self.need}")

    def __str__(self) -> str:
        if len(self.pairs) == 1:
            return str(self.pairs[0])
        if self.need == BY_CHECK:
            return f"{self.pairs[0]} if {self.pairs[1]} says yes, else {self.pairs[2]}"
        times = {2: "two", 3: "three"}.get(self.need, str(self.need))
        return f"{', '.join(map(str, self.pairs))} until {times} agree"


@dataclass(frozen=True, slots=True)
class PlanRow:
    """Prediction for one plan on one query; costs of the whole plan in nano-dollars, the mean where known.

    average, origin: of the row of a single pair (`viaticum.types.Row`).
    seconds: expected of all calls of the plan, one after the other; None where they are unknown.
    """

    plan: Plan
    accuracy: float
    cost_p50: int
    cost_p90: int
    cost_mean: int | None = None
    average: float | None = None
    origin: str = ""
    seconds: float | None = None

    @property
    def expected_cost(self) -> int:
        """The mean cost, the median where no mean is known."""
        return self.cost_p50 if self.cost_mean is None else self.cost_mean


@dataclass(frozen=True, slots=True)
class PlanRoute:
    """The chosen plan, its row, and the reason as a text."""

    plan: Plan
    row: PlanRow
    why: str


def simulate(plan: IndexedPlan, correct: Array, cost: Array, answers: Array) -> tuple[Array, Array, Array]:
    """The result of a plan on questions that all its pairs were asked: correct [Q], dollars [Q], calls [Q].

    calls: how many of its pairs the plan has come to, with a check that was left out for want of an answer.

    Args:
        plan: indices of the columns.
        correct, cost, answers: as in `OutcomeMatrix` [Q, P]; of checks, whether they said yes, and their
            costs.
    """
    order, need = plan
    if need == BY_CHECK:
        return _simulate_check(order, correct, cost, answers)
    questions = len(correct)
    spent, calls = np.zeros(questions), np.zeros(questions, dtype=np.int64)
    done = np.zeros(questions, dtype=bool)
    most_votes, leader = np.zeros(questions), np.full(questions, order[0])
    for index, pair in enumerate(order):
        called = ~done
        spent[called] += cost[called, pair]
        calls[called] += 1
        votes = np.ones(questions)
        for earlier in order[:index]:
            votes += answers[:, earlier] == answers[:, pair]
        leads = called & (votes >= most_votes)
        leader[leads], most_votes[leads] = pair, votes[leads]
        done |= called & (most_votes >= need)
    return correct[np.arange(questions), leader], spent, calls


def _simulate_check(
    order: tuple[int, ...], correct: Array, cost: Array, answers: Array
) -> tuple[Array, Array, Array]:
    first, check, last = order
    answered = answers[:, first] >= 0
    passed = answered & (correct[:, check] == 1)
    keeps_first = passed | (answered & (answers[:, last] < 0))
    checked = np.where(answered, cost[:, check], 0.0)
    spent = cost[:, first] + checked + np.where(passed, 0.0, cost[:, last])
    return np.where(keeps_first, correct[:, first], correct[:, last]), spent, np.where(passed, 2, 3)


def search(
    correct: Array, cost: Array, answers: Array, clusters: Array, *, top: int = 3
) -> list[IndexedPlan]:
    """Plans that are among the best for some cluster of questions at some cost weight, by beam search.

    Every single pair that is best somewhere is among them.

    Args:
        correct, cost, answers: as in `OutcomeMatrix` [Q, P], without NaN.
        clusters: a cluster number for each question [Q].
        top: plans kept per cluster and cost weight; one more at the end.
    """
    pairs = correct.shape[1]
    candidates = _Candidates(correct, cost, answers, clusters)
    singles: list[IndexedPlan] = [((pair,), 2) for pair in range(pairs)]
    cheap = np.argsort(cost.mean(0), kind="stable")[:CHEAP_PAIRS].tolist()
    kept = set(singles)
    for need, max_length in MAX_LENGTH.items():
        beam: list[IndexedPlan] = [(order, need) for order, _ in singles]
        for length in range(2, min(max_length, pairs) + 1):
            longer = _unique(
                ((*order, pair), need) for order, _ in beam for pair in range(pairs) if pair not in order
            )
            beam = candidates.best(longer, top)
            if length >= need:
                kept |= set(beam)
            if length == 2:
                beam = _unique([*beam, *(((a, b), need) for a in cheap for b in cheap if a != b)])
    return candidates.best(sorted(kept), top + 1)


class _Candidates:
    """Simulated results of plans, each computed once, and the best plans by them."""

    def __init__(self, correct: Array, cost: Array, answers: Array, clusters: Array) -> None:
        self._table = correct, cost, answers
        self._masks = [
            np.ones(len(clusters), dtype=bool),
            *(clusters == each for each in np.unique(clusters)),
        ]
        self._results: dict[IndexedPlan, tuple[Array, Array]] = {}

    def best(self, plans: Sequence[IndexedPlan], count: int) -> list[IndexedPlan]:
        """The `count` best plans by accuracy minus weighted cost, for every cluster and cost weight."""
        correct, spent = self._simulate(plans)
        kept: set[int] = set()
        for mask in self._masks:
            own = mask.sum() / (mask.sum() + PRIOR_QUESTIONS)
            accuracy = own * correct[mask].mean(0) + (1 - own) * correct.mean(0)
            dollars = own * spent[mask].mean(0) + (1 - own) * spent.mean(0)
            for weight in COST_WEIGHTS:
                kept |= set(np.argsort(weight * dollars - accuracy, kind="stable")[:count].tolist())
        return [plans[number] for number in sorted(kept)]

    def _simulate(self, plans: Sequence[IndexedPlan]) -> tuple[Array, Array]:
        """Correct and dollars of each plan on each question [Q, plans]."""
        for plan in plans:
            if plan not in self._results:
                self._results[plan] = simulate(plan, *self._table)[:2]
        correct, spent = zip(*(self._results[plan] for plan in plans), strict=True)
        return np.stack(correct, 1), np.stack(spent, 1)


def _unique(plans: Iterable[IndexedPlan]) -> list[IndexedPlan]:
    return list(dict.fromkeys(plans))
