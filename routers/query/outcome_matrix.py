"""The outcome table as matrices, a row a question and a column a pair; and which questions are near-duplicates.

Checks what a router would otherwise learn silently: contradicting rows, values that are no numbers, pairs without a
price. Knows no model and fits nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from viaticum.errors import DataError, InputError
from viaticum.money import NANOUSD_PER_USD
from viaticum.types import Outcome, Pair

# What is written where there is no answer. Where one of these is an answer after all, it only fails to count as agreeing.
NO_ANSWER = frozenset(("", "none", "null", "nan", "n/a", "unknown", "invalid", "error"))
FEWEST = 30  # questions below which nothing can be learned and checked
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OutcomeMatrix:
    """Q questions and P pairs; NaN where a pair was not asked.

    correct: 0 or 1 [Q, P]; tokens: output tokens [Q, P]; cost: dollars [Q, P]; cut: True where an answer was cut at
    its longest length [Q, P]; answers: numbers [Q, P], equal within a row where two pairs gave the same answer, and
    never equal where one gave none.
    """

    pairs: tuple[Pair, ...]
    ids: tuple[tuple[str, str], ...]
    texts: tuple[str, ...]
    correct: Array
    tokens: Array
    cost: Array
    cut: Array
    answers: Array

    @property
    def datasets(self) -> Array:
        return np.array([dataset for dataset, _ in self.ids])

    @property
    def complete(self) -> Array:
        """Which questions every pair was asked [Q]."""
        return np.asarray(~np.isnan(self.correct).any(1) & ~np.isnan(self.cost).any(1))

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Array) -> OutcomeMatrix:
        """The grid of some questions, by a bool mask or numbers."""
        index = np.flatnonzero(rows) if rows.dtype == bool else rows
        return OutcomeMatrix(
            self.pairs,
            tuple(self.ids[i] for i in index),
            tuple(self.texts[i] for i in index),
            self.correct[index],
            self.tokens[index],
            self.cost[index],
            self.cut[index],
            self.answers[index],
        )

    def join(self, other: OutcomeMatrix) -> OutcomeMatrix:
        """Both one below the other; they have the same pairs. A question in both has two rows."""
        arrays = ("correct", "tokens", "cost", "cut", "answers")
        return OutcomeMatrix(
            self.pairs,
            self.ids + other.ids,
            self.texts + other.texts,
            *(np.concatenate((getattr(self, name), getattr(other, name))) for name in arrays),
        )

    @classmethod
    def from_outcomes(
        cls,
        outcomes: Iterable[Outcome],
        prices: Mapping[str, tuple[float, float]] | None = None,
        pairs: Sequence[Pair] | None = None,
        *,
        live: bool = False,
    ) -> OutcomeMatrix:
        """Lay out an outcome table. prices: dollars a million input and output tokens of each model; without, what
        the table says each answer cost. pairs: the columns wanted, all by default; other pairs are left out.

        live: outcomes of live runs, whose cost may be unknown, and of which the last counts where they contradict
        each other. Else a row that is there twice counts once. Raises `DataError` for an empty table, rows that contradict each other,
        numbers that are none, and answers whose cost is unknown; `InputError` for models without a price.
        """
        outcomes = list(outcomes)
        if not outcomes:
            raise DataError("the outcome table is empty; profile at least one question")
        if prices is not None and (missing := sorted({row.model for row in outcomes} - set(prices))):
            raise InputError(f"no price for {', '.join(missing)}; add them to the prices")
        columns = {pair: n for n, pair in enumerate(pairs or sorted({row.pair for row in outcomes}))}
        rows: dict[tuple[str, str], int] = {}
        texts: list[str] = []
        for row in outcomes:
            if row.pair in columns and (key := (row.dataset, str(row.question_id))) not in rows:
                rows[key] = len(rows)
                texts.append(row.question)
        if not rows:
            raise DataError("no row is about a pair that was asked for; see the pairs that the table holds")
        shape = (len(rows), len(columns))
        correct, tokens, cost = (np.full(shape, np.nan) for _ in range(3))
        cut, answers = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int64)
        answers[:] = -1 - np.arange(len(columns))
        names: list[dict[str, int]] = [{} for _ in rows]
        for row in outcomes:
            if row.pair not in columns:
                continue
            place = rows[row.dataset, str(row.question_id)], columns[row.pair]
            if not live and not np.isnan(correct[place]) and correct[place] != row.correct:
                raise DataError(
                    f"{row.dataset} {row.question_id}, {row.pair}: one row says right, another wrong; "
                    "remove one of them"
                )
            correct[place] = row.correct
            tokens[place] = _number(row, "output_tokens")
            cost[place] = _cost(row, prices, needed=not live)
            cut[place] = row.finish_reason == "length"
            if (name := canonical_answer(row.answer)) is not None:
                answers[place] = names[place[0]].setdefault(name, len(names[place[0]]))
        return cls(tuple(columns), tuple(rows), tuple(texts), correct, tokens, cost, cut, answers)

    def check(self) -> None:
        """Raise `DataError` where there is too little to learn from."""
        if len(self) < FEWEST:
            raise DataError(
                f"{len(self)} question{'s' * (len(self) != 1)}; a router needs {FEWEST} or more: profile more, or use the static router"
            )
        if not all(text.strip() for text in self.texts):
            raise DataError(
                "the table leaves out the questions' texts, which a router reads; profile with --text"
            )
        known = self.correct[~np.isnan(self.correct)]
        if known.min() == known.max():
            word = "right" if known.min() else "wrong"
            raise DataError(f"every answer in the table is {word}; there is nothing to choose by")
        if np.isnan(self.correct).all(0).any():
            empty = [
                str(pair)
                for pair, column in zip(self.pairs, self.correct.T, strict=True)
                if np.isnan(column).all()
            ]
            raise DataError(f"no outcome of {', '.join(empty)}")


def read_prices(path: str | Path) -> dict[str, tuple[float, float]]:
    """Dollars a million tokens by model, from JSON like {"name": {"input": 0.5, "output": 1.5}}.

    Raises `InputError` where the file cannot be read, `DataError` where it is something else.
    """
    import json

    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
        prices = {
            name: (float(price.get("input", 0.0)), float(price["output"])) for name, price in told.items()
        }
    except OSError as error:
        raise InputError(f"cannot read the prices {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path} is no list of prices ({error}); write {{"model": {{"input": 0.5, "output": 1.5}}}}'
        ) from None
    for name, pair in prices.items():
        if not all(0 <= price < float("inf") for price in pair):
            raise DataError(f"{path}: the price of {name} must be 0 or more, got {pair}")
    return prices


def canonical_answer(answer: str | None) -> str | None:
    """One spelling for answers that say the same: "8.0", "$8" and "8"; None for no answer (`NO_ANSWER`).

    Rougher than the comparison of the strategies, which knows the kind of answer: only equality is asked here.
    """
    text = str(answer if answer is not None else "").strip().casefold().rstrip(".")
    if text.strip("[]<>() ") in NO_ANSWER:
        return None
    plain = text.replace(",", "").replace("$", "").replace("%", "").strip()
    try:
        return f"{float(plain):.6g}"
    except ValueError:
        return text


def near_duplicates(texts: Sequence[str], threshold: float = 0.6) -> Array:
    """A group number for each text [Q]; texts whose words and pairs of words (numbers aside) are alike share one.

    Alike: TF-IDF cosine of at least `threshold`, or joined by a chain of such. Needs scikit-learn (extra `local`).
    """
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import TfidfVectorizer

    if len(texts) == 1:
        return np.zeros(1, dtype=np.int64)
    vectors = TfidfVectorizer(
        ngram_range=(1, 2),
        token_pattern=r"(?u)\w+",
        preprocessor=lambda text: re.sub(r"\d+", "0", text.lower()),
    ).fit_transform(texts)
    alike = vectors @ vectors.T
    alike.data[alike.data < threshold] = 0
    alike.eliminate_zeros()
    return np.asarray(connected_components(alike, directed=False)[1])


def assign_folds(groups: Array, count: int, seed: int) -> Array:
    """A fold for each question [Q], 0 to count - 1; near-duplicates share theirs. Folds are nearly equal in size."""
    dice = np.random.default_rng(seed)
    numbers = dice.permutation(np.unique(groups))
    sizes = np.bincount(groups, minlength=int(groups.max()) + 1)
    fold_of, filled = np.zeros(len(sizes), dtype=np.int64), np.zeros(count)
    for number in sorted(numbers, key=lambda each: -sizes[each]):
        fold_of[number] = int(filled.argmin())
        filled[fold_of[number]] += sizes[number]
    return fold_of[groups]


def held_out(groups: Array, share: float, seed: int) -> Array:
    """Which questions are held out [Q, bool]: whole groups at random, up to `share` of all questions."""
    dice = np.random.default_rng(seed)
    sizes = np.bincount(groups)
    order = dice.permutation(np.unique(groups))
    taken = order[np.cumsum(sizes[order]) <= share * len(groups)]
    return np.isin(groups, taken)


def _number(row: Outcome, name: str) -> float:
    value = getattr(row, name)
    if value is None:
        return float("nan")
    if not (isinstance(value, int | float) and 0 <= value < float("inf")):
        raise DataError(
            f"{row.dataset} {row.question_id}, {row.pair}: {name} is {value!r}; it must be a number"
        )
    return float(value)


def _cost(row: Outcome, prices: Mapping[str, tuple[float, float]] | None, *, needed: bool) -> float:
    """Dollars of one answer. Prompts that were not counted cost nothing."""
    if prices is None:
        cost = _number(row, "cost_nanousd") / NANOUSD_PER_USD
    else:
        read, made = prices[row.model]
        tokens = _number(row, "output_tokens")
        cost = (
            (_number(row, "input_tokens") if row.input_tokens is not None else 0.0) * read + tokens * made
        ) / 1e6
    if needed and np.isnan(cost):
        what = "cost_nanousd" if prices is None else "output_tokens"
        raise DataError(
            f"{row.dataset} {row.question_id}, {row.pair}: {what} is missing, so its cost is unknown; "
            "profile it again, or give prices"
        )
    return cost
