"""Call times of a running decoder, as a correction of measured ones.

A measurement is made on an idle machine, with short texts; a decoder sees other loads and longer texts. The
ratio of seen to expected seconds is averaged for each model and number of rows, and where nothing was seen
the model's average, then the pair's, stands in. Leaves out which mode follows (`decoders.auto_mode`).
"""

from __future__ import annotations

import math
from dataclasses import replace

from viaticum.decoders.call_times import CallTimes
from viaticum.decoders.cost import CostModel

LONGEST = 32  # new tokens a row; longer calls are prefills
WINDOW = 50  # calls that an average looks back over
TRUST = 10  # calls after which what was seen counts as much as the average that stands in
BOUND = math.log(8)  # of one call's ratio: what waits for a compiler or the disk is no call time


class _Average:
    """A running mean of logarithms of ratios."""

    def __init__(self) -> None:
        self.count, self.mean = 0, 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.mean += (value - self.mean) / min(self.count, WINDOW)

    def blended(self, fallback: float) -> float:
        return fallback + (self.mean - fallback) * self.count / (self.count + TRUST)


class ObservedTimes:
    """Ratios of seen to expected call times of a pair: models 0 (small) and 1 (large)."""

    def __init__(self, expected: CostModel) -> None:
        self._expected = expected
        self._pair = _Average()
        self._models = (_Average(), _Average())
        self._rows: dict[tuple[int, int], _Average] = {}

    def add(self, model: int, rows: int, tokens: int, seconds: float) -> None:
        """Record a call. tokens: new ones of all rows together."""
        if not 0 < tokens <= LONGEST * rows or seconds <= 0:
            return
        expected = self._times(model)(rows, tokens / rows)
        if expected <= 0:
            return
        ratio = min(max(math.log(seconds / expected), -BOUND), BOUND)
        for average in (self._pair, self._models[model], self._average(model, rows)):
            average.add(ratio)

    def corrected(self, step: float = 0.1) -> CostModel:
        """The expected times, multiplied by the ratios.

        step: logarithms of ratios are rounded to its multiples.
        """
        small, large = (self._corrected(model, step) for model in (0, 1))
        return replace(self._expected, small=small, large=large)

    def _times(self, model: int) -> CallTimes:
        return self._expected.large if model else self._expected.small

    def _average(self, model: int, rows: int) -> _Average:
        return self._rows.setdefault((model, rows.bit_length()), _Average())

    def _corrected(self, model: int, step: float) -> CallTimes:
        times = self._times(model)
        overall = self._models[model].blended(self._pair.blended(0.0))
        most = max(times.rows[-1], *(1 << (bits - 1) for each, bits in self._rows if each == model), 1)
        rows = sorted({*times.rows, *(1 << bits for bits in range(most.bit_length()))})
        seconds = []
        for count in rows:
            found = self._rows.get((model, count.bit_length()))
            ratio = overall if found is None else found.blended(overall)
            factor = math.exp(round(ratio / step) * step)
            seconds.append(tuple(factor * times(count, tokens) for tokens in times.tokens))
        return CallTimes(tuple(rows), times.tokens, tuple(seconds))
