"""The learned query router beside others on an outcome table: accuracy at a mean budget a question.

30% of the questions are held out, near-duplicates together, for each of --seeds seeds; everything is fitted
on the rest. Beside the learned router (`viaticum.routers.query.fit`): random pairs, the static mixture that
was best on the training outcomes, tuned nearest neighbours, one logistic regression a pair, Route-To-Reason
as in the paper (by tokens, and with priced tokens), a fixed cascade (two cheap pairs; where their answers
differ an expensive one), and the oracle, an upper bound. Each plans with 96% of a budget, and chooses its
operating point from predictions or training outcomes alone, so that test questions may cost more than the
budget: such a point has a star. Intervals, 95%, are of ours minus theirs by a paired bootstrap over
questions, the seeds' results of one question drawn together; they say nothing about another fit. A router
with one operating point is also compared with ours at the cost that was expected of it.

--held-out-datasets: each data set in turn is unknown to the fit, and so are near-duplicates of its questions.
Costs may then miss every budget, so that the gap to the hull (of single pairs, on the very questions) is also
taken at the actual cost. --ablation: each addition left out. --llmrouter: the routers of llmrouter-lib,
installed into a temporary virtual environment (minutes). --speed: milliseconds of one choice, rows a second,
seconds of fitting.

--data FOLDER: four tables of that folder in place of one (`_router_data`), of each the half that everything
is chosen on or, once, the one that is kept aside; splits by seed with all baselines, kinds left out, few
questions. Each part is kept in --work, so that a run that was ended goes on; --minutes ends it. The page is
made of all parts that are there.

    viaticum models pull all-minilm-l6-v2
    python benchmarks/routers.py OUTCOMES --prices PRICES.json [--seeds 3] [--json] [--ablation] ...
    python benchmarks/routers.py --data FOLDER --half choose --work WORK [--page PAGE.md] [--json] ...
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from _baselines import (
    NEIGHBOURS,
    PENALTIES,
    Curve,
    Results,
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
from _plain_rtr import Descriptions, plain_rtr
from _router_data import HALVES, SOURCES
from _router_figures import SCALARS, Evaluated, beyond_hull, means, minus_hull, points, same_cost
from _router_page import figures, page
from _router_runs import run_all
from _router_speed import speed
from _router_tables import show
from _router_units import PARTS

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
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.plans import IndexedPlan
from viaticum.routers.query.rtr import RTRRouter
from viaticum.types import Pair

SHARE = 0.3  # of the questions is held out
OURS = "viaticum"
CASCADE = ("gpt-3.5-turbo+cot", "gpt-3.5-turbo+pot", "gpt-4+faithful-cot")
ABLATIONS: dict[str, dict[str, Any]] = {
    "no logistic regression": {"heads": ("neighbours", "dual", "forest")},
    "no neighbours": {"heads": ("logistic", "dual", "forest")},
    "no dual representation": {"heads": ("logistic", "neighbours", "forest")},
    "no forest": {"heads": ("logistic", "neighbours", "dual")},
    "no loss on the decision": {"decision": 0.0},
    "no calibration": {"calibrate": False},
    "no plans": {"plans": False},
    "no trust": {"trust": False},
    "no correction of spending": {"spend": False},
    "small savings believed": {"savings": False},
}


@dataclass(frozen=True)
class Table:
    """The outcome table, embeddings of its questions [Q, D], and their groups of near-duplicates [Q]."""

    matrix: OutcomeMatrix
    x: Array
    groups: Array
    encoder: Encoder

    def split(self, test: Array, train: Array, seed: int) -> Split:
        """Split by masks; a fifth of the training questions is for tuning."""
        return Split(
            train=self.matrix.select(train),
            test=self.matrix.select(test),
            x_train=self.x[train],
            x_test=self.x[test],
            inner=assign_folds(self.groups[train], 5, seed) == 0,
            numbers=np.flatnonzero(test),
            seed=seed,
        )


def report(text: str) -> None:
    """Replace the progress line on stderr."""
    sys.stderr.write(f"\r{text:<78}")
    sys.stderr.flush()


def report_curve(name: str, line: Sequence[dict[str, Any]]) -> None:
    """Write an interim result to stderr: accuracy and dollars by budget."""
    texts = (
        "-" if point["accuracy"] is None else f"{point['accuracy']:.1%} {point['cost']:.5f}" for point in line
    )
    report("")
    sys.stderr.write(f"\r{name}: {', '.join(texts)}\n")


def fit_split(split: Split, table: Table, settings: RTRSettings, name: str) -> RTRRouter:
    return fit(
        split.train,
        table.encoder,
        settings=settings,
        report=lambda stage, done, total: report(f"{name}: {stage} {done}/{total}"),
    )


def with_settings(router: RTRRouter, **changes: Any) -> RTRRouter:
    """The same router with other settings that only predictions and choices read."""
    parameters = router.parameters
    settings = replace(parameters.settings, **changes)
    return RTRRouter(replace(parameters, settings=settings), router.encoder)


# --- the parts ----------------------------------------------------------------------------------------------


def baselines(
    split: Split, router: RTRRouter, plan: IndexedPlan | None
) -> tuple[dict[str, Curve], dict[str, tuple[Results, float]], dict[str, Any]]:
    """Curves by name, routers with one operating point by name, and the tuned parameters."""
    report(f"seed {split.seed}: neighbours")
    near, k = tuned(neighbours, NEIGHBOURS, split)
    report(f"seed {split.seed}: logistic regressions")
    linear, penalty = tuned(logistic, PENALTIES, split)
    columns = router.parameters.columns
    by_tokens, by_price, epochs = plain_rtr(
        split,
        Descriptions(columns.models, columns.strategies, columns.of_pair),
        router.parameters.prices[:, 1].numpy(),
        lambda text: report(f"seed {split.seed}: {text}"),
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
    singles = {} if plan is None else {"cascade": cascade(split, plan)}
    return curves, singles, {"k": k, "C": penalty, "epochs": epochs}


def fit_seeds(table: Table, seeds: int) -> tuple[list[Split], list[RTRRouter]]:
    """The splits of the first table and the routers fitted on them."""
    splits, routers = [], []
    for seed in range(seeds):
        test = held_out(table.groups, SHARE, seed)
        splits.append(table.split(test, ~test, seed))
        routers.append(fit_split(splits[-1], table, RTRSettings(seed=seed), f"seed {seed}"))
    return splits, routers


def in_distribution(
    splits: Sequence[Split],
    routers: Sequence[RTRRouter],
    plan: IndexedPlan | None,
    python: Path | None,
    scratch: Path,
) -> dict[str, Any]:
    """The first table: the learned router and all baselines on every seed's test questions."""
    own, facts, parameters = [], [], []
    curves: dict[str, list[Curve]] = {}
    singles: dict[str, list[tuple[Results, float]]] = {}
    for split, router in zip(splits, routers, strict=True):
        own.append(Evaluated.on(router, split))
        facts.append(evaluate(router, split.test, seed=split.seed))
        report_curve(f"seed {split.seed}", points([own[-1].curve()], None, [split]))
        split_curves, split_singles, tuned_parameters = baselines(split, router, plan)
        if python is not None:
            split_singles |= routes(python, scratch / f"seed{split.seed}", split, report)
        parameters.append(tuned_parameters)
        for name, curve in split_curves.items():
            curves.setdefault(name, []).append(curve)
        for name, single in split_singles.items():
            singles.setdefault(name, []).append(single)
            curves.setdefault(name, []).append(fixed(*single))
    own_curves = [each.curve() for each in own]
    return {
        "seeds": len(splits),
        "questions": [len(split.test) for split in splits],
        "rows_fitted": [int((~np.isnan(split.train.correct)).sum()) for split in splits],
        "routers": {OURS: points(own_curves, None, splits)}
        | {name: points(each, own_curves, splits) for name, each in curves.items()},
        "same_cost": {name: same_cost(each, own, splits) for name, each in singles.items()},
        "summary": means(facts),
        "by_seed": [{name: each[name] for name in (*SCALARS, "best_single")} for each in facts],
        "fits": [router.parameters.facts for router in routers],
        "tuned": parameters,
    }


def ablation(table: Table, splits: Sequence[Split], routers: Sequence[RTRRouter]) -> dict[str, Any]:
    """Each addition left out: fitted again, except for those that only predictions and choices read."""
    complete = [Evaluated.on(router, split).curve() for router, split in zip(routers, splits, strict=True)]
    facts = [evaluate(router, split.test) for router, split in zip(routers, splits, strict=True)]
    result: dict[str, dict[str, Any]] = {
        "all": {"points": points(complete, None, splits), "summary": means(facts)}
    }
    for name, changes in ABLATIONS.items():
        curves, facts = [], []
        for router, split in zip(routers, splits, strict=True):
            if set(changes) <= {"trust", "spend", "savings"}:
                other = with_settings(router, **changes)
            else:
                settings = RTRSettings(seed=split.seed, **changes)
                other = fit_split(split, table, settings, f"{name}, seed {split.seed}")
            curves.append(Evaluated.on(other, split).curve())
            facts.append(evaluate(other, split.test))
        result[name] = {"points": points(curves, complete, splits), "summary": means(facts)}
        report_curve(name, result[name]["points"])
    return result


def unseen_dataset(table: Table, name: str) -> dict[str, Any]:
    """A data set that the fit does not know, nor near-duplicates of its questions."""
    test = table.matrix.datasets == name
    duplicates = np.isin(table.groups, table.groups[test]) & ~test
    split = table.split(test, ~test & ~duplicates, 0)
    router = fit_split(split, table, RTRSettings(), f"without {name}")
    own = Evaluated.on(router, split)
    no_trust = Evaluated.on(with_settings(router, trust=False), split)
    facts = evaluate(router, split.test)
    near, static = tuned(neighbours, NEIGHBOURS, split)[0], static_hull(split)
    lines = []
    for index, budget in enumerate(BUDGETS):
        ours = own.at(planned(budget))
        lines.append(
            {
                "budget": budget,
                "hull": facts["hull"][index]["accuracy"],
                "ours": beyond_hull(split, ours),
                "ours_minus_hull_at_budget": minus_hull(split, ours, budget),
                "no_trust": beyond_hull(split, no_trust.at(planned(budget))),
                "static": beyond_hull(split, static[index]),
                "neighbours": beyond_hull(split, near[index]),
            }
        )
    report_curve(f"without {name}", points([own.curve()], None, [split]))
    return {
        "dataset": name,
        "questions": len(split.test),
        "fitted_on": len(split.train),
        "near_duplicates_left_out": int(duplicates.sum()),
        "points": lines,
        "summary": means([facts]),
    }


def cascade_plan(matrix: OutcomeMatrix, names: Sequence[str]) -> IndexedPlan | None:
    """The cascade by indices of pairs; None where the table lacks one of its default pairs."""
    numbers = {pair: number for number, pair in enumerate(matrix.pairs)}
    pairs = [Pair.parse(name) for name in names]
    if len(pairs) == 3 and all(pair in numbers for pair in pairs):
        return tuple(numbers[pair] for pair in pairs), 2
    if tuple(names) != CASCADE:
        raise InputError(f"--cascade wants three pairs of the table, got {', '.join(names)}")
    return None


def conditions(table: Table) -> dict[str, Any]:
    return {
        "questions": len(table.matrix),
        "pairs": len(table.matrix.pairs),
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outcomes", type=Path, nargs="?", help="an outcome table: JSONL or Parquet")
    parser.add_argument("--prices", type=Path, help="dollars a million tokens of each model")
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
    parser.add_argument("--data", type=Path, help="the folder of the four tables, in place of OUTCOMES")
    parser.add_argument("--half", choices=HALVES, default="choose", help="which half of their questions")
    parser.add_argument("--tables", nargs="+", choices=SOURCES, default=list(SOURCES), help="which of them")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:3], help="which parts")
    parser.add_argument("--work", type=Path, default=Path("routers-work"), help="where parts are kept")
    parser.add_argument("--minutes", type=float, help="begin no part after so long")
    parser.add_argument("--before", type=Path, help="a checkout whose router is compared, for --parts before")
    parser.add_argument("--page", type=Path, help="write the page to this file too")
    arguments = parser.parse_args()
    if (arguments.data is None) == (arguments.outcomes is None):
        parser.error("either OUTCOMES with --prices, or --data FOLDER")
    if arguments.outcomes is not None and arguments.prices is None:
        parser.error("OUTCOMES needs --prices")
    if "before" in arguments.parts and arguments.before is None:
        parser.error("--parts before needs --before CHECKOUT")
    if arguments.seeds < 1:
        parser.error("--seeds is 1 or more")
    if arguments.llmrouter_python and not (arguments.llmrouter or "llmrouter" in arguments.parts):
        parser.error("--llmrouter-python goes with --llmrouter or --parts llmrouter")
    if arguments.no_baselines and arguments.llmrouter:
        parser.error("--llmrouter adds to the first table, which --no-baselines leaves out")
    return arguments


def read_table(arguments: argparse.Namespace) -> Table:
    """The questions that every pair was asked, with embeddings."""
    matrix = OutcomeMatrix.from_outcomes(read_outcomes(arguments.outcomes), read_prices(arguments.prices))
    matrix = matrix.select(matrix.complete)
    encoder = Encoder(cache=arguments.embeddings or "")
    x = encoder(matrix.texts, lambda done, total: report(f"questions embedded {done}/{total}")).numpy()
    return Table(matrix, x, near_duplicates(matrix.texts), encoder)


def measure(table: Table, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All parts that were asked for."""
    results: dict[str, Any] = {"conditions": conditions(table)}
    splits: list[Split] = []
    routers: list[RTRRouter] = []
    if not arguments.no_baselines or arguments.ablation or arguments.speed:
        splits, routers = fit_seeds(table, arguments.seeds)
    if not arguments.no_baselines:
        plan = cascade_plan(table.matrix, arguments.cascade)
        python = arguments.llmrouter_python
        if arguments.llmrouter and python is None:
            python = install(scratch / "venv", report)
        results["in_distribution"] = in_distribution(splits, routers, plan, python, scratch)
    if arguments.held_out_datasets:
        datasets = np.unique(table.matrix.datasets)
        results["held_out_datasets"] = [unseen_dataset(table, str(name)) for name in datasets]
    if arguments.ablation:
        results["ablation"] = ablation(table, splits, routers)
    if arguments.speed:
        results["speed"] = speed(routers[0], splits[0].test)
    return results


def report_halves(arguments: argparse.Namespace) -> None:
    """Compute what is missing of `--data`, and print the page."""
    with tempfile.TemporaryDirectory() as scratch:
        if "llmrouter" in arguments.parts and arguments.llmrouter_python is None:
            arguments.llmrouter_python = install(Path(scratch) / "venv", report)
        runs = run_all(arguments)
    found = figures(runs, {name: source.budgets for name, source in SOURCES.items()})
    texts = f"half {arguments.half}, torch {torch.__version__}, {torch.get_num_threads()} threads of "
    texts += f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {1 - MARGIN:.0%} of a budget planned"
    text = page(found, texts)
    if arguments.page is not None:
        arguments.page.write_text(f"{text}\n", encoding="utf-8")
    print(json.dumps(found) if arguments.json else text)


def main() -> None:
    arguments = parse_arguments()
    if arguments.data is not None:
        report_halves(arguments)
        return
    table = read_table(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(table, arguments, Path(scratch))
    report("")
    sys.stderr.write("\r")
    if arguments.json:
        print(json.dumps(results))
    else:
        show(results)


if __name__ == "__main__":
    main()
