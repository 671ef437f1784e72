"""A paced job on rows whose real costs are known: which option each row would have got, and paid.

What `viaticum.budgets.pacing.Pacer` would have done in a batch: every block is planned with what is left,
and its real costs correct the plan of the next. Leaves out the ledger's holds, deadlines and calls that run
at the same time.
"""

from __future__ import annotations

import numpy as np

from viaticum.budgets.allocate import SKIPPED, Array
from viaticum.budgets.pacing import Pacer
from viaticum.money import NANOUSD_PER_USD

BLOCK_ROWS = 256  # planned together, at most
SAMPLE_ROWS = 1_000  # from which prices are computed


def paced_choices(worth: Array, cost: Array, spread: Array, actual: Array, budget: float) -> Array:
    """The option of each row, `SKIPPED` (-1) for none [Q].

    Args:
        worth, cost, spread: expected accuracy, dollars and their deviation [Q, K].
        actual: dollars that each option costs, read of the chosen one after it was chosen [Q, K].
        budget: dollars for all rows.
    """
    cost, spread, actual = (np.asarray(each) * NANOUSD_PER_USD for each in (cost, spread, actual))
    sample = np.unique(np.linspace(0, len(worth) - 1, SAMPLE_ROWS).round().astype(int))
    pacer = Pacer(
        worth[sample],
        cost[sample],
        rows=len(worth),
        budget=budget * NANOUSD_PER_USD,
        spread=spread[sample],
        at=sample,
    )
    chosen = np.full(len(worth), SKIPPED)
    start = 0
    while start < len(worth):
        rows = np.arange(start, start + pacer.stride(BLOCK_ROWS))
        start += len(rows)
        chosen[rows] = taken = pacer.choose(worth[rows], cost[rows], spread[rows])
        asked = np.maximum(taken, 0)
        expected, deviation, paid = (
            np.where(taken == SKIPPED, 0.0, each[rows, asked]) for each in (cost, spread, actual)
        )
        pacer.settle(taken, expected, paid, spread=deviation)
    return chosen
