"""What to expect of models that no outcome table knows, before anything was measured.

A model is placed by the public figures of its catalogue entry (`viaticum.routers.query.ability`); without
figures it is as good as the models in the tables are on average, whatever it costs, so that a price is never
taken for quality. Strategies gain and write what they do on average in the tables. Rows say in `origin` that
they are a prior, have wide intervals, and yield to outcomes of the models' own (`with_outcomes`).
`prior.json` holds the numbers; no question and no answer is in it. Leaves out which models are asked about
(`viaticum.routers.query.covering`).
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from viaticum.errors import DataError, InputError
from viaticum.money import Price
from viaticum.routers.query.ability import AbilityScale, Benchmark, Estimates, Normal, estimate
from viaticum.routers.query.question_view import BENCHMARK, QuestionView
from viaticum.types import Outcome, Pair, Query, Row

ORIGIN = "prior only: no outcomes for this model"
UPDATED = "prior and {count} outcome{s} of this model"
USUAL = "cot"  # the strategy that the others are compared with
SHORTEST = 64  # tokens of a question; longer ones count as the next power of two, so that rows are shared
LENGTH_OUTCOMES = 5  # outcomes as which the prior counts for the length of answers
# A thinking model writes so many times the tokens of a plain one (arXiv 2505.19435: 2745 to 372).
THINKING = 2745 / 372
CACHE_SIZE = 256  # combinations of models, strategies and lengths of questions whose rows are kept


@dataclass(frozen=True)
class PriorModel:
    """What is known of a model before any outcome.

    Attributes:
        price: of its tokens, of a pair that of its large model; a model without one gets no row.
        description: of its catalogue entry.
        benchmarks: shares of right answers by the name of a public benchmark.
        thinks: it thinks before it answers where nobody asks it to.
    """

    name: str
    price: Price | None
    description: str = ""
    benchmarks: Mapping[str, float] = field(default_factory=dict, hash=False)
    thinks: bool = False


class Prior(ABC):
    """Estimates for models without outcomes."""

    @abstractmethod
    def rows(self, query: Query, models: Sequence[PriorModel], strategies: Sequence[str]) -> Sequence[Row]:
        """A row for every priced model with every strategy, whose `origin` says that it is a prior.

        What has no price would look free, and be chosen for it. The same sequence for the same models,
        strategies and estimates, so that batches stay fast.
        """


@dataclass(frozen=True)
class Lengths:
    """Tokens of a strategy: median, 90% quantile and mean of its output, and what its prompt adds."""

    p50: float
    p90: float
    mean: float
    prompt: int

    def times(self, factor: float) -> Lengths:
        return replace(self, p50=self.p50 * factor, p90=self.p90 * factor, mean=self.mean * factor)


@dataclass(frozen=True)
class PriorWeights:
    """The content of `prior.json`: abilities, tokens by strategy, and characters a token of questions."""

    scale: AbilityScale
    lengths: Mapping[str, Lengths]
    characters_a_token: float

    @classmethod
    def load(cls, path: str | Path | None = None) -> PriorWeights:
        """Read the weights in the package, or those of a file.

        Raises:
            InputError: the file cannot be read.
            DataError: it has another form.
        """
        origin = "prior.json" if path is None else str(path)
        source = resources.files("viaticum.routers.query") / "prior.json" if path is None else Path(path)
        try:
            document: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
            scale = AbilityScale(
                Normal(**document["abilities"]),
                {name: Benchmark(*values) for name, values in document["benchmarks"].items()},
                Normal(**document["kind"]),
                document["slope"],
                {name: Normal(*values) for name, values in document["gains"].items()},
                document["rest"],
                document["pair_rest"],
            )
            lengths = {name: Lengths(**values) for name, values in document["lengths"].items()}
            return cls(scale, lengths, document["characters_a_token"])
        except OSError as error:
            raise InputError(f"cannot read the prior {origin}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{origin} is not a prior ({error!r}); make it again") from None

    def document(self) -> dict[str, Any]:
        """The numbers as JSON values, rounded."""
        scale = self.scale
        return {
            "abilities": _rounded(vars(scale.abilities)),
            "kind": _rounded(vars(scale.kind)),
            "slope": round(scale.slope, 3),
            "rest": round(scale.rest, 3),
            "pair_rest": round(scale.pair_rest, 3),
            "gains": {name: [*_rounded(vars(each)).values()] for name, each in scale.gains.items()},
            "benchmarks": {name: [*_rounded(vars(each)).values()] for name, each in scale.benchmarks.items()},
            "lengths": {name: _rounded(vars(each)) for name, each in self.lengths.items()},
            "characters_a_token": round(self.characters_a_token, 2),
        }


class AbilityPrior(Prior):
    """Places models by their figures, and by outcomes of their own where there are any.

    Args:
        weights: what was learned from tables; by default that of the package.
        outcomes: of the models asked about, on questions such as those to come.
        view: says of single questions how easy they are; not asked once there are outcomes, which say of what
            kind the questions are.
    """

    def __init__(
        self,
        weights: PriorWeights | None = None,
        outcomes: Iterable[Outcome] = (),
        view: QuestionView | None = None,
    ) -> None:
        self.weights = PriorWeights.load() if weights is None else weights
        self.view = view
        counts: dict[Pair, list[int]] = defaultdict(lambda: [0, 0])
        logs: dict[Pair, list[float]] = defaultdict(list)
        for outcome in outcomes:
            counts[outcome.pair][0] += outcome.correct
            counts[outcome.pair][1] += 1
            if outcome.output_tokens is not None:
                logs[outcome.pair].append(math.log1p(outcome.output_tokens))
        self._counts = {pair: (right, asked) for pair, (right, asked) in counts.items()}
        self._asked: dict[str, int] = defaultdict(int)
        for pair, (_, asked) in self._counts.items():
            self._asked[pair.model] += asked
        self._logs = {pair: (len(values), math.fsum(values)) for pair, values in logs.items()}
        self._rows: dict[Any, tuple[Row, ...]] = {}

    def with_outcomes(self, outcomes: Iterable[Outcome]) -> Self:
        """A prior of the same weights that knows these outcomes, in place of those known before."""
        return type(self)(self.weights, outcomes, self.view)

    def rows(self, query: Query, models: Sequence[PriorModel], strategies: Sequence[str]) -> Sequence[Row]:
        characters = len(query.text) + sum(len(message["content"]) for message in query.messages)
        tokens = max(SHORTEST, 1 << int(characters / self.weights.characters_a_token).bit_length())
        key = (tokens, tuple(models), tuple(strategies))
        rows = self._rows.get(key)
        if rows is None:
            if len(self._rows) >= CACHE_SIZE:
                self._rows.clear()
            # Another thread may have made them meanwhile: all take the same ones.
            rows = self._rows.setdefault(key, self._make_rows(*key))
        shift = None if self.view is None or self._counts else self.view.shift(query.text)
        return rows if shift is None else self._viewed(rows, models, shift)

    def _viewed(self, rows: Sequence[Row], models: Sequence[PriorModel], shift: float) -> tuple[Row, ...]:
        """The rows of a question of the learned kind that is easier by `shift`, beside their averages."""
        kind = self.weights.scale.benchmarks[BENCHMARK]
        found = self.estimates([row.pair for row in rows], models, kind)
        found = Estimates(found.mean + shift, found.covariance)
        columns = zip(rows, found.accuracy.tolist(), *(end.tolist() for end in found.interval), strict=True)
        return tuple(
            replace(row, accuracy=accuracy, accuracy_low=low, accuracy_high=high, average=row.accuracy)
            for row, accuracy, low, high in columns
        )

    def estimates(
        self,
        pairs: Sequence[Pair],
        models: Sequence[PriorModel],
        kind: Benchmark | None = None,
        supposed: Mapping[Pair, bool] = MappingProxyType({}),
    ) -> Estimates:
        """Log-odds of right answers of the pairs to a kind of questions, by default an unknown one.

        supposed: one more outcome of some pairs, right or wrong.
        """
        known = {model.name: self.weights.scale.ability(model.benchmarks) for model in models}
        counts = self._counts | {
            pair: (right + is_right, asked + 1)
            for pair, is_right in supposed.items()
            for right, asked in [self._counts.get(pair, (0, 0))]
        }
        others = [pair for pair in counts if pair not in pairs]
        everyone = [*pairs, *others]
        abilities = {pair.model: self.weights.scale.ability({}) for pair in everyone} | known
        found = estimate(self.weights.scale, abilities, everyone, counts, kind)
        count = len(pairs)
        return Estimates(found.mean[:count], found.covariance[:count, :count])

    def _make_rows(
        self, question: int, models: tuple[PriorModel, ...], strategies: tuple[str, ...]
    ) -> tuple[Row, ...]:
        priced = [model for model in models if model.price is not None]
        by_pair = {Pair(model.name, strategy): model for model in priced for strategy in strategies}
        if not by_pair:
            return ()
        found = self.estimates([*by_pair], models)
        columns = zip(found.accuracy.tolist(), *(end.tolist() for end in found.interval), strict=True)
        return tuple(
            self._row(pair, model, question, *shares)
            for (pair, model), shares in zip(by_pair.items(), columns, strict=True)
        )

    def _row(
        self, pair: Pair, model: PriorModel, question: int, accuracy: float, low: float, high: float
    ) -> Row:
        lengths = self._lengths(pair, model)
        assert model.price is not None
        price = model.price
        prompt = (question + lengths.prompt) * _samples(pair.strategy)[0]
        asked = self._asked.get(pair.model, 0)
        return Row(
            pair,
            accuracy,
            round(lengths.p50),
            round(lengths.p90),
            price.cost(prompt, round(lengths.p50)),
            price.cost(prompt, round(lengths.p90)),
            price.cost(prompt, round(lengths.mean)),
            accuracy_low=low,
            accuracy_high=high,
            origin=UPDATED.format(count=asked, s="s" * (asked != 1)) if asked else ORIGIN,
        )

    def _lengths(self, pair: Pair, model: PriorModel) -> Lengths:
        """Tokens of a pair, of all its samples; a strategy that the tables lack counts as the usual one."""
        samples, strategy = _samples(pair.strategy)
        known = self.weights.lengths
        lengths = known.get(strategy, known[USUAL])
        if model.thinks or strategy.partition(":")[0] == "think":
            lengths = lengths.times(THINKING)
        lengths = lengths.times(samples)
        count, total = self._logs.get(pair, (0, 0.0))
        more = total - count * math.log1p(lengths.p50)
        return lengths.times(math.exp(more / (count + LENGTH_OUTCOMES)))


def _samples(strategy: str) -> tuple[int, str]:
    """The most samples of a strategy, and the strategy of each: 5 and cot of self-consistency:cot:5."""
    kind, _, rest = strategy.partition(":")
    each, _, count = rest.rpartition(":")
    return (int(count), each) if kind == "self-consistency" and each and count.isdigit() else (1, strategy)


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) for name, value in values.items()}


@cache
def default_prior() -> AbilityPrior:
    """The prior of routers that name none: that of the package."""
    return AbilityPrior(view=QuestionView())
