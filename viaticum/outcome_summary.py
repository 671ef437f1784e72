"""What an outcome table holds, counted in one pass: questions by data set, and figures by pair.

Memory grows with the number of questions, not with that of rows. Leaves out intervals (`viaticum.outcomes`).
"""

from __future__ import annotations

from array import array
from collections import Counter
from statistics import fmean, quantiles
from typing import Any

from viaticum.outcomes import checked_pair
from viaticum.types import Outcome, Pair


class _Figures:
    """Of one pair."""

    def __init__(self) -> None:
        self.answers = self.right = self.without_answer = self.cut = 0
        self.tokens, self.cost = array("q"), array("q")

    def add(self, row: Outcome) -> None:
        self.answers += 1
        self.right += row.correct
        self.without_answer += row.answer is None
        self.cut += row.finish_reason == "length"
        if row.output_tokens is not None:
            self.tokens.append(row.output_tokens)
        if row.cost_nanousd is not None:
            self.cost.append(row.cost_nanousd)

    def result(self, pair: Pair) -> dict[str, Any]:
        tokens = _quantiles(self.tokens)
        return {
            "pair": str(pair),
            "answers": self.answers,
            "right": self.right,
            "accuracy": self.right / self.answers,
            "without_answer": self.without_answer,
            "cut": self.cut,
            "tokens_p50": tokens[0],
            "tokens_p90": tokens[1],
            "cost_mean": round(fmean(self.cost)) if self.cost else None,
            "without_cost": self.answers - len(self.cost),
        }


class Summary:
    """Counts outcomes; each pair on each question at most once (`outcome_imports.unique`).

    Verdicts on answers are counted apart: a verdict is right where the answer is what it says.
    """

    def __init__(self) -> None:
        self._verdicts: dict[Pair, _Figures] = {}
        self._pairs: dict[Pair, _Figures] = {}
        self._questions: Counter[tuple[str, str]] = Counter()
        self._datasets: Counter[str] = Counter()
        self._without_text = 0

    def add(self, row: Outcome) -> None:
        if checked_pair(row) is not None:
            self._verdicts.setdefault(row.pair, _Figures()).add(row)
            return
        self._pairs.setdefault(row.pair, _Figures()).add(row)
        key = row.dataset, row.question_id
        if key not in self._questions:
            self._datasets[row.dataset] += 1
            self._without_text += not row.question.strip()
        self._questions[key] += 1

    def result(self) -> dict[str, Any]:
        """What `viaticum outcomes show --json` prints; the most accurate pair first, nano-dollars."""
        questions = len(self._questions)
        pairs = [
            found.result(pair) | {"holes": questions - found.answers}
            for pair, found in _best_first(self._pairs)
        ]
        verdicts = [found.result(pair) for pair, found in _best_first(self._verdicts)]
        return {
            "outcomes": sum(self._questions.values()),
            "questions": questions,
            "datasets": dict(self._datasets.most_common()),
            "complete": sum(count == len(self._pairs) for count in self._questions.values()),
            "without_text": self._without_text,
            "pairs": pairs,
            **({"verdicts": verdicts} if verdicts else {}),
        }


def _best_first(figures: dict[Pair, _Figures]) -> list[tuple[Pair, _Figures]]:
    return sorted(figures.items(), key=lambda each: -each[1].right / each[1].answers)


def _quantiles(values: array[int]) -> tuple[int | None, int | None]:
    """Median and 90% quantile."""
    if not values:
        return None, None
    if len(values) == 1:
        return values[0], values[0]
    deciles = quantiles(values, n=10, method="inclusive")
    return round(deciles[4]), round(deciles[8])
