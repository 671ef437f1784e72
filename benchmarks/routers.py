"""The learned query router beside others, on an outcome table: what accuracy each buys at a mean budget a question.

30% of the questions are held out, near-duplicates together, for each of --seeds seeds; everything is fitted on the
rest. Beside the learned router (`viaticum.routers.query.fit`): random pairs, the static mixture that was best on the
training outcomes, tuned nearest neighbours, one logistic regression a pair, Route-To-Reason as the paper has it (by
tokens, and with its tokens priced), a fixed cascade (two cheap pairs; where their answers differ a dear one), and the
oracle, which nobody can have. Each plans with 96% of a budget, and chooses its operating point from predictions or
training outcomes alone, so that held-out questions may cost more than the budget: such a point has a star. Intervals,
95%, are of ours minus theirs by a paired bootstrap over questions, the seeds' results of one question drawn together;
they say nothing of how another fit would have come out. A router with one operating point is also compared with ours
at the cost that it was expected to have.

--held-out-datasets: each data set in turn is unknown to the fit, and so are near-duplicates of its questions. Costs may
then be beside every budget; so the gap to the hull (of single pairs, on the very questions asked) is taken at the cost
that was really spent, too. --ablation: each addition left out. --llmrouter: llmrouter-lib's routers, installed into a
virtual environment that is thrown away (minutes). --speed: milliseconds of one choice, rows a second, seconds of fitting.

    viaticum models pull all-minilm-l6-v2
    python benchmarks/routers.py OUTCOMES --prices PRICES.json [--seeds 3] [--json] [--ablation] [--llmrouter] ...
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from _baselines import (
    NEIGHBOURS,
    PENALTIES,
    Curve,
    Played,
    Split,
    cascade,
    fixed,
    logistic,
    neighbours,
    oracle,
    planned,
    random_pairs,
    static_hull,
    tuned,
)
from _llmrouter import install, routes
from _plain_rtr import Told, plain_rtr
from _router_figures import SCALARS, Ours, beyond_hull, means, minus_hull, points, same_cost
from _router_speed import speed
from _router_tables import show

from viaticum.errors import InputError
from viaticum.outcomes import read_outcomes
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.evaluate import BUDGETS, MARGIN, evaluate
from viaticum.routers.query.fit import fit
from viaticum.routers.query.outcome_matrix import (
    Array,
    OutcomeMatrix,
    assign_folds,
    held_out,
    near_duplicates,
    read_prices,
)
from viaticum.routers.query.plans import Steps
from viaticum.routers.query.rtr import RTRRouter, RTRSettings
from viaticum.types import Pair

SHARE = 0.3  # of the questions is held out
OURS = "viaticum"
CASCADE = ("gpt-3.5-turbo+cot", "gpt-3.5-turbo+pot", "gpt-4+faithful-cot")
WITHOUT: dict[str, dict[str, Any]] = {
    "no logistic regression": {"heads": ("neighbours", "dual")},
    "no neighbours": {"heads": ("logistic", "dual")},
    "no dual representation": {"heads": ("logistic", "neighbours")},
    "no loss on the decision": {"decision": 0.0},
    "no calibration": {"calibrate": False},
    "no plans": {"plans": False},
    "no trust": {"trust": False},
    "no correction of spending": {"spend": False},
}


@dataclass(frozen=True)
class Table:
    """The outcome table, and what is known of its questions: embeddings [Q, D], groups of near-duplicates [Q]."""

    grid: OutcomeMatrix
    x: Array
    groups: Array
    encoder: Encoder

    def split(self, test: Array, train: Array, seed: int) -> Split:
        inner = assign_folds(self.groups[train], 5, seed) == 0
        return Split(
            self.grid.select(train),
            self.grid.select(test),
            self.x[train],
            self.x[test],
            inner,
            np.flatnonzero(test),
            seed,
        )


def say(text: str) -> None:
    sys.stderr.write(f"\r{text:<78}")
    sys.stderr.flush()


def tell(name: str, line: Sequence[dict[str, Any]]) -> None:
    """An interim result of a long run, accuracy and dollars by budget."""
    told = (
        "-" if point["accuracy"] is None else f"{point['accuracy']:.1%} {point['cost']:.5f}" for point in line
    )
    say("")
    sys.stderr.write(f"\r{name}: {', '.join(told)}\n")


def fitted(split: Split, table: Table, settings: RTRSettings, name: str) -> RTRRouter:
    return fit(
        split.train,
        table.encoder,
        settings=settings,
        report=lambda stage, done, of: say(f"{name}: {stage} {done}/{of}"),
    )


def without(router: RTRRouter, **changes: Any) -> RTRRouter:
    """The same router with settings that only predictions and choices look at."""
    from dataclasses import replace

    learned = router.learned
    return RTRRouter(replace(learned, settings=replace(learned.settings, **changes)), router.encoder)


# --- the parts ----------------------------------------------------------------------------------------------------


def baselines(
    split: Split, router: RTRRouter, steps: Steps | None
) -> tuple[dict[str, Curve], dict[str, tuple[Played, float]], dict[str, Any]]:
    """Curves by name, routers with one operating point by name, and what tuning chose."""
    say(f"seed {split.seed}: neighbours")
    near, k = tuned(neighbours, NEIGHBOURS, split)
    say(f"seed {split.seed}: logistic regressions")
    linear, penalty = tuned(logistic, PENALTIES, split)
    columns = router.learned.columns
    by_tokens, by_price, epochs = plain_rtr(
        split,
        Told(columns.models, columns.strategies, columns.of_pair),
        router.learned.rate[:, 1].numpy(),
        lambda text: say(f"seed {split.seed}: {text}"),
    )
    curves = {
        "random pairs": random_pairs(split),
        "static mixture": static_hull(split),
        "neighbours, tuned": near,
        "logistic, one a pair": linear,
        "RTR, as the paper": by_tokens,
        "RTR, tokens priced": by_price,
        "oracle": oracle(split),
    }
    singles = {} if steps is None else {"cascade": cascade(split, steps)}
    return curves, singles, {"k": k, "C": penalty, "epochs": epochs}


def in_distribution(
    table: Table, seeds: int, steps: Steps | None, python: Path | None, scratch: Path
) -> tuple[dict[str, Any], list[Split], list[RTRRouter]]:
    splits, routers, own, facts, chosen = [], [], [], [], []
    curves: dict[str, list[Curve]] = {}
    singles: dict[str, list[tuple[Played, float]]] = {}
    for seed in range(seeds):
        test = held_out(table.groups, SHARE, seed)
        split = table.split(test, ~test, seed)
        router = fitted(split, table, RTRSettings(seed=seed), f"seed {seed}")
        splits.append(split)
        routers.append(router)
        own.append(Ours.on(router, split))
        facts.append(evaluate(router, split.test, seed=seed))
        theirs, points_of, knobs = baselines(split, router, steps)
        if python is not None:
            points_of |= routes(python, scratch / f"seed{seed}", split, say)
        chosen.append(knobs)
        tell(f"seed {seed}", points([own[-1].curve()], None, [split]))
        for name, curve in theirs.items():
            curves.setdefault(name, []).append(curve)
        for name, single in points_of.items():
            singles.setdefault(name, []).append(single)
            curves.setdefault(name, []).append(fixed(*single))
    mine = [each.curve() for each in own]
    return (
        {
            "seeds": seeds,
            "questions": [len(split.test) for split in splits],
            "rows_fitted": [int((~np.isnan(split.train.correct)).sum()) for split in splits],
            "routers": {OURS: points(mine, None, splits)}
            | {name: points(each, mine, splits) for name, each in curves.items()},
            "same_cost": {name: same_cost(each, own, splits) for name, each in singles.items()},
            "summary": means(facts),
            "by_seed": [{name: each[name] for name in (*SCALARS, "best_single")} for each in facts],
            "fits": [router.learned.facts for router in routers],
            "tuned": chosen,
        },
        splits,
        routers,
    )


def ablation(table: Table, splits: Sequence[Split], routers: Sequence[RTRRouter]) -> dict[str, Any]:
    """Each addition left out: fitted again, but for those that only predictions look at."""
    whole = [Ours.on(router, split).curve() for router, split in zip(routers, splits, strict=True)]
    facts = [evaluate(router, split.test) for router, split in zip(routers, splits, strict=True)]
    found: dict[str, dict[str, Any]] = {
        "all": {"points": points(whole, None, splits), "summary": means(facts)}
    }
    for name, changes in WITHOUT.items():
        curves, facts = [], []
        for router, split in zip(routers, splits, strict=True):
            if set(changes) <= {"trust", "spend"}:
                other = without(router, **changes)
            else:
                other = fitted(
                    split, table, RTRSettings(seed=split.seed, **changes), f"{name}, seed {split.seed}"
                )
            curves.append(Ours.on(other, split).curve())
            facts.append(evaluate(other, split.test))
        found[name] = {"points": points(curves, whole, splits), "summary": means(facts)}
        tell(name, found[name]["points"])
    return found


def unseen_dataset(table: Table, name: str) -> dict[str, Any]:
    test = table.grid.datasets == name
    kin = np.isin(table.groups, table.groups[test]) & ~test
    split = table.split(test, ~test & ~kin, 0)
    router = fitted(split, table, RTRSettings(), f"without {name}")
    own, blind = Ours.on(router, split), Ours.on(without(router, trust=False), split)
    facts = evaluate(router, split.test)
    near = tuned(neighbours, NEIGHBOURS, split)[0]
    lines = []
    for place, budget in enumerate(BUDGETS):
        ours = own.at(planned(budget))
        lines.append(
            {
                "budget": budget,
                "hull": facts["hull"][place]["accuracy"],
                "ours": beyond_hull(split, ours),
                "ours_minus_hull_at_budget": minus_hull(split, ours, budget),
                "no_trust": beyond_hull(split, blind.at(planned(budget))),
                "static": beyond_hull(split, static_hull(split)[place]),
                "neighbours": beyond_hull(split, near[place]),
            }
        )
    tell(f"without {name}", points([own.curve()], None, [split]))
    return {
        "dataset": name,
        "questions": len(split.test),
        "fitted_on": len(split.train),
        "near_duplicates_left_out": int(kin.sum()),
        "points": lines,
        "summary": means([facts]),
    }


def cascade_steps(grid: OutcomeMatrix, names: Sequence[str]) -> Steps | None:
    """The cascade by numbers of pairs; None where the table leaves out one of its default pairs."""
    numbers = {pair: number for number, pair in enumerate(grid.pairs)}
    pairs = [Pair.parse(name) for name in names]
    if len(pairs) == 3 and all(pair in numbers for pair in pairs):
        return tuple(numbers[pair] for pair in pairs), 2
    if tuple(names) != CASCADE:
        raise InputError(f"--cascade wants three pairs of the table, got {', '.join(names)}")
    return None


def conditions(table: Table) -> dict[str, Any]:
    return {
        "questions": len(table.grid),
        "pairs": len(table.grid.pairs),
        "groups": int(table.groups.max()) + 1,
        "planned": f"{1 - MARGIN:.0%} of a budget",
        "encoder": table.encoder.name,
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "machine": platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outcomes", type=Path, help="an outcome table: JSONL or Parquet")
    parser.add_argument("--prices", type=Path, required=True, help="dollars a million tokens of each model")
    parser.add_argument("--seeds", type=int, default=3, help="splits (default 3)")
    parser.add_argument(
        "--cascade", nargs=3, default=CASCADE, metavar="PAIR", help="two that may agree, and a third"
    )
    parser.add_argument("--ablation", action="store_true", help="also: each addition left out")
    parser.add_argument(
        "--held-out-datasets", action="store_true", help="also: each data set unknown to the fit"
    )
    parser.add_argument("--llmrouter", action="store_true", help="also: the routers of llmrouter-lib")
    parser.add_argument(
        "--llmrouter-python", type=Path, help="an environment that has llmrouter-lib already, for --llmrouter"
    )
    parser.add_argument("--speed", action="store_true", help="also: how long a choice and a fit take")
    parser.add_argument("--no-baselines", action="store_true", help="leave the first table out")
    parser.add_argument(
        "--embeddings", type=Path, help="the cache of embeddings (default: that of the framework)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds is 1 or more")
    if arguments.llmrouter_python and not arguments.llmrouter:
        parser.error("--llmrouter-python goes with --llmrouter")
    if arguments.no_baselines and arguments.llmrouter:
        parser.error("--llmrouter adds to the first table, which --no-baselines leaves out")

    grid = OutcomeMatrix.from_outcomes(read_outcomes(arguments.outcomes), read_prices(arguments.prices))
    grid = grid.select(grid.complete)
    encoder = Encoder(cache=arguments.embeddings or "")
    x = encoder(grid.texts, lambda done, of: say(f"questions embedded {done}/{of}")).numpy()
    table = Table(grid, x, near_duplicates(grid.texts), encoder)
    results: dict[str, Any] = {"conditions": conditions(table)}
    with tempfile.TemporaryDirectory() as scratch:
        if not arguments.no_baselines:
            python = arguments.llmrouter_python
            if arguments.llmrouter and python is None:
                python = install(Path(scratch) / "venv", say)
            steps = cascade_steps(grid, arguments.cascade)
            results["in_distribution"], splits, routers = in_distribution(
                table, arguments.seeds, steps, python, Path(scratch)
            )
        elif arguments.ablation or arguments.speed:
            splits, routers = fit_seeds(table, arguments.seeds)
    if arguments.held_out_datasets:
        results["held_out_datasets"] = [unseen_dataset(table, str(name)) for name in np.unique(grid.datasets)]
    if arguments.ablation:
        results["ablation"] = ablation(table, splits, routers)
    if arguments.speed:
        results["speed"] = speed(routers[0], splits[0].test)
    say("")
    sys.stderr.write("\r")
    if arguments.json:
        print(json.dumps(results))
    else:
        show(results)


def fit_seeds(table: Table, seeds: int) -> tuple[list[Split], list[RTRRouter]]:
    """The splits of the first table and the routers fitted on them, nothing else."""
    splits, routers = [], []
    for seed in range(seeds):
        test = held_out(table.groups, SHARE, seed)
        splits.append(table.split(test, ~test, seed))
        routers.append(fitted(splits[-1], table, RTRSettings(seed=seed), f"seed {seed}"))
    return splits, routers


if __name__ == "__main__":
    main()
