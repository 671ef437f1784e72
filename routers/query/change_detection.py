"""Notice when a model behind a name no longer behaves as a router expects: e-detectors over its calls.

An e-detector (Shin, Ramdas & Rinaldo 2023, arXiv 2203.03532, section 2: of Shiryaev-Roberts type) is a sum of
bets against "as expected", one begun at each call: M_n = (M_{n-1} + 1) * L_n, where the factors L_n have a
mean of at most 1, given the calls before, while the model is as expected. So E[M_n] <= n, and until M passes
a bound A, on average at least A calls go by: the mean time to a false alarm. The factors are bets of a fixed
part of the stake on an event of a probability of at most m, given the calls before (Waudby-Smith & Ramdas
2024, arXiv 2010.09686, section 4): L = 1 - c + c * seen / m.

So calls may depend on each other, but their order must not follow from their outcomes: they have to come as
they were reserved, not as they were settled, and all that ended by themselves. The next question has to be
none that is known to lie on one side of its expectation: one that was counted lately is left out, but similar
questions, and answers that are judged because they are bad, are not known as such and raise false alarms.

A mean of e-detectors is one, so that several kinds of evidence share one bound. Leaving calls out of the
beginning only lowers M: what is read from a window of newest calls keeps the bound. Leaves out where the
calls are read from (`viaticum.agents.workflow.watched_router`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean, quantiles
from typing import Any

CALLS_TO_FALSE_ALARM = 10_000  # of one model, on average, at the edge of the expected range; at least
STAKES = (0.1, 0.3, 0.6)  # parts of a stake that are bet, each by a detector of its own
MOST_BEYOND_P90 = 0.2  # share of calls beyond their 90% quantile that is still expected
MOST_ON_A_SIDE = 0.65  # and above, or below, their median
MARGIN = 0.1  # by which accuracy may differ from what was expected
RECENT = 200  # calls that are kept to tell what became of them
KEPT_ANSWERS = 2_000  # among which one that is judged again counts once
MOST_SHIFT = 0.25  # of accuracy, by answers alone: who gave feedback on which is not known
LEAST_SINCE = 25  # calls since a change, before it is told: fewer do not say what it is
PRIOR_ANSWERS = 10
FEWEST = 10  # calls that a factor is taken from
STEADY = 1.25  # factors nearer to 1 are left out
MOST_FACTOR = 20.0
DISMISSED = "dismissed"  # kind of a line that takes a change back
KINDS = {
    "longer": "outputs are longer than expected",
    "much longer": "outputs are longer than expected",
    "shorter": "outputs are shorter than expected",
    "dearer": "calls cost more than expected",
    "much dearer": "calls cost more than expected",
    "cheaper": "calls cost less than expected",
    "worse": "answers are right less often than expected",
    "better": "answers are right more often than expected",
    DISMISSED: "taken back",
}


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a router expected of a call: output tokens, and nano-dollars.

    profile: which outcomes of the model it knows (`QueryRouter.profiles`).
    question: its digest, by which equal ones are known; empty where that is not known.
    """

    tokens_p50: int
    tokens_p90: int
    cost_p50: int
    cost_p90: int
    cost_mean: int
    profile: str
    question: str = ""

    @property
    def text(self) -> str:
        """As a tag of a hold."""
        counts = self.tokens_p50, self.tokens_p90, self.cost_p50, self.cost_p90, self.cost_mean
        return " ".join(map(str, (*counts, self.question or "-", self.profile)))

    @classmethod
    def parse(cls, text: str) -> Expectation | None:
        """None for a text of another form."""
        *counts, question, profile = text.split(" ") if " " in text else ("", "")
        if len(counts) != 5 or not all(each.isdecimal() for each in counts):
            return None
        median, high, low_cost, high_cost, mean = map(int, counts)
        return cls(median, high, low_cost, high_cost, mean, profile, "" if question == "-" else question)


@dataclass(frozen=True, slots=True)
class ModelChange:
    """A model left its expected range.

    Attributes:
        profile: of the outcomes that it no longer behaves as.
        at: when that was noticed, ISO 8601.
        kind: the strongest evidence, of `KINDS`.
        calls: known calls and answers until then.
        tokens: real over expected quantiles of output tokens, median and 90%.
        costs: of nano-dollars, median, 90% quantile and mean.
        accuracy: by which answers are right more often than expected; 0 where nobody says.
    """

    model: str
    profile: str
    at: str
    kind: str
    calls: int
    tokens: tuple[float, float] = (1.0, 1.0)
    costs: tuple[float, float, float] = (1.0, 1.0, 1.0)
    accuracy: float = 0.0

    @property
    def why(self) -> str:
        """In words, without the model's name."""
        figures = []
        if self.tokens[0] != 1:
            figures.append(f"{self.tokens[0]:.2g} times the output tokens")
        if self.costs[2] != 1:
            figures.append(f"{self.costs[2]:.2g} times the costs")
        if self.accuracy:
            figures.append(f"{100 * self.accuracy:+.0f} points of accuracy")
        detail = f" ({', '.join(figures)})" if figures else ""
        return f"{KINDS[self.kind]}{detail}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelChange:
        """Raises KeyError, TypeError or ValueError for data of another form."""
        (median, high), costs = map(float, data["tokens"]), map(float, data["costs"])
        low_cost, high_cost, mean = costs
        if data["kind"] not in KINDS:
            raise ValueError(f"unknown kind {data['kind']!r}")
        model, profile, at, kind = (str(data[name]) for name in ("model", "profile", "at", "kind"))
        return cls(
            model,
            profile,
            at,
            kind,
            int(data["calls"]),
            (median, high),
            (low_cost, high_cost, mean),
            float(data["accuracy"]),
        )


class EDetector:
    """Evidence that an event is seen more often than it may be, and since when.

    Beside the sums, products of the same factors that begin anew below 1 (Page's CUSUM): the beginning of the
    largest one estimates when the change was.
    """

    def __init__(self) -> None:
        self._sums, self._products = [0.0] * len(STAKES), [1.0] * len(STAKES)
        self._lengths = [0] * len(STAKES)

    def update(self, seen: bool, most: float) -> None:
        """One more observation. most: the highest expected probability of the event, above 0."""
        gain = 1 / min(1.0, most) if seen else 0.0
        for number, stake in enumerate(STAKES):
            factor = 1 - stake + stake * gain
            self._sums[number] = (self._sums[number] + 1) * factor
            if self._products[number] <= 1:
                self._products[number], self._lengths[number] = 1.0, 0
            self._products[number] *= factor
            self._lengths[number] += 1

    @property
    def evidence(self) -> float:
        return fmean(self._sums)

    @property
    def since(self) -> int:
        """Observations since the change, if there was one."""
        return self._lengths[max(range(len(STAKES)), key=self._products.__getitem__)]


class ModelWatch:
    """The evidence about one model with one profile, and what its newest calls and answers were."""

    def __init__(self) -> None:
        self._detectors = {kind: EDetector() for kind in KINDS if kind != DISMISSED}
        self._calls: deque[tuple[Expectation, int, int | None]] = deque(maxlen=RECENT)
        self._answers: dict[object, tuple[float, bool]] = {}  # the oldest first
        self._is_corrected = False  # whether an answer was judged anew, which its detectors do not know yet
        self.count = 0

    @property
    def evidence(self) -> float:
        """Of a false alarm's bound: at `CALLS_TO_FALSE_ALARM` the model has changed."""
        self._apply_corrections()
        return fmean(each.evidence for each in self._detectors.values())

    @property
    def kind(self) -> str:
        """The strongest evidence."""
        self._apply_corrections()
        return max(self._detectors, key=lambda kind: self._detectors[kind].evidence)

    @property
    def changed(self) -> bool:
        """Whether the evidence is beyond the bound, and enough was seen since to say what became of it."""
        is_beyond = self.evidence >= CALLS_TO_FALSE_ALARM
        return is_beyond and self._detectors[self.kind].since >= LEAST_SINCE

    def add_call(self, expected: Expectation, tokens: int, cost: int | None) -> None:
        """A call that ended by itself. One of a question that was among the newest `RECENT` is left out.

        Args:
            expected: what was expected of it.
            tokens: written.
            cost: nano-dollars; None where it says nothing, as where a part of the prompt was cached.
        """
        if expected.question and any(each.question == expected.question for each, _, _ in self._calls):
            return
        self.count += 1
        self._calls.append((expected, tokens, cost))
        self._compare(("longer", "shorter", "much longer"), tokens, expected.tokens_p50, expected.tokens_p90)
        if cost is not None:
            self._compare(("dearer", "cheaper", "much dearer"), cost, expected.cost_p50, expected.cost_p90)

    def _compare(self, kinds: tuple[str, str, str], amount: int, median: int, high: int) -> None:
        above, below, beyond = (self._detectors[kind] for kind in kinds)
        above.update(amount > median, MOST_ON_A_SIDE)
        below.update(amount < median, MOST_ON_A_SIDE)
        beyond.update(amount > high, MOST_BEYOND_P90)

    def add_answer(self, accuracy: float, correct: bool, answer: str | None = None) -> None:
        """An answer that is known to be right or wrong.

        Args:
            accuracy: as expected.
            correct: whether it is right.
            answer: identifies it; of several judgements of one answer the last counts. None for an answer of
                its own.
        """
        name = object() if answer is None else answer
        before = self._answers.get(name)
        self._answers[name] = accuracy, correct
        if before is not None:
            self._is_corrected |= before != (accuracy, correct)
            return
        self.count += 1
        if len(self._answers) > KEPT_ANSWERS:
            del self._answers[next(iter(self._answers))]
        self._bet_on_answer(accuracy, correct)

    def _apply_corrections(self) -> None:
        """Bet again, from the oldest answer on, where one was judged anew."""
        if not self._is_corrected:
            return
        self._is_corrected = False
        self._detectors |= {"worse": EDetector(), "better": EDetector()}
        for accuracy, correct in self._answers.values():
            self._bet_on_answer(accuracy, correct)

    def _bet_on_answer(self, accuracy: float, correct: bool) -> None:
        self._detectors["worse"].update(not correct, 1 - accuracy + MARGIN)
        self._detectors["better"].update(correct, accuracy + MARGIN)

    def change(self, model: str, profile: str, at: str) -> ModelChange:
        """What became of the model, by its calls, or answers, since it changed."""
        since, accuracy = self._detectors[self.kind].since, 0.0
        is_about_answers = self.kind in ("worse", "better")
        calls = [] if is_about_answers else list(self._calls)[-since:]
        lengths = [(tokens, each.tokens_p50, each.tokens_p90) for each, tokens, _ in calls]
        costs = [(cost, each.cost_p50, each.cost_p90) for each, _, cost in calls if cost is not None]
        paid = [(cost, each.cost_mean) for each, _, cost in calls if cost is not None]
        mean = _steady(sum(cost for cost, _ in paid), sum(mean for _, mean in paid), len(paid))
        if is_about_answers:
            known = [correct - expected for expected, correct in self._answers.values()][-since:]
            accuracy = sum(known) / (len(known) + PRIOR_ANSWERS)
            accuracy = min(MOST_SHIFT, max(-MOST_SHIFT, accuracy))
        return ModelChange(
            model, profile, at, self.kind, self.count, _factors(lengths), (*_factors(costs), mean), accuracy
        )


def _factors(amounts: list[tuple[int, int, int]]) -> tuple[float, float]:
    """Real over expected median and 90% quantile: the same quantiles of the ratios of calls.

    amounts: real, expected median and expected 90% quantile of each call.
    """
    if len(amounts) < FEWEST:
        return 1.0, 1.0
    of_median = [real / max(1, median) for real, median, _ in amounts]
    of_high = [real / max(1, high) for real, _, high in amounts]
    middle, top = quantiles(of_median, n=2)[0], quantiles(of_high, n=10)[-1]
    return _steady(middle, 1.0, len(amounts)), _steady(top, 1.0, len(amounts))


def _steady(real: float, expected: float, calls: int) -> float:
    """Their ratio, within bounds; 1 where it is near 1, or follows from few calls."""
    if calls < FEWEST or expected <= 0 or real <= 0:
        return 1.0
    ratio = min(MOST_FACTOR, max(1 / MOST_FACTOR, real / expected))
    return ratio if abs(math.log(ratio)) > math.log(STEADY) else 1.0
