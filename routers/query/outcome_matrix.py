"""The outcome table as matrices, a row a question and a column a pair; near-duplicates and folds.

Refuses data that a router would otherwise learn from silently: contradicting rows, values that are not
numbers, pairs without a price. Fitting is in `viaticum.routers.query.fit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from viaticum.errors import DataError, InputError
from viaticum.money import NANOUSD_PER_USD
from viaticum.routers.query.similar_texts import group_alike, sample_vectors, tf_idf, words_of
from viaticum.routers.query.verdicts import Verdicts, lay_out
from viaticum.types import VERIFY, Outcome, Pair

# Spellings of a missing answer. Where one of them is a real answer, it only fails to count as agreement.
NO_ANSWER = frozenset(("", "none", "null", "nan", "n/a", "unknown", "invalid", "error"))
LONG_TEXT = 2_000  # words from which texts are compared by samples of their word triples
TEMPLATE = 0.1  # share of all texts above which near-duplicates are made from a template
MIN_QUESTIONS = 30  # fewer are too few to fit and to check
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OutcomeMatrix:
    """Outcomes of P pairs on Q questions; NaN where a pair was not asked.

    Args:
        pairs: the columns.
        ids: data set and question id of each row.
        texts: the questions.
        correct: 0 or 1 [Q, P].
        tokens: output tokens [Q, P].
        cost: dollars [Q, P].
        truncated: True where an answer was cut at the token limit [Q, P].
        answers: integers [Q, P], equal within a row where two pairs gave the same answer, and unlike every
            other where a pair gave none.
        seconds: that answers took; NaN also where that is not known [Q, P].
        verdicts: of verifiers on the answers; None without any.
    """

    pairs: tuple[Pair, ...]
    ids: tuple[tuple[str, str], ...]
    texts: tuple[str, ...]
    correct: Array
    tokens: Array
    cost: Array
    truncated: Array
    answers: Array
    seconds: Array
    verdicts: Verdicts | None = None

    @property
    def datasets(self) -> Array:
        return np.array([dataset for dataset, _ in self.ids])

    @property
    def complete(self) -> Array:
        """Mask of the questions that every pair was asked [Q]."""
        return np.asarray(~np.isnan(self.correct).any(1) & ~np.isnan(self.cost).any(1))

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Array) -> OutcomeMatrix:
        """The matrix of some questions, by a bool mask or by indices."""
        index = np.flatnonzero(rows) if rows.dtype == bool else rows
        return OutcomeMatrix(
            self.pairs,
            tuple(self.ids[i] for i in index),
            tuple(self.texts[i] for i in index),
            self.correct[index],
            self.tokens[index],
            self.cost[index],
            self.truncated[index],
            self.answers[index],
            self.seconds[index],
            None if self.verdicts is None else self.verdicts.select(index),
        )

    def with_verdicts(self, spent: Array | None = None) -> tuple[Array, Array, Array]:
        """What `simulate` reads: correct, dollars and answers, with V columns of verdicts [Q, P + V].

        spent: seconds in place of dollars, of pairs [Q, P].
        """
        cost = self.cost if spent is None else spent
        if self.verdicts is None:
            return self.correct, cost, self.answers
        known = self.verdicts
        of_checks = known.cost if spent is None else known.seconds
        none = np.full(known.yes.shape, -1, dtype=self.answers.dtype)
        pairs = (self.correct, known.yes), (cost, of_checks), (self.answers, none)
        correct, dollars, answers = (np.concatenate(each, 1) for each in pairs)
        return correct, dollars, answers

    def without_partial_verdicts(self) -> OutcomeMatrix:
        """Without the verdicts of columns that are not known, with their cost, on every question."""
        if self.verdicts is None:
            return self
        numbers = range(len(self.verdicts.columns))
        whole = [number for number in numbers if self.verdict_priced(len(self.pairs) + number).all()]
        return replace(self, verdicts=self.verdicts.columns_of(whole) if whole else None)

    def pair_of(self, column: int) -> Pair:
        """The pair of a column of `with_verdicts`."""
        if column < len(self.pairs):
            return self.pairs[column]
        assert self.verdicts is not None
        return Pair(self.verdicts.columns[column - len(self.pairs)][1], VERIFY)

    def verdict_known(self, column: int) -> Array:
        """Mask of the questions for which a plan can follow the verdicts of a column [Q]."""
        assert self.verdicts is not None
        number = column - len(self.pairs)
        pair, _ = self.verdicts.columns[number]
        return np.asarray(~np.isnan(self.verdicts.yes[:, number]) | (self.answers[:, pair] < 0))

    def verdict_priced(self, column: int) -> Array:
        """As `verdict_known`, where the cost of the verdict is known too [Q]."""
        assert self.verdicts is not None
        number = column - len(self.pairs)
        pair, _ = self.verdicts.columns[number]
        priced = ~np.isnan(self.verdicts.cost[:, number]) | (self.answers[:, pair] < 0)
        return np.asarray(self.verdict_known(column) & priced)

    def concat(self, other: OutcomeMatrix) -> OutcomeMatrix:
        """The rows of both, which have the same pairs. A question in both has two rows."""
        names = ("correct", "tokens", "cost", "truncated", "answers", "seconds")
        arrays = {name: np.concatenate((getattr(self, name), getattr(other, name))) for name in names}
        verdicts = None
        if self.verdicts or other.verdicts:
            sides = [each.verdicts or Verdicts.none(len(each)) for each in (self, other)]
            verdicts = sides[0].concat(sides[1])
        ids, texts = self.ids + other.ids, self.texts + other.texts
        return OutcomeMatrix(self.pairs, ids, texts, **arrays, verdicts=verdicts)

    @classmethod
    def from_outcomes(
        cls,
        outcomes: Iterable[Outcome],
        prices: Mapping[str, tuple[float, float]] | None = None,
        pairs: Sequence[Pair] | None = None,
        *,
        live: bool = False,
        verdicts: Sequence[Outcome] = (),
    ) -> OutcomeMatrix:
        """Lay out an outcome table; a row that is there twice counts once.

        Args:
            outcomes: the rows of the table.
            prices: dollars a million input and output tokens by model; by default the cost in the table
                counts.
            pairs: the columns; rows of other pairs are left out. By default all pairs of the table.
            live: outcomes of live runs: their cost may be unknown, and of contradicting rows the last counts.
            verdicts: on answers of the table (`viaticum.outcomes.read_verdicts`); their cost may be unknown.

        Raises:
            DataError: an empty table, rows that contradict each other, values that are not numbers, one id of
                two questions, an answer of unknown cost, or a verdict on an answer that is not in the table.
            InputError: a model without a price.
        """
        outcomes = list(outcomes)
        if not outcomes:
            raise DataError("the outcome table is empty; profile at least one question")
        wanted = None if pairs is None else set(pairs)
        models = {row.model for row in outcomes if wanted is None or row.pair in wanted}
        models |= {row.model for row in verdicts}
        if prices is not None and (missing := sorted(models - set(prices))):
            raise InputError(f"no price for {', '.join(missing)}; add them to the prices")
        names = {Pair(*each) for each in {(row.model, row.strategy) for row in outcomes}}
        columns = {pair: n for n, pair in enumerate(pairs or sorted(names))}
        column_of = {(pair.model, pair.strategy): n for pair, n in columns.items()}
        rows: dict[tuple[str, str], int] = {}
        texts: list[str] = []
        cells: list[tuple[Outcome, int, int]] = []
        for row in outcomes:
            column = column_of.get((row.model, row.strategy))
            if column is None:
                continue
            number = rows.setdefault((row.dataset, str(row.question_id)), len(rows))
            if number == len(texts):
                texts.append(row.question)
            texts[number] = _same_text(row, texts[number])
            cells.append((row, number, column))
        if not rows:
            raise DataError("no row is about a pair that was asked for; see the pairs that the table holds")
        shape = (len(rows), len(columns))
        correct, tokens, cost, seconds = (np.full(shape, np.nan) for _ in range(4))
        truncated = np.zeros(shape, dtype=bool)
        answers = np.tile(-1 - np.arange(len(columns)), (len(rows), 1))
        answer_numbers: list[dict[str, int]] = [{} for _ in rows]
        for row, number, column in cells:
            cell = number, column
            if not live and not np.isnan(correct[cell]) and correct[cell] != row.correct:
                raise DataError(
                    f"{row.dataset} {row.question_id}, {row.pair}: one row says right, another wrong; "
                    "remove one of them"
                )
            correct[cell] = row.correct
            tokens[cell] = _number(row, "output_tokens")
            cost[cell] = _cost(row, prices, needed=not live)
            seconds[cell] = _number(row, "seconds")
            truncated[cell] = row.finish_reason == "length"
            if (answer := canonical_answer(row.answer)) is not None:
                known = answer_numbers[cell[0]]
                answers[cell] = known.setdefault(answer, len(known))
        arrays = (correct, tokens, cost, truncated, answers, seconds)
        of_verdicts = [_cost(row, prices, needed=False) for row in verdicts]
        found = lay_out(verdicts, tuple(columns), rows, correct, of_verdicts, live=live)
        known_verdicts = found if found.columns else None
        return cls(tuple(columns), tuple(rows), tuple(texts), *arrays, verdicts=known_verdicts)

    def check(self) -> None:
        """Raise `DataError` where there is too little to fit on."""
        if len(self) < MIN_QUESTIONS:
            raise DataError(
                f"{len(self)} question{'s' * (len(self) != 1)}; a router needs {MIN_QUESTIONS} or more: "
                "profile more, or use the static router"
            )
        self.check_texts()
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

    def check_texts(self) -> None:
        """Raise `DataError` where the text of a question is left out."""
        if not all(text.strip() for text in self.texts):
            raise DataError(
                "the table leaves out the questions' texts, which a router reads; profile with --text"
            )


def read_prices(path: str | Path) -> dict[str, tuple[float, float]]:
    """Dollars a million input and output tokens by model.

    The file is JSON like {"name": {"input": 0.5, "output": 1.5}}.

    Raises:
        InputError: the file cannot be read.
        DataError: it has another form, or a price that is negative or not finite.
    """
    import json

    try:
        document = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        prices = {
            name: (float(price.get("input", 0.0)), float(price["output"])) for name, price in document.items()
        }
    except OSError as error:
        raise InputError(f"cannot read the prices {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f'{path} is no list of prices ({error}); write {{"model": {{"input": 0.5, "output": 1.5}}}}'
        ) from None
    for name, pair in prices.items():
        if not all(0 <= price < float("inf") for price in pair):
            raise DataError(f"{path}: the price of {name} must be 0 or more, got {pair}")
    return prices


@lru_cache(maxsize=65_536)  # most answers of a table stand there for several pairs
def canonical_answer(answer: str | None) -> str | None:
    """The same spelling for equal answers, such as "8.0", "$8" and "8"; None for no answer (`NO_ANSWER`).

    Coarser than the comparison in `viaticum.strategies`, which knows the kind of answer.
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
    """A group number for each text [Q]; texts with similar words and word pairs (numbers ignored) share one.

    Similar: a TF-IDF cosine of at least `threshold`, directly or through a chain of texts. Texts above
    `LONG_TEXT` words, whose frequent words are always alike, share that part of a sample of their word
    triples (Broder 1997). Needs scikit-learn (extra `local`).
    """
    words = [words_of(text) for text in texts]
    short = [number for number, found in enumerate(words) if len(found) <= LONG_TEXT]
    longer = [number for number, found in enumerate(words) if len(found) > LONG_TEXT // 2]
    if len(short) == len(words):  # those of middle length are compared with both kinds
        longer = []
    # Texts with the same words are in one group, of which one is compared: a template may have very many.
    first: dict[tuple[str, ...], int] = {}
    labels = np.array([first.setdefault(tuple(found), n) if found else n for n, found in enumerate(words)])
    is_first = labels == np.arange(len(words))
    for numbers, vectors_of in ((short, tf_idf), (longer, sample_vectors)):
        vectors = vectors_of([words[number] for number in numbers])
        if vectors is not None:
            own = np.flatnonzero(is_first[numbers])
            labels = group_alike(vectors[own], labels, np.array(numbers)[own], threshold)
    return _in_order(labels)


def _in_order(labels: Array) -> Array:
    """The same groups, numbered as they come."""
    _, begins, groups = np.unique(labels, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(begins))[groups])


def split_templates(groups: Array, texts: Sequence[str]) -> Array:
    """The groups [Q], of those that hold more than `TEMPLATE` of all texts only equal texts together.

    So large a group is a template that questions are made from, and those to come will be too: to keep it
    on one side would leave out a whole kind of question.
    """
    template = np.bincount(groups)[groups] > TEMPLATE * len(texts)
    names = [f"={text}" if made else str(n) for text, made, n in zip(texts, template, groups, strict=True)]
    return np.asarray(np.unique(names, return_inverse=True)[1])


def assign_folds(groups: Array, count: int, seed: int) -> Array:
    """A fold for each question [Q], 0 to count - 1: whole groups, in folds of nearly equal size.

    scikit-learn's `GroupKFold`; the seed decides among groups of equal size. Fewer groups than folds leave
    folds empty.
    """
    from sklearn.model_selection import GroupKFold

    numbers, indices = np.unique(groups, return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(len(numbers))[indices]
    folds = np.zeros(len(groups), dtype=np.int64)
    splits = GroupKFold(min(count, len(numbers))).split(groups, groups=shuffled)
    for fold, (_, rows) in enumerate(splits):
        folds[rows] = fold
    return folds


def held_out(groups: Array, share: float, seed: int) -> Array:
    """Mask of the questions that are held out [Q]: whole groups at random, up to `share` of all questions."""
    rng = np.random.default_rng(seed)
    sizes = np.bincount(groups)
    order = rng.permutation(np.unique(groups))
    taken = order[np.cumsum(sizes[order]) <= share * len(groups)]
    return np.isin(groups, taken)


def _same_text(row: Outcome, known: str) -> str:
    """The text of a question, from a row that has it. Raises `DataError` where rows have different ones."""
    if row.question and known and row.question.strip() != known.strip():
        raise DataError(
            f"{row.dataset} {row.question_id} is the id of two questions, {known[:40]!r} and "
            f"{row.question[:40]!r}; give each an id of its own within its data set"
        )
    return known or row.question


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
    """Dollars of one answer; a prompt that was not counted costs nothing."""
    if prices is None:
        cost = _number(row, "cost_nanousd") / NANOUSD_PER_USD
    else:
        input_price, output_price = prices[row.model]
        input_tokens = _number(row, "input_tokens") if row.input_tokens is not None else 0.0
        cost = (input_tokens * input_price + _number(row, "output_tokens") * output_price) / 1e6
    if needed and np.isnan(cost):
        what = "cost_nanousd" if prices is None else "output_tokens"
        raise DataError(
            f"{row.dataset} {row.question_id}, {row.pair}: {what} is missing, so its cost is unknown; "
            "profile it again, or give prices"
        )
    return cost
