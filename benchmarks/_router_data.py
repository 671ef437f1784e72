"""The four public outcome tables of `routers.py --data`, and the halves of their questions.

One half of each table is for choosing (settings, heads, everything that is compared), the other is kept
aside and read once, for a report. The half of a question is the parity of a hash of its group of
near-duplicates, so that no group lies on both sides and the halves are the same on every machine. Groups are
those of the texts without what many of them share; of a group that is a template only equal texts stay
together, as in a fit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from viaticum.outcomes import outcome_rows, parse_outcome
from viaticum.routers.query.outcome_matrix import (
    Array,
    OutcomeMatrix,
    near_duplicates,
    read_prices,
    split_templates,
)
from viaticum.routers.query.shared_text import without_shared

SALT = "viaticum routers 2026"
HALVES = ("choose", "report")


@dataclass(frozen=True)
class Source:
    """Where a table lies, below the folder of all of them.

    Args:
        outcomes: the table.
        prices: dollars a million tokens; None where the costs of the table count.
        budgets: mean dollars a question, five from cheap to dear.
        kind: column of the kinds that are left out.
    """

    outcomes: str
    prices: str | None
    budgets: tuple[float, ...]
    kind: str = "dataset"


SOURCES = {
    "faithful_cot": Source(
        "outcomes/faithful_cot.parquet", "outcomes/prices.json", (0.0001, 0.0003, 0.001, 0.004, 0.012)
    ),
    "mmlu_pro": Source(
        "outcomes/mmlu_pro.parquet",
        "outcomes/prices_mmlu_pro.json",
        (0.00006, 0.0001, 0.0002, 0.0004, 0.0007),
    ),
    "concise": Source(
        "outcomes/concise.parquet", "outcomes/prices_concise.json", (0.001, 0.002, 0.005, 0.01, 0.02)
    ),
    "ood176": Source("agents/ood176.parquet", None, (0.015, 0.025, 0.04, 0.06, 0.09), "bench"),
}


@dataclass(frozen=True)
class HalfTable:
    """One half of a table.

    Args:
        name, half: which.
        matrix: outcomes of questions that every pair was asked [Q].
        kinds: kind of each question [Q].
        groups: of near-duplicates [Q].
        numbers: of the questions in the whole table [Q].
        budgets: mean dollars a question.
    """

    name: str
    half: str
    matrix: OutcomeMatrix
    kinds: Array
    groups: Array
    numbers: Array
    budgets: tuple[float, ...]

    def select(self, rows: Array) -> HalfTable:
        """Some of its questions, by a mask or by indices."""
        return HalfTable(
            self.name,
            self.half,
            self.matrix.select(rows),
            self.kinds[rows],
            self.groups[rows],
            self.numbers[rows],
            self.budgets,
        )


def half_of(groups: Array, texts: tuple[str, ...]) -> Array:
    """The half of each question, an index of `HALVES` [Q]; the least hash of its texts names a group."""
    names: dict[int, str] = {}
    for group, text in zip(groups.tolist(), texts, strict=True):
        digest = hashlib.sha256(f"{SALT}\0{text}".encode()).hexdigest()
        names[group] = min(digest, names.get(group, digest))
    return np.array([int(names[group][0], 16) % 2 for group in groups.tolist()])


def read_half(folder: Path, name: str, half: str) -> HalfTable:
    """Read one half of a table of `SOURCES`; "both" reads all of it."""
    source = SOURCES[name]
    rows = [row for _, row in outcome_rows(folder / source.outcomes)]
    prices = None if source.prices is None else read_prices(folder / source.prices)
    matrix = OutcomeMatrix.from_outcomes([parse_outcome(row, name) for row in rows], prices)
    kind_of = {(row["dataset"], str(row["question_id"])): row[source.kind] for row in rows}
    matrix = matrix.select(matrix.complete)
    kinds = np.array([kind_of[each] for each in matrix.ids])
    read = without_shared(matrix.texts)
    groups = split_templates(near_duplicates(read), read)
    table = HalfTable(name, half, matrix, kinds, groups, np.arange(len(matrix)), source.budgets)
    if half == "both":
        return table
    return table.select(half_of(groups, matrix.texts) == HALVES.index(half))


def training_rows(groups: Array, train: Array, size: int, seed: int) -> Array:
    """Indices of about `size` training questions, whole groups at random. train: mask [Q]."""
    rng = np.random.default_rng(seed)
    rows: list[int] = []
    names, sizes = np.unique(groups[train], return_counts=True)
    for number in rng.permutation(len(names)):
        if len(rows) + sizes[number] <= size:
            rows += np.flatnonzero(train & (groups == names[number])).tolist()
        if len(rows) == size:
            break
    return np.sort(np.array(rows))
