"""Outcome matrices: layout, refused tables, prices, near-duplicates and folds."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_outcomes import PAIRS, outcomes

from viaticum.errors import DataError, InputError
from viaticum.outcomes import read_outcomes
from viaticum.routers.query.outcome_matrix import (
    OutcomeMatrix,
    assign_folds,
    canonical_answer,
    held_out,
    near_duplicates,
    read_prices,
)


def test_a_table_is_laid_out_by_question_and_pair() -> None:
    rows = outcomes(40)
    matrix = OutcomeMatrix.from_outcomes(reversed(rows))
    assert matrix.pairs == PAIRS
    assert len(matrix) == 40
    assert matrix.complete.all()
    for row in rows:
        cell = matrix.ids.index((row.dataset, row.question_id)), matrix.pairs.index(row.pair)
        assert matrix.correct[cell] == row.correct
        assert matrix.tokens[cell] == row.output_tokens
        assert matrix.cost[cell] == pytest.approx(row.cost_nanousd / 1e9)
    first = [row for row in rows if row.question_id == rows[0].question_id]
    numbers = matrix.answers[matrix.ids.index((rows[0].dataset, rows[0].question_id))]
    for one in first:
        for other in first:
            same = numbers[PAIRS.index(one.pair)] == numbers[PAIRS.index(other.pair)]
            assert same == (one.answer == other.answer)


def test_no_answer_agrees_with_nothing() -> None:
    rows = [replace(row, answer=None) for row in outcomes(30)]
    answers = OutcomeMatrix.from_outcomes(rows).answers
    assert all(len(set(line)) == len(PAIRS) for line in answers.tolist())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("8.0", "8", True),
        ("$1,000", "1000", True),
        ("Yes", "yes.", True),
        ("12%", "12", True),
        ("7", "8", False),
        ("", None, True),
        ("[invalid]", None, True),
        ("Unknown", None, True),
        ("none of them", None, False),
        ("a b", "ab", False),
        ("1e3", "1000", True),
    ],
)
def test_spellings(one: str | None, other: str | None, same: bool) -> None:
    assert (canonical_answer(one) == canonical_answer(other)) == same


def test_repeated_rows_count_once_and_contradictions_are_refused() -> None:
    rows = outcomes(30)
    assert np.array_equal(
        OutcomeMatrix.from_outcomes([*rows, *rows]).correct, OutcomeMatrix.from_outcomes(rows).correct
    )
    with pytest.raises(DataError, match=r"sums 0-0, tiny\+direct: one row says right, another wrong"):
        OutcomeMatrix.from_outcomes([*rows, replace(rows[0], correct=not rows[0].correct)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_tokens": float("nan")}, "output_tokens is nan; it must be a number"),
        ({"output_tokens": -3}, "output_tokens is -3"),
        ({"cost_nanousd": None}, "cost_nanousd is missing, so its cost is unknown"),
        ({"cost_nanousd": float("inf")}, "cost_nanousd is inf"),
    ],
)
def test_values_that_are_not_numbers_are_named(change: dict[str, Any], message: str) -> None:
    rows = outcomes(30)
    with pytest.raises(DataError, match=message):
        OutcomeMatrix.from_outcomes([*rows[:-1], replace(rows[-1], **change)])


def test_an_empty_table_and_other_pairs() -> None:
    with pytest.raises(DataError, match="empty"):
        OutcomeMatrix.from_outcomes([])
    with pytest.raises(DataError, match="no row is about a pair"):
        OutcomeMatrix.from_outcomes(outcomes(3), pairs=[replace(PAIRS[0], model="other")])


def test_tables_with_too_little_in_them_are_refused() -> None:
    rows = outcomes(31)
    OutcomeMatrix.from_outcomes(rows).check()
    with pytest.raises(DataError, match="1 question; a router needs 30"):
        OutcomeMatrix.from_outcomes(rows[:4]).check()
    with pytest.raises(DataError, match="every answer in the table is right"):
        OutcomeMatrix.from_outcomes([replace(row, correct=True) for row in rows]).check()
    with pytest.raises(DataError, match="leaves out the questions' texts"):
        OutcomeMatrix.from_outcomes([replace(row, question="") for row in rows]).check()
    with pytest.raises(DataError, match=r"no outcome of big\+cot"):
        OutcomeMatrix.from_outcomes([row for row in rows if row.model != "big"], pairs=PAIRS).check()


def test_prices_make_costs(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text(
        json.dumps({"tiny": {"output": 2}, "mid": {"input": 1, "output": 4}, "big": {"output": 9}})
    )
    matrix = OutcomeMatrix.from_outcomes(outcomes(30), read_prices(path))
    mid = PAIRS.index(next(pair for pair in PAIRS if pair.model == "mid"))
    assert matrix.cost[:, mid] == pytest.approx((20 * 1 + matrix.tokens[:, mid] * 4) / 1e6)
    path.write_text(json.dumps({"tiny": {"output": 2}}))
    with pytest.raises(InputError, match="no price for big, mid"):
        OutcomeMatrix.from_outcomes(outcomes(30), read_prices(path))


@pytest.mark.parametrize(
    "text", ["[]", '{"a": 3}', '{"a": {"output": "x"}}', "nonsense", '{"a": {"output": -1}}']
)
def test_files_that_are_not_prices_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "prices.json").write_text(text)
    with pytest.raises(DataError):
        read_prices(tmp_path / "prices.json")
    with pytest.raises(InputError, match="cannot read the prices"):
        read_prices(tmp_path / "none.json")


def test_rows_that_are_left_out_need_no_price() -> None:
    rows = outcomes(5)
    known = tuple(sorted({row.pair for row in rows if row.model == "tiny"}))
    prices = {"tiny": (1.0, 2.0)}
    assert OutcomeMatrix.from_outcomes(rows, prices, known).pairs == known
    with pytest.raises(InputError, match="no price for big, mid"):
        OutcomeMatrix.from_outcomes(rows, prices)


def test_near_duplicates_are_found_through_numbers_and_chains() -> None:
    texts = [
        "Baker made 121 cakes and sold 105 of them. How many cakes are left?",
        "Baker made 9 cakes and sold 4 of them. How many cakes are left?",
        "Baker made 9 cakes and sold 4 of them today. How many cakes are still left?",
        "The uncle of her mother is who to her?",
    ]
    groups = near_duplicates(texts)
    assert groups[0] == groups[1] == groups[2] != groups[3]
    assert near_duplicates(["alone"]).tolist() == [0]


def test_folds_and_held_out_questions_never_split_groups() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 500)
    folds = assign_folds(groups, 5, seed=3)
    assert all(len(set(folds[groups == group])) == 1 for group in set(groups))
    sizes = np.bincount(folds)
    assert sizes.max() - sizes.min() < 20
    out = held_out(groups, 0.3, seed=1)
    assert not set(groups[out]) & set(groups[~out])
    assert 0.2 < out.mean() <= 0.3
    assert np.array_equal(out, held_out(groups, 0.3, seed=1))
    assert not np.array_equal(out, held_out(groups, 0.3, seed=2))


def test_one_id_of_two_questions_is_refused_and_a_text_may_be_missing_once() -> None:
    rows = outcomes(30)
    key = rows[0].dataset, rows[0].question_id
    same = [n for n, row in enumerate(rows) if (row.dataset, row.question_id) == key]
    rows[same[0]] = replace(rows[same[0]], question="")
    rows[same[2]] = replace(rows[same[2]], question=f" {rows[same[1]].question}\n")
    assert OutcomeMatrix.from_outcomes(rows).texts[0].strip() == rows[same[1]].question
    rows[same[2]] = replace(rows[same[2]], question="another question")
    for live in (False, True):
        with pytest.raises(DataError, match=f"{key[0]} {key[1]} is the id of two questions"):
            OutcomeMatrix.from_outcomes(rows, live=live)
    moved = [replace(row, dataset="other") if n == same[2] else row for n, row in enumerate(rows)]
    assert len(OutcomeMatrix.from_outcomes(moved)) == 31


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_table_may_have_no_answers(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"known.{suffix}"
    columns = ("dataset", "question_id", "question", "model", "strategy", "correct", "cost_nanousd")
    values = [{name: getattr(row, name) for name in columns} for row in outcomes(30)]
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, values)))
    elif suffix == "csv":
        lines = [",".join(map(str, row.values())) for row in values]
        path.write_text("\n".join((",".join(columns), *lines)))
    else:
        pq.write_table(pa.Table.from_pylist(values), path)
    matrix = OutcomeMatrix.from_outcomes(read_outcomes(path))
    assert all(len(set(line)) == len(PAIRS) for line in matrix.answers.tolist())


def test_live_outcomes_may_lack_costs_and_the_last_row_counts() -> None:
    rows = [replace(row, cost_nanousd=None) for row in outcomes(30)]
    matrix = OutcomeMatrix.from_outcomes([*rows, replace(rows[0], correct=not rows[0].correct)], live=True)
    assert np.isnan(matrix.cost).all()
    assert matrix.correct[0, PAIRS.index(rows[0].pair)] == (not rows[0].correct)


def test_long_texts_are_alike_by_their_passages_not_by_their_frequent_words() -> None:
    random = np.random.default_rng(0)
    words, weights = [f"w{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(600)], 1 / np.arange(1, 601)

    def text(length: int) -> str:
        return " ".join(random.choice(words, length, p=weights / weights.sum()))

    long, other, middle = text(6_000), text(6_000), text(1_900)
    texts = [long, other, f"{text(300)} {long} What is 3 + 4?", middle, f"{middle} {text(150)}", text(50), ""]
    assert near_duplicates(texts).tolist() == [0, 1, 0, 2, 2, 3, 4]
    assert near_duplicates([long, other]).tolist() == [0, 1]
    assert near_duplicates([long, "a short one"]).tolist() == [0, 1]
    assert near_duplicates(["", ""]).tolist() == [0, 1]


def test_texts_of_common_length_are_grouped_by_the_cosine_of_their_words_and_pairs() -> None:
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import TfidfVectorizer

    random = np.random.default_rng(1)
    words = [*"aBcdef", "ça", *(f"w{chr(97 + number)}1" for number in range(20))]
    texts = [" ".join(random.choice(words, 2 + length % 9)) for length in range(80)]
    plain = [re.sub(r"\d+", "0", text.lower()) for text in texts]
    vectors = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\w+").fit_transform(plain)
    wanted = connected_components((vectors @ vectors.T).toarray() >= 0.6, directed=False)[1]
    assert len(set(wanted)) > 2
    assert near_duplicates(texts).tolist() == wanted.tolist()
