"""The parts of `routers.py --data`, each a fit and what it is compared with, kept in a file of its own.

- split: 30% of the half is held out, whole groups, for a seed; the learned router and the baselines.
- kind: one kind of questions is held out, with near-duplicates of them; the learned router and the static
  mixture that was best on the same training questions, within the same budget, at what ours really cost, and
  both paced, so that neither spends more than the budget.
- size: as split, fitted on so many of the training questions.
- before: as split, the learned router of another checkout alone.
- llmrouter: as split, the routers of llmrouter-lib, each with the learned router at that one's expected cost.
- speed: a fit on all questions of both halves, of which nothing is evaluated, and the time of a choice.

Results are correct or not (or the probability of it) and dollars by budget and held-out question, and figures
of the learned router. A part whose file exists is not computed again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from _baselines import (
    LEAVES,
    NEIGHBOURS,
    PENALTIES,
    Curve,
    Split,
    best_cascade,
    cascade,
    fixed,
    forest,
    logistic,
    neighbours,
    oracle,
    planned,
    random_pairs,
    static_hull,
    tuned,
    with_lexical,
)
from _llmrouter import routes
from _plain_rtr import Descriptions, plain_rtr
from _router_data import SOURCES, HalfTable, read_half, training_rows
from _router_speed import speed

from viaticum.budgets.paced_run import paced_choices
from viaticum.routers.query.calibration import calibration_error
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.evaluate import (
    _token_coverage,
    best_mixture,
    best_single_pairs,
    column_outcomes,
    cost_to_reach,
)
from viaticum.routers.query.fit import fit
from viaticum.routers.query.outcome_matrix import Array, assign_folds, held_out
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.rtr import Prediction, RTRRouter
from viaticum.routers.query.shared_text import without_shared
from viaticum.routers.query.trust import accuracy_at, choices_by_weight

SHARE = 0.3  # of the questions is held out
SIZES = (40, 100, 300, 1_000)
LEAST_KIND, LEAST_TRAINING = 14, 30  # questions of a kind that is left out, and of a fit
SWEEP = np.geomspace(0.004, 40, 60)  # cost weights, in units of the dollars of the best single pair
PARTS = ("split", "kind", "size", "before", "speed", "llmrouter")
OURS, PACED, BEFORE = "viaticum", "viaticum, paced", "viaticum before"
AT_COST = "viaticum, at equal real cost"
STATIC, KNN = "static mixture", "neighbours, tuned"
STATIC_AT_COST = "static mixture, at the cost of viaticum"
STATIC_PACED = "static mixture, paced"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Unit:
    """One part: of which table and half, and the seed, the kind, or size and seed."""

    table: str
    half: str
    part: str
    which: str

    @property
    def file(self) -> str:
        return f"{self.table}.{self.half}.{self.part}.{self.which.replace('/', '_').replace(' ', '_')}.npz"


@dataclass(frozen=True)
class Run:
    """Results of a part.

    Args:
        unit: which part.
        results: correct and dollars by name of the router, each [budgets, questions]; NaN where nothing is so
            cheap.
        numbers: of the questions in the whole table [questions].
        facts: figures of the learned router.
    """

    unit: Unit
    results: dict[str, tuple[Array, Array]]
    numbers: Array
    facts: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write the file whole or not at all."""
        arrays = {f"{name}|{n}": each for name, pair in self.results.items() for n, each in enumerate(pair)}
        head = json.dumps({"unit": vars(self.unit), "facts": self.facts})
        scratch = folder / f".{self.unit.file}"
        with scratch.open("wb") as file:
            np.savez_compressed(file, head=np.array(head), numbers=self.numbers, **arrays)  # type: ignore[arg-type]
        scratch.replace(folder / self.unit.file)

    @classmethod
    def load(cls, file: Path) -> Run:
        with np.load(file) as stored:
            head = json.loads(str(stored["head"]))
            names = [name.removesuffix("|0") for name in stored.files if name.endswith("|0")]
            results = {name: (stored[f"{name}|0"], stored[f"{name}|1"]) for name in names}
            return cls(Unit(**head["unit"]), results, stored["numbers"], head["facts"])


@dataclass(frozen=True)
class Half:
    """One half of a table with its embeddings, and where its files are."""

    folder: Path
    name: str
    half: str
    encoder: Encoder

    @cached_property
    def table(self) -> HalfTable:
        return read_half(self.folder, self.name, self.half)

    @cached_property
    def x(self) -> Array:
        return self.encoder(without_shared(self.table.matrix.texts)).numpy()

    def split(self, test: Array, train: Array, seed: int) -> Split:
        """Split by a mask and by indices; a fifth of the training questions is for tuning."""
        table = self.table
        return Split(
            train=table.matrix.select(train),
            test=table.matrix.select(test),
            x_train=self.x[train],
            x_test=self.x[test],
            inner=assign_folds(table.groups[train], 5, seed) == 0,
            numbers=table.numbers[test],
            seed=seed,
            budgets=table.budgets,
        )

    def units(self, parts: Sequence[str], seeds: int) -> Iterator[Unit]:
        """The parts that there are enough questions for."""
        training = len(self.table.matrix) * (1 - SHARE)
        for part in parts:
            if part in ("split", "before", "llmrouter"):
                names = [str(seed) for seed in range(seeds)]
            elif part == "size":
                names = [f"{n}-{seed}" for n in SIZES if n <= training for seed in range(seeds)]
            elif part == "speed":
                names = ["all"]
            else:
                kinds, counts = np.unique(self.table.kinds, return_counts=True)
                left = len(self.table.matrix) - counts
                names = kinds[(counts >= LEAST_KIND) & (left >= LEAST_TRAINING)].tolist()
            yield from (Unit(self.name, self.half, part, name) for name in names)

    def rows(self, unit: Unit) -> Split:
        """The split of a part."""
        groups, every = self.table.groups, np.arange(len(self.table.matrix))
        if unit.part == "kind":
            test = self.table.kinds == unit.which
            return self.split(test, every[~test & ~np.isin(groups, groups[test])], 0)
        size, _, seed = unit.which.rpartition("-")
        test = held_out(groups, SHARE, int(seed))
        train = training_rows(groups, ~test, int(size), int(seed)) if size else every[~test]
        return self.split(test, train, int(seed))


def measure(
    half: Half,
    unit: Unit,
    *,
    baselines: bool,
    before: Path | None,
    llmrouter: Path | None,
    report: Report,
) -> Run:
    """Compute one part.

    Args:
        baselines: of a split all baselines, not only the static mixture and the nearest neighbours.
        before: another checkout, for the part of that name.
        llmrouter: the Python of an environment with llmrouter-lib, for the part of that name.
    """
    if unit.part == "speed":
        return _speed(half, unit)
    split = half.rows(unit)
    if unit.part == "before":
        assert before is not None
        return Run(unit, {BEFORE: _of_checkout(before, half, split)}, split.numbers, {})
    router, seconds = _fitted(split, half.encoder)
    if unit.part == "llmrouter":
        assert llmrouter is not None
        return Run(unit, _beside_llmrouter(router, split, llmrouter, report), split.numbers, {})
    results, facts = learned(router, split)
    curves: dict[str, Curve] = {STATIC: _static(split)}
    if unit.part == "kind":
        results[STATIC_AT_COST] = _static_at(split, results[OURS][1].mean(1))
        results[STATIC_PACED] = _static_paced(split)
    else:
        report("neighbours")
        curves[KNN], facts["k"] = tuned(neighbours, NEIGHBOURS, split)
    if unit.part == "split" and baselines:
        curves |= _baselines(split, router, report)
    results |= {name: _arrays(curve, len(split.test)) for name, curve in curves.items()}
    facts |= seconds | {"train": len(split.train), "test": len(split.test)}
    return Run(unit, results, split.numbers, facts)


def _speed(half: Half, unit: Unit) -> Run:
    """Seconds of a fit on the whole table, whose embeddings are kept, and of choices for some questions."""
    matrix = read_half(half.folder, half.name, "both").matrix
    half.encoder(without_shared(matrix.texts))
    wall, cpu = time.perf_counter(), time.process_time()
    router = fit(matrix, half.encoder)
    facts = {"fit_wall_seconds": time.perf_counter() - wall, "fit_cpu_seconds": time.process_time() - cpu}
    return Run(unit, {}, np.arange(0), facts | speed(router, matrix))


def _fitted(split: Split, encoder: Encoder) -> tuple[RTRRouter, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    router = fit(split.train, encoder, settings=RTRSettings(seed=split.seed))
    return router, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def learned(router: RTRRouter, split: Split) -> tuple[dict[str, tuple[Array, Array]], dict[str, Any]]:
    """Results of the learned router by predictions alone and paced, and its figures."""
    prediction = router.predict_texts(split.test.texts)
    correct, cost, _ = column_outcomes(router, split.test)
    rows = np.arange(len(correct))
    alone, paced = [], []
    tensors = prediction.accuracy, prediction.cost, router.cost_deviation(prediction)
    expected = tuple(np.asarray(each.double()) for each in tensors)
    for budget in split.budgets:
        chosen = router.choose_within(prediction, planned(budget)).numpy()
        alone.append((correct[rows, chosen], cost[rows, chosen]))
        paced.append(_paced(expected, (correct, cost), budget))
    best = best_single_pairs(split.test)[0]
    accuracy, dollars = float(split.test.correct[:, best].mean()), float(split.test.cost[:, best].mean())
    swept = [router.choose_columns(prediction, float(weight / dollars)).numpy() for weight in SWEEP]
    enough, nearly = (cost_to_reach(swept, correct, cost, share * accuracy) for share in (1, 0.99))
    facts: dict[str, Any] = {
        "best_single": {"pair": str(split.test.pairs[best]), "accuracy": accuracy, "cost": dollars},
        "cost_at_best": None if enough is None else enough / dollars,
        "cost_at_99_percent": None if nearly is None else nearly / dollars,
        "ece": calibration_error(prediction.accuracy[:, router.pair_columns], _tensor(split.test.correct)),
        "p90": _token_coverage(prediction, split.test),
        "trust": float(prediction.trust.mean()),
        "shares": router.parameters.facts["shares"],
        "plans": len(router.plans) - len(router.pairs),
        "of_trust": router.parameters.facts.get("trust"),
        "forest_gain": router.parameters.facts.get("forest_gain"),
        "sweep": [
            [float(correct[rows, chosen].mean()), float(cost[rows, chosen].mean())] for chosen in swept
        ],
    }
    return {
        OURS: _stacked(alone),
        PACED: _stacked(paced),
        AT_COST: _at_cost(prediction, split, correct, cost),
    }, facts


def _at_cost(prediction: Prediction, split: Split, correct: Array, cost: Array) -> tuple[Array, Array]:
    """Results where the choices really cost the planned budgets, which is known afterwards only."""
    chosen = choices_by_weight(prediction.accuracy.double().numpy(), prediction.cost.double().numpy())
    right = [accuracy_at(chosen, correct, cost, np.array([planned(each)])) for each in split.budgets]
    return np.stack(right), np.tile([[planned(each)] for each in split.budgets], (1, len(correct)))


def _paced(expected: tuple[Array, ...], outcomes: tuple[Array, Array], budget: float) -> tuple[Array, Array]:
    """Results of a batch that real costs correct block by block; a row that is skipped counts as wrong.

    expected: accuracy, dollars and their deviation [Q, M].
    """
    cost = outcomes[1]
    chosen = paced_choices(*expected, cost, budget * len(cost))
    rows, asked = np.arange(len(chosen)), chosen >= 0
    right, spent = (np.where(asked, each[rows, np.maximum(chosen, 0)], 0.0) for each in outcomes)
    return right, spent


def _baselines(split: Split, router: RTRRouter, report: Report) -> dict[str, Curve]:
    """All baselines but the static mixture and the nearest neighbours."""
    report("logistic regressions")
    curves = {
        "random pairs": random_pairs(split),
        "logistic, one a pair": tuned(logistic, PENALTIES, split)[0],
    }
    report("forest")
    curves["forest, tuned"] = tuned(forest, LEAVES, with_lexical(split))[0]
    columns = router.parameters.columns
    curves["RTR, as the paper"], curves["RTR, tokens priced"], _ = plain_rtr(
        split,
        Descriptions(columns.models, columns.strategies, columns.of_pair),
        router.parameters.prices[:, 1].numpy(),
        report,
    )
    plan = best_cascade(split.train)
    if plan is not None:
        curves["cascade"] = fixed(*cascade(split, plan), split.budgets)
    return curves | {"oracle": oracle(split)}


def _beside_llmrouter(
    router: RTRRouter, split: Split, python: Path, report: Report
) -> dict[str, tuple[Array, Array]]:
    """Results of each of its routers, and of ours planned to cost what was expected of it, each [1, Q]."""
    with tempfile.TemporaryDirectory() as scratch:
        found = routes(python, Path(scratch) / "llmrouter", split, report)
    prediction = router.predict_texts(split.test.texts)
    correct, cost, _ = column_outcomes(router, split.test)
    rows, results = np.arange(len(correct)), {}
    for name, (theirs, expected) in found.items():
        chosen = router.choose_within(prediction, expected).numpy()
        results[name] = _stacked([theirs])
        results[f"{OURS} beside {name}"] = _stacked([(correct[rows, chosen], cost[rows, chosen])])
    return results


def _static(split: Split) -> Curve:
    """The static mixture; the cheapest pair where nothing is as cheap as a budget."""
    cheapest = int(split.train.cost.mean(0).argmin())
    return [
        (split.test.correct[:, cheapest], split.test.cost[:, cheapest]) if each is None else each
        for each in static_hull(split)
    ]


def _static_at(split: Split, spent: Array) -> tuple[Array, Array]:
    """The static mixtures that really cost as much on the test questions, which is known afterwards only.

    spent: dollars a question [budgets]; below the cheapest mixture it is that one.
    """
    train, test = split.train, split.test
    means = train.cost.mean(0)
    found = (
        best_mixture(train.correct, train.cost, each) for each in np.geomspace(means.min(), means.max(), 100)
    )
    shares = np.stack([each for each in found if each is not None])
    real = shares @ test.cost.mean(0)
    results = []
    for each in spent:
        low = int(np.flatnonzero(real <= each).max(initial=0))
        high = min(low + 1, len(shares) - 1)
        part = (
            0.0 if real[high] <= real[low] else np.clip((each - real[low]) / (real[high] - real[low]), 0, 1)
        )
        share = (1 - part) * shares[low] + part * shares[high]
        results.append((test.correct @ share, test.cost @ share))
    return _stacked(results)


def _static_paced(split: Split) -> tuple[Array, Array]:
    """The static mixture in a batch that real costs correct: the training means are expected of all alike."""
    train, test = split.train, split.test
    every = np.ones((len(test), 1))
    expected = tuple(every * each for each in (train.correct.mean(0), train.cost.mean(0), train.cost.std(0)))
    return _stacked([_paced(expected, (test.correct, test.cost), budget) for budget in split.budgets])


def _of_checkout(checkout: Path, half: Half, split: Split) -> tuple[Array, Array]:
    """Results of the learned router of another checkout, in a process of its own."""
    source = SOURCES[half.name]
    with tempfile.TemporaryDirectory() as scratch:
        task, found = Path(scratch) / "task.json", Path(scratch) / "found.npz"
        task.write_text(
            json.dumps(
                {
                    "outcomes": str(half.folder / source.outcomes),
                    "prices": None if source.prices is None else str(half.folder / source.prices),
                    "train": split.train.ids,
                    "test": split.test.ids,
                    "seed": split.seed,
                    "budgets": [planned(budget) for budget in split.budgets],
                    "embeddings": str(half.encoder._cache),
                    "out": str(found),
                }
            ),
            encoding="utf-8",
        )
        worker = Path(__file__).with_name("_router_before.py")
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        subprocess.run([sys.executable, str(worker), str(task)], check=True, env=environment)
        with np.load(found) as stored:
            return stored["correct"], stored["cost"]


def _arrays(curve: Curve, count: int) -> tuple[Array, Array]:
    """Results by budget as arrays [budgets, questions]; NaN where nothing is so cheap."""
    empty = np.full(count, np.nan)
    return _stacked([(empty, empty) if each is None else each for each in curve])


def _stacked(results: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    correct, cost = (np.stack(each).astype(np.float64) for each in zip(*results, strict=True))
    return correct, cost


def _tensor(values: Array) -> Any:
    import torch

    return torch.from_numpy(values).float()
