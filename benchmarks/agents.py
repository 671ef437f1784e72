"""Agentic tasks: which model gets a task, and what "cheap first, dear where it failed" is worth.

    viaticum models pull all-minilm-l6-v2
    python benchmarks/agents.py RUNS.parquet

RUNS is an outcome table of whole runs, one a task and model, with a column `bench`. Each bench with 14 tasks
or more is left out in turn: all is chosen and fitted on other tasks, without near-duplicates of its own, and
judged on it. "shuffled" holds out a fifth of all tasks at a time instead, near-duplicates
together. Pooled lines count each held-out task once a way of holding out.

- single models: each, and the one that solved most of the training tasks ("best single").
- cascade: up to --depth models one after the other, each paid, until a run passes the task's own check, which
  is taken to be known after the run, as tests of a repository are. Of all sequences the training tasks choose
  the cheapest one that solves as many as the best single model ("as many"), and the one that solves most at
  no more than its cost ("as cheap").
- router: `viaticum.routers.query.fit` on the texts of the tasks, policies `within:0.01` and `best`.
- mixture: single models by lot, the most accurate ones at the router's cost by the training tasks.
- oracle: the cheapest model that solves the task, else the cheapest; an upper bound.

Intervals, 95%, are a bootstrap over tasks; differences to the best single model are paired. What routing each
step of a run would save cannot be read from whole runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from viaticum.errors import DataError, InputError
from viaticum.outcomes import outcome_rows, parse_outcome
from viaticum.routers.query import as_policy, choose
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.evaluate import best_mixture, paired_bootstrap
from viaticum.routers.query.fit import fit
from viaticum.routers.query.outcome_matrix import Array, OutcomeMatrix, assign_folds, near_duplicates
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.rtr import RTRRouter
from viaticum.types import Query

LEAST_TASKS = 14  # of a bench that is left out
FOLDS = 5
SHUFFLED = "shuffled"


@dataclass(frozen=True)
class Way:
    """What a way of choosing models did on held-out tasks: solved and dollars, each [Q]; what it chose."""

    solved: Array
    dollars: Array
    choice: str = ""


def cascade_outcomes(matrix: OutcomeMatrix, sequence: Sequence[int]) -> Way:
    """Models one after the other until the task is solved."""
    solved, dollars = np.zeros(len(matrix)), np.zeros(len(matrix))
    for model in sequence:
        dollars += matrix.cost[:, model] * (1 - solved)
        solved = np.maximum(solved, matrix.correct[:, model])
    return Way(solved, dollars, " > ".join(matrix.pairs[model].model for model in sequence))


def choose_cascades(train: OutcomeMatrix, best: int, depth: int) -> dict[str, tuple[int, ...]]:
    """The two cascades that the training tasks choose."""
    aim, price = train.correct[:, best].mean(), train.cost[:, best].mean()
    tried = {
        sequence: (float(way.solved.mean()), float(way.dollars.mean()))
        for length in range(1, depth + 1)
        for sequence in itertools.permutations(range(len(train.pairs)), length)
        for way in [cascade_outcomes(train, sequence)]
    }
    enough = [sequence for sequence, (solved, _) in tried.items() if solved >= aim]
    cheap = [sequence for sequence, (_, dollars) in tried.items() if dollars <= price]
    return {
        "cascade, as many": min(enough, key=lambda each: (tried[each][1], each)),
        "cascade, as cheap": max(cheap, key=lambda each: (tried[each][0], -tried[each][1], each)),
    }


def routed(router: RTRRouter, matrix: OutcomeMatrix, policy: str) -> Way:
    """Each task to the model that the router chooses; plans of several models count as what they do."""
    numbers = {pair: number for number, pair in enumerate(matrix.pairs)}
    rows = range(len(matrix))
    chosen = np.array(
        [numbers[choose(router.table(Query(text)), None, as_policy(policy)).pair] for text in matrix.texts]
    )
    return Way(matrix.correct[rows, chosen], matrix.cost[rows, chosen])


def held_out(matrix: OutcomeMatrix, benches: Array, seed: int) -> Iterator[tuple[str, Array, Array]]:
    """Name, test mask and training mask of each way of holding tasks out."""
    groups = near_duplicates(matrix.texts)
    for bench in np.unique(benches):
        test = benches == bench
        if test.sum() >= LEAST_TASKS:
            yield str(bench), test, ~np.isin(groups, groups[test])
    folds = assign_folds(groups, FOLDS, seed)
    for fold in range(FOLDS):
        yield SHUFFLED, folds == fold, folds != fold


def ways_on(
    train: OutcomeMatrix, test: OutcomeMatrix, encoder: Encoder, depth: int, seed: int
) -> dict[str, Way]:
    """All ways on one held-out part; everything is chosen on the training tasks."""
    rows = np.arange(len(test))
    solved, dollars = train.correct.mean(0), train.cost.mean(0)
    best = min(range(len(train.pairs)), key=lambda model: (-solved[model], dollars[model]))
    ways = {
        pair.model: Way(test.correct[:, model], test.cost[:, model]) for model, pair in enumerate(test.pairs)
    }
    ways["best single"] = Way(test.correct[:, best], test.cost[:, best], test.pairs[best].model)
    for name, sequence in choose_cascades(train, best, depth).items():
        ways[name] = cascade_outcomes(test, sequence)
    router = fit(train, encoder, settings=RTRSettings(plans=False, seed=seed))
    for policy in ("within:0.01", "best"):
        ways[f"router, {policy}"] = routed(router, test, policy)
    price = float(ways["router, within:0.01"].dollars.mean())
    shares = best_mixture(train.correct, train.cost, price)
    if shares is not None:
        ways["mixture at the router's cost"] = Way(test.correct @ shares, test.cost @ shares)
    cheapest = np.where(test.correct > 0, test.cost, np.inf).argmin(1)
    nobody = test.correct.max(1) == 0
    cheapest[nobody] = test.cost[nobody].argmin(1)
    ways["oracle"] = Way(test.correct[rows, cheapest], test.cost[rows, cheapest])
    return ways


def summary(ways: Sequence[dict[str, Way]], name: str, seed: int) -> dict[str, Any]:
    """Figures of one way over some held-out parts, and its paired difference to the best single model."""
    parts = [(each[name], each["best single"]) for each in ways if name in each]
    solved, dollars = (
        np.concatenate([getattr(own, field) for own, _ in parts]) for field in ("solved", "dollars")
    )
    singles = np.concatenate([best.solved for _, best in parts])
    paid = np.concatenate([best.dollars for _, best in parts])
    share = paired_bootstrap(solved, seed=seed)
    cost = paired_bootstrap(dollars, seed=seed)
    return {
        "way": name,
        "tasks": len(solved),
        "solved": share["difference"],
        "solved_interval": [share["low"], share["high"]],
        "dollars": cost["difference"],
        "dollars_interval": [cost["low"], cost["high"]],
        "minus_best_single": paired_bootstrap(solved - singles, seed=seed),
        "dollars_minus_best_single": paired_bootstrap(dollars - paid, seed=seed),
        "chosen": sorted({own.choice for own, _ in parts if own.choice}),
    }


def read_runs(path: Path) -> tuple[OutcomeMatrix, Array]:
    """The table, and the bench of each task. Raises `DataError` without the column `bench`."""
    rows = list(outcome_rows(path))
    if not rows or "bench" not in rows[0][1]:
        raise DataError(f"{path} has no column bench, by which tasks are left out")
    matrix = OutcomeMatrix.from_outcomes([parse_outcome(row, source) for source, row in rows])
    bench = {row["question"]: row["bench"] for _, row in rows}
    return matrix, np.array([bench[text] for text in matrix.texts])


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print one table a way of holding out."""
    console = Console(width=None if sys.stdout.isatty() else 118)
    for part, lines in results.items():
        table = Table(title=f"{part}: {lines[0]['tasks']} tasks held out", title_justify="left", box=None)
        for heading in ("", "solved", "$ a task", "solved - best single", "$ - best single"):
            table.add_column(heading, justify="left" if not heading else "right", no_wrap=bool(heading))
        for line in lines:
            more, paid = line["minus_best_single"], line["dollars_minus_best_single"]
            low, high = line["solved_interval"]
            chosen = f" ({'; '.join(line['chosen'])})" if len(line["chosen"]) == 1 else ""
            table.add_row(
                line["way"] + chosen,
                f"{line['solved']:.1%} [{low:.1%}, {high:.1%}]",
                f"{line['dollars']:.3f}",
                f"{more['difference']:+.1%} [{more['low']:+.1%}, {more['high']:+.1%}]",
                f"{paid['difference']:+.3f} [{paid['low']:+.3f}, {paid['high']:+.3f}]",
            )
        console.print(table, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--depth", type=int, default=3, help="models of a cascade at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.depth < 1:
        raise InputError("a cascade has at least one model")
    matrix, benches = read_runs(options.runs)
    encoder = Encoder()
    parts: dict[str, list[dict[str, Way]]] = {}
    for name, test, train in held_out(matrix, benches, options.seed):
        sys.stderr.write(f"{name}: {test.sum()} tasks, fitted on {train.sum()}\n")
        ways = ways_on(matrix.select(train), matrix.select(test), encoder, options.depth, options.seed)
        parts.setdefault(name, []).append(ways)
    left_out = [each for name, ways in parts.items() if name != SHUFFLED for each in ways]
    parts = {"each bench left out": left_out, **parts}
    results = {part: [summary(ways, name, options.seed) for name in ways[0]] for part, ways in parts.items()}
    if options.json:
        print(json.dumps(results, indent=1))
        return
    print(
        f"{options.runs.name}: {len(matrix)} tasks, {len(matrix.pairs)} models; Python "
        f"{platform.python_version()}, torch {torch.__version__}, seed {options.seed}\n"
    )
    show(results)


if __name__ == "__main__":
    main()
