"""How often models are right before they were asked: abilities placed by figures, updated by outcomes.

Item response theory with kinds of questions in place of items (Rasch 1960; for routing arXiv 2506.01048): the
log-odds that a model answers a kind of questions rightly with a strategy are

    offset(kind) + slope(kind) * ability(model) + gain(strategy) + rest

A benchmark is a kind whose offset and slope are known, so that figures place the ability; the kind that users
ask about is unknown, and its offset is what makes intervals wide. Everything is Gaussian on the log-odds, and
right and wrong answers of the models' own update all of it together (Laplace's approximation). The numbers
come from `prior.json`, which `benchmarks/prior.py --fit` makes. Leaves out tokens and costs
(`viaticum.routers.query.prior`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from viaticum.types import Pair

Array = np.ndarray[Any, Any]
LOWEST, HIGHEST = 0.01, 0.99  # figures beyond say no more than these
INTERVAL = 1.645  # standard deviations on either side of 90% of a Gaussian
PROBIT = math.pi / 8  # of the approximation of a logistic average over a Gaussian (MacKay 1992)
NEWTON_STEPS = 100
LONGEST_STEP = 1.0  # of log-odds: longer ones overshoot where the counts surprise
SPELLINGS = {
    "arc-c": "arc-challenge",
    "big-bench-hard": "bbh",
    "gpqa-diamond": "gpqa",
    "gsm-8k": "gsm8k",
    "math-500": "math",
    "mmlupro": "mmlu-pro",
    "swe-bench": "swe-bench-verified",
    "swe-verified": "swe-bench-verified",
}


@dataclass(frozen=True)
class Normal:
    """A mean and a standard deviation, in log-odds."""

    mean: float
    sd: float


@dataclass(frozen=True)
class Benchmark:
    """A kind of questions whose log-odds are offset + slope * ability, give or take `sd`."""

    offset: float
    slope: float
    sd: float


@dataclass(frozen=True)
class AbilityScale:
    """What was learned of models, kinds of questions and strategies.

    A strategy that is not among `gains` has a mean of 0 and the widest of their deviations.

    Args:
        abilities: of the models in the tables; what is expected of a model without figures.
        benchmarks: by name.
        kind: the offset of a kind of questions of which nothing is known.
        slope: the mean slope of kinds.
        gains: of strategies over `cot`, by name.
        rest: what remains between a model and a kind.
        pair_rest: what remains between a model, a kind and a strategy other than `cot`.
    """

    abilities: Normal
    benchmarks: Mapping[str, Benchmark]
    kind: Normal
    slope: float
    gains: Mapping[str, Normal]
    rest: float
    pair_rest: float

    def known(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The figures whose benchmark is known, by its name here."""
        spelled = {SPELLINGS.get(name, name): share for name, share in figures.items()}
        return {name: share for name, share in spelled.items() if name in self.benchmarks}

    def ability(self, figures: Mapping[str, float]) -> Normal:
        """The ability that the figures place a model at: each counts by how well it says abilities."""
        precision = self.abilities.sd**-2
        total = precision * self.abilities.mean
        for name, share in self.known(figures).items():
            benchmark = self.benchmarks[name]
            weight = benchmark.slope / benchmark.sd**2
            precision += weight * benchmark.slope
            total += weight * (log_odds(share) - benchmark.offset)
        return Normal(total / precision, precision**-0.5)

    def gain(self, strategy: str) -> Normal:
        widest = max((each.sd for each in self.gains.values()), default=1.0)
        return self.gains.get(strategy, Normal(0.0, widest))


def log_odds(share: float) -> float:
    clipped = min(HIGHEST, max(LOWEST, share))
    return math.log(clipped / (1 - clipped))


def logistic(values: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-values)))


@dataclass(frozen=True)
class Estimates:
    """Log-odds of P pairs: means [P] and covariance [P, P]."""

    mean: Array
    covariance: Array

    @property
    def variance(self) -> Array:
        return np.asarray(np.diag(self.covariance).clip(1e-9))

    @property
    def accuracy(self) -> Array:
        """Expected accuracies: means of the logistic function over the Gaussians [P]."""
        return logistic(self.mean / np.sqrt(1 + PROBIT * self.variance))

    @property
    def interval(self) -> tuple[Array, Array]:
        """90% intervals of the accuracies, lower and upper ends [P]."""
        reach = INTERVAL * np.sqrt(self.variance)
        return logistic(self.mean - reach), logistic(self.mean + reach)


def estimate(
    scale: AbilityScale,
    abilities: Mapping[str, Normal],
    pairs: Sequence[Pair],
    counts: Mapping[Pair, tuple[int, int]] | None = None,
    kind: Benchmark | None = None,
) -> Estimates:
    """Log-odds of right answers of pairs to one kind of questions.

    Args:
        abilities: of every model of the pairs.
        pairs: asked about, and those with counts [P].
        counts: right answers and answers of pairs to questions of this kind.
        kind: the questions' kind where it is known; by default it is one of which nothing is known.
    """
    offset = scale.kind if kind is None else Normal(kind.offset, 0.0)
    slope, rest = (scale.slope, scale.rest) if kind is None else (kind.slope, kind.sd)
    models = [abilities[pair.model] for pair in pairs]
    gains = [scale.gain(pair.strategy) for pair in pairs]
    mean = np.array(
        [offset.mean + slope * model.mean + gain.mean for model, gain in zip(models, gains, strict=True)]
    )
    same_model = np.equal.outer(*[np.array([pair.model for pair in pairs])] * 2)
    same_strategy = np.equal.outer(*[np.array([pair.strategy for pair in pairs])] * 2)
    deviation = slope * np.array([model.sd for model in models])
    gain_deviation = np.array([gain.sd for gain in gains])
    covariance = (
        offset.sd**2
        + same_model * (np.outer(deviation, deviation) + rest**2)
        + same_strategy * np.outer(gain_deviation, gain_deviation)
        + np.diag(np.where(gain_deviation > 0, scale.pair_rest**2, 0.0))
    )
    right = np.array([(counts or {}).get(pair, (0, 0))[0] for pair in pairs], dtype=np.float64)
    asked = np.array([(counts or {}).get(pair, (0, 0))[1] for pair in pairs], dtype=np.float64)
    if not asked.any():
        return Estimates(mean, covariance)
    return _update(mean, covariance, right, asked)


def _update(mean: Array, covariance: Array, right: Array, asked: Array) -> Estimates:
    """The posterior of log-odds after binomial counts (Rasmussen and Williams 2006, algorithm 3.1)."""
    size = len(mean)
    now = mean.copy()
    for _ in range(NEWTON_STEPS):
        share = logistic(now)
        weight = asked * share * (1 - share)
        target = weight * (now - mean) + right - asked * share
        root = np.sqrt(weight)
        inner = np.eye(size) + root[:, None] * covariance * root
        solved = target - root * np.linalg.solve(inner, root * (covariance @ target))
        step = mean + covariance @ solved - now
        longest = np.abs(step).max()
        now = now + step * min(1.0, LONGEST_STEP / max(longest, 1e-12))
        if longest < 1e-6:
            break
    share = logistic(now)
    root = np.sqrt(asked * share * (1 - share))
    inner = np.eye(size) + root[:, None] * covariance * root
    reduced = covariance - (covariance * root) @ np.linalg.solve(inner, root[:, None] * covariance)
    return Estimates(now, reduced)
