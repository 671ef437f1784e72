"""The halves of the benchmark's tables: the same on every machine, and no near-duplicates on both sides."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from synthetic_outcomes import outcomes

from viaticum.routers.query.outcome_matrix import OutcomeMatrix, near_duplicates

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_router_data", BENCHMARKS / "_router_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_router_data"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_halves_are_about_equal_and_keep_groups_whole(data: ModuleType) -> None:
    matrix = OutcomeMatrix.from_outcomes(outcomes(300))
    groups = near_duplicates(matrix.texts)
    halves = data.half_of(groups, matrix.texts)
    assert 0.35 < halves.mean() < 0.65
    for group in np.unique(groups):
        assert len(set(halves[groups == group])) == 1


def test_the_half_of_a_question_does_not_depend_on_the_order_of_rows(data: ModuleType) -> None:
    matrix = OutcomeMatrix.from_outcomes(outcomes(120))
    halves = data.half_of(near_duplicates(matrix.texts), matrix.texts)
    order = np.random.default_rng(0).permutation(len(matrix))
    shuffled = matrix.select(order)
    again = data.half_of(near_duplicates(shuffled.texts), shuffled.texts)
    assert (again == halves[order]).all()


def test_a_half_is_what_the_salt_makes_it(data: ModuleType) -> None:
    """A change of the salt, or of the hash, would let what was kept aside be chosen on."""
    texts = ("one apple", "two pears", "three plums", "four figs", "five dates", "six limes")
    assert data.half_of(np.arange(6), texts).tolist() == [0, 0, 0, 1, 1, 1]


def test_training_questions_are_drawn_in_whole_groups(data: ModuleType) -> None:
    groups = np.repeat(np.arange(40), 3)
    train = groups % 4 != 0
    rows = data.training_rows(groups, train, 31, seed=1)
    assert len(rows) == 30
    assert train[rows].all()
    assert set(np.bincount(groups[rows])) == {0, 3}
    assert data.training_rows(groups, train, 31, seed=2).tolist() != rows.tolist()
