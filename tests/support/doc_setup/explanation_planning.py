"""A sample of a job: what ways are worth and cost, and the rows as they come."""

from types import SimpleNamespace

import numpy as np

from viaticum.budgets.allocate import take_chosen

rng = np.random.default_rng(0)
budget = 40_000_000  # nano-dollars


def _rows(count: int) -> SimpleNamespace:
    cost = rng.uniform(0.5, 1.5, (count, 2)) * [200_000, 600_000]
    return SimpleNamespace(worth=rng.uniform(0.3, 0.9, (count, 2)), cost=cost, spread=0.2 * cost)


def next_rows(count: int) -> SimpleNamespace:
    return _rows(count)


def answer(rows: SimpleNamespace, ways: np.ndarray) -> np.ndarray:
    """What the rows cost: a tenth more than was expected."""
    return 1.1 * take_chosen(rows.cost, ways)


_sample = _rows(100)
worth, cost, spread = _sample.worth, _sample.cost, _sample.spread
positions = np.linspace(0, 49_999, 100).astype(int)
