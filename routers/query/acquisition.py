"""Which outcomes to buy next, for a limited amount of money: few answers, well chosen.

Successive rounds, each about as dear as all before it together (successive halving, Karnin et al. 2013, and
its use for models with a price, arXiv 2306.11585):

1. every pair on a small sample of questions that is spread over all of them (`spread_out`);
2. pairs that another one, which costs no more, beats beyond doubt are dropped (`find_hopeless`);
3. further questions where the choice among the remaining pairs is open: those whose outcomes lower the
   expected regret of the choices on all questions most for the money (`next_round`), not those whose outcomes
   are hardest to predict.

Pure functions of what is known: asking the pairs, money and journals are the caller's.

Shapes: Q questions, P pairs, D embedding size, W cost weights, S draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from viaticum.errors import InputError
from viaticum.routers.query.outcome_matrix import Array

SIMILARITY_SCALE = 10.0  # an outcome counts at another question as exp(SIMILARITY_SCALE * (cosine - 1))
PRIOR = 2.0  # outcomes that the mean of a pair counts as
PRICE_PRIOR = 3.0  # answers that the expected price of a pair counts as
MAX_REFERENCES = 1_500  # questions on which regret is estimated
MAX_CANDIDATES = 600  # questions that are considered in a round


class Cell(NamedTuple):
    """One outcome to buy: indices of question and pair, and its expected cost in dollars."""

    question: int
    pair: int
    dollars: float


@dataclass(frozen=True)
class AcquisitionSettings:
    """How outcomes are chosen.

    Args:
        first_share: share of all money for the first round.
        first_questions: questions of the first round at least, where the money suffices.
        growth: money of a later round as a multiple of what was spent before it.
        doubt: standard errors by which a pair has to be worse to be dropped.
        contention: probability of being the best choice from which a pair is asked a question.
        weights: values of a right answer, in mean costs of the most expensive remaining pair, for which the
            choice is made.
        draws: samples of the accuracies from which regret is estimated.
        seed: of every draw.
    """

    first_share: float = 0.25
    first_questions: int = 30
    growth: float = 1.0
    doubt: float = 2.5
    contention: float = 0.05
    weights: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    draws: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.first_share <= 1 and self.growth > 0 and self.first_questions >= 1):
            raise InputError(
                "first_share is above 0 and at most 1, growth above 0 and first_questions 1 or more, got "
                f"{self.first_share}, {self.growth} and {self.first_questions}"
            )


@dataclass(frozen=True)
class KnownOutcomes:
    """What is known so far.

    Args:
        embeddings: of the questions, of length 1 [Q, D].
        correct: 0 or 1; NaN where a pair was not asked, or its answer could not be graded [Q, P].
        cost: dollars; NaN where unknown [Q, P].
        prices: expected dollars of an answer of each pair, before any is known [P].
    """

    embeddings: Array
    correct: Array
    cost: Array
    prices: Array

    def __post_init__(self) -> None:
        shape = len(self.embeddings), len(self.prices)
        if self.correct.shape != shape or self.cost.shape != shape:
            raise InputError(
                f"outcomes of {len(self.embeddings)} questions and {len(self.prices)} pairs have the shape "
                f"{shape}, got {self.correct.shape} and {self.cost.shape}"
            )

    @property
    def asked(self) -> Array:
        return np.asarray(~np.isnan(self.correct))

    @property
    def open(self) -> Array:
        """Where a pair was not asked. An answer whose cost alone is known has no verdict; it is not open."""
        return np.asarray(np.isnan(self.correct) & np.isnan(self.cost))

    @property
    def spent(self) -> float:
        return float(np.nansum(self.cost))

    def expected_prices(self) -> Array:
        """Dollars of a further answer of each pair [P]: the mean so far, and the price before any."""
        counts = (~np.isnan(self.cost)).sum(0)
        return np.asarray((np.nansum(self.cost, 0) + PRICE_PRIOR * self.prices) / (counts + PRICE_PRIOR))


@dataclass(frozen=True)
class Hopeless:
    """Why a pair was dropped: `by` costs no more and is right on more questions, `low` to `high` more."""

    pair: int
    by: int
    questions: int
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Round:
    """The cells to buy next, in the order in which to buy them, and the pairs that are not asked any more."""

    cells: tuple[Cell, ...]
    dropped: tuple[Hopeless, ...]

    @property
    def dollars(self) -> float:
        return sum(cell.dollars for cell in self.cells)


def next_round(
    known: KnownOutcomes,
    left: float,
    settings: AcquisitionSettings = AcquisitionSettings(),
    pairs: Sequence[int] | None = None,
) -> Round:
    """The outcomes to buy next; none where the money or the questions are used up.

    Costs are expected: buy the cells in order, and stop where the money ends.

    Args:
        known: what is known so far, pairs that were dropped before included.
        left: dollars that are left for this round and all later ones.
        settings: how outcomes are chosen.
        pairs: those that may be asked, the most promising first; by default all.
    """
    prices = known.expected_prices()
    pairs = range(len(prices)) if pairs is None else pairs
    if not known.asked.any():
        return Round(_first_cells(known, prices, left, settings, pairs), ())
    dropped = find_hopeless(known, settings)
    remaining = np.setdiff1d(np.asarray(pairs, dtype=int), [each.pair for each in dropped])
    spent = max(known.spent, settings.first_share * (known.spent + left))
    money = min(left, settings.growth * spent)
    if left - money < 0.25 * money:
        money = left  # no last round that is too small to learn from
    return Round(_open_cells(known, prices, remaining, money, settings), tuple(dropped))


def spread_out(embeddings: Array, count: int, seed: int = 0) -> list[int]:
    """Indices of `count` questions that are spread over all: the seeding of k-means++ (Arthur 2007).

    Each is drawn with a probability that grows with the squared distance to the nearest one before it, so
    that a part of the list is spread out too.
    """
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(embeddings)))]
    distance = np.full(len(embeddings), np.inf)
    while len(chosen) < min(count, len(embeddings)):
        to_last = 2 - 2 * embeddings @ embeddings[chosen[-1]]
        distance = np.minimum(distance, np.maximum(to_last, 0.0))
        distance[chosen] = 0.0
        total = float(distance.sum())
        if total <= 1e-9:  # only texts that are equal to chosen ones are left
            rest = np.setdiff1d(np.arange(len(embeddings)), chosen)
            chosen += rng.permutation(rest)[: min(count, len(embeddings)) - len(chosen)].tolist()
            break
        chosen.append(int(rng.choice(len(embeddings), p=distance / total)))
    return chosen


def find_hopeless(
    known: KnownOutcomes,
    settings: AcquisitionSettings = AcquisitionSettings(),
) -> list[Hopeless]:
    """Pairs that another one beats beyond doubt: no dearer, and right more often on the questions of both.

    The difference is paired by question; its interval has `doubt` standard errors each way, with two
    questions of no difference and one each way added, so that a handful of questions drops nothing. A pair
    that beats the other one on some kind of question (`_wins_somewhere`) stays.
    """
    prices, asked = known.expected_prices(), known.asked
    if not asked.any():
        return []
    kinds = _kinds(known, settings)
    found = []
    for pair in range(len(prices)):
        best: Hopeless | None = None
        for other in np.flatnonzero(prices <= prices[pair]):
            both = asked[:, pair] & asked[:, other]
            if other == pair or not both.any():
                continue
            difference = known.correct[both, other] - known.correct[both, pair]
            middle, low, high = _interval(difference, settings.doubt)
            if low <= 0 or (best is not None and low <= best.low):
                continue
            if not _wins_somewhere(difference, kinds[both]):
                best = Hopeless(pair, int(other), int(both.sum()), middle, low, high)
        if best is not None:
            found.append(best)
    return found


def _interval(difference: Array, doubt: float) -> tuple[float, float, float]:
    """Mean of paired differences (-1, 0, 1) and its interval; four made-up questions are added."""
    padded = np.append(difference, (0.0, 0.0, 1.0, -1.0))
    half = doubt * float(padded.std()) / len(padded) ** 0.5
    middle = float(padded.mean())
    return middle, middle - half, middle + half


def _wins_somewhere(difference: Array, kinds: Array) -> bool:
    """Whether the other pair (negative differences) is right more often on some kind of question."""
    for kind in np.unique(kinds):
        own = difference[kinds == kind]
        wins, losses = int((own < 0).sum()), int((own > 0).sum())
        if wins - losses > 1.3 * (wins + losses) ** 0.5:  # a sign test, one in ten by chance
            return True
    return False


def _kinds(known: KnownOutcomes, settings: AcquisitionSettings) -> Array:
    """A kind for each question [Q]: the nearest of a few that are spread out among the asked ones."""
    asked = np.flatnonzero(known.asked.any(1))
    count = int(np.clip(len(asked) // 12, 1, 8))
    centres = known.embeddings[asked[spread_out(known.embeddings[asked], count, settings.seed)]]
    return np.asarray((known.embeddings @ centres.T).argmax(1))


def _first_cells(
    known: KnownOutcomes, prices: Array, left: float, settings: AcquisitionSettings, pairs: Sequence[int]
) -> tuple[Cell, ...]:
    """All pairs on a sample that is spread out; each question is asked of the first pair first."""
    row = float(prices[list(pairs)].sum())
    affordable = left / row if row > 0 else len(known.embeddings)
    wanted = max(settings.first_share * affordable, min(settings.first_questions, 0.5 * affordable))
    count = int(min(max(1, wanted), len(known.embeddings)))
    if affordable < 1:
        return ()
    chosen = spread_out(known.embeddings, count, settings.seed)
    return tuple(Cell(question, pair, float(prices[pair])) for question in chosen for pair in pairs)


def _open_cells(
    known: KnownOutcomes, prices: Array, remaining: Array, money: float, settings: AcquisitionSettings
) -> tuple[Cell, ...]:
    """Greedily the questions whose outcomes lower the expected regret most for their price.

    An outcome at question q counts as k(q, j) outcomes at question j; regret there falls with the root of the
    outcomes that count. That gain is submodular, so that a greedy choice is near the best one (Nemhauser
    1978).
    """
    rng = np.random.default_rng(settings.seed + int(known.asked.sum()))
    some = known.open[:, remaining].any(1)
    candidates = _sample(np.flatnonzero(some), MAX_CANDIDATES, rng)
    if len(candidates) == 0 or money <= 0:
        return ()
    references = _sample(np.arange(len(known.embeddings)), MAX_REFERENCES, rng)
    regret, _, counts = _choices(known, prices, remaining, references, settings, rng)
    _, best_there, _ = _choices(known, prices, remaining, candidates, settings, rng)
    unknown = known.open[np.ix_(candidates, remaining)]
    wanted = unknown & (best_there >= settings.contention)
    costs = wanted @ prices[remaining]
    kernel = _kernel(known.embeddings[candidates], known.embeddings[references])  # [C, R]
    weight = regret * np.sqrt(counts)
    open_still = wanted.any(1)
    cells: list[Cell] = []
    while open_still.any():
        gain = (weight * (1 / np.sqrt(counts) - 1 / np.sqrt(counts + kernel))).sum(1)
        score = np.where(open_still & (costs <= money), gain / np.maximum(costs, 1e-12), -1.0)
        chosen = int(score.argmax())
        if score[chosen] < 0:
            break
        cells += [
            Cell(int(candidates[chosen]), int(remaining[pair]), float(prices[remaining[pair]]))
            for pair in np.flatnonzero(wanted[chosen])
        ]
        money -= float(costs[chosen])
        counts = counts + kernel[chosen]
        open_still[chosen] = False
    return tuple(cells)


def _choices(
    known: KnownOutcomes,
    prices: Array,
    remaining: Array,
    questions: Array,
    settings: AcquisitionSettings,
    rng: np.random.Generator,
) -> tuple[Array, Array, Array]:
    """Expected regret of the choice [n], probability that a pair is the best one [n, R], outcomes [n].

    By draws from the accuracies' posterior: for a value of a dollar the best choice on average is compared
    with the best one of each draw.
    """
    mean, count = _local_accuracy(known, remaining, questions)
    deviation = np.sqrt(mean * (1 - mean) / (count + 1))
    dollars = prices[remaining]
    regret = np.zeros(len(questions))
    best = np.zeros(mean.shape)
    for weight in settings.weights:
        price = weight * dollars / max(float(dollars.max()), 1e-12)
        utility = mean - price
        taken = utility.argmax(1)
        rows = np.arange(len(questions))
        for _ in range(settings.draws):
            drawn = utility + deviation * rng.standard_normal(mean.shape)
            winner = drawn.argmax(1)
            regret += drawn[rows, winner] - drawn[rows, taken]
            best[rows, winner] += 1
    total = settings.draws * len(settings.weights)
    return regret / total, best / total, count.mean(1)


def _local_accuracy(known: KnownOutcomes, remaining: Array, questions: Array) -> tuple[Array, Array]:
    """Accuracy of the remaining pairs near some questions [n, R], and how many outcomes that rests on."""
    correct = known.correct[:, remaining]
    asked = ~np.isnan(correct)
    rows = asked.any(1)
    kernel = _kernel(known.embeddings[questions], known.embeddings[rows])
    values, counted = np.nan_to_num(correct[rows]), asked[rows].astype(float)
    overall = (values.sum(0) + 1) / (counted.sum(0) + 2)
    count = kernel @ counted + PRIOR
    return (kernel @ values + PRIOR * overall) / count, count


def _kernel(first: Array, second: Array) -> Array:
    return np.asarray(np.exp(SIMILARITY_SCALE * (first @ second.T - 1)))


def _sample(numbers: Array, most: int, rng: np.random.Generator) -> Array:
    return numbers if len(numbers) <= most else np.sort(rng.choice(numbers, most, replace=False))


@dataclass(frozen=True)
class Acquired:
    """What was bought: the outcomes, the pairs that were dropped, and how many cells each round had."""

    known: KnownOutcomes
    dropped: tuple[Hopeless, ...]
    rounds: tuple[int, ...]


def acquire(
    embeddings: Array,
    prices: Array,
    money: float,
    ask: Callable[[Cell, float], tuple[float, float] | None],
    settings: AcquisitionSettings = AcquisitionSettings(),
) -> Acquired:
    """Buy outcomes in rounds until the money or the questions are used up.

    Args:
        embeddings: of the questions, of length 1 [Q, D].
        prices: expected dollars of an answer of each pair [P].
        money: dollars.
        ask: gets a cell and the dollars that are left; returns whether the answer is right, and its dollars,
            or None where they cannot pay for it.
        settings: how outcomes are chosen.
    """
    empty = np.full((len(embeddings), len(prices)), np.nan)
    known = KnownOutcomes(embeddings, empty, empty.copy(), prices)
    rounds: list[int] = []
    left, ended = money, False
    while not ended:
        bought = 0
        for cell in next_round(known, left, settings).cells:
            answer = ask(cell, left)
            if answer is None:
                ended = True
                break
            known.correct[cell[:2]], known.cost[cell[:2]] = answer
            left -= answer[1]
            bought += 1
        rounds += [bought] * bool(bought)
        ended |= not bought
    return Acquired(known, tuple(find_hopeless(known, settings)), tuple(rounds))
