"""A model that was never profiled: how well a router foretells it from its name, and from 20, 50 and 100 outcomes.

Each model of an outcome table is held out in turn. A router is fitted on the others; then `viaticum router add` is done for
every pair of that model, with so many outcomes of training questions, and its chances on held-out questions are
compared with (a) the share of right answers among the same outcomes, and (b) a router fitted with the model.
Prints mean negative log-likelihood in nats (less is better), over pairs and models; near-duplicates never on both sides.

    python benchmarks/router_add.py OUTCOMES [--prices PRICES.json] [--models 2] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

from viaticum.outcomes import read_outcomes
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.fit import fit
from viaticum.routers.query.heads import log_loss, log_odds
from viaticum.routers.query.learn import add
from viaticum.routers.query.outcome_matrix import OutcomeMatrix, held_out, near_duplicates, read_prices
from viaticum.routers.query.rtr import RTRRouter, RTRSettings

COUNTS = (0, 20, 50, 100)


def columns_of(router: RTRRouter, test: OutcomeMatrix, model: str) -> float:
    """Negative log-likelihood of the model's pairs on held-out questions."""
    told = router.predict_texts(test.texts).accuracy
    losses = []
    for place, pair in zip(router.pair_columns, router.pairs, strict=True):
        if pair.model == model:
            right = torch.from_numpy(test.correct[:, test.pairs.index(pair)]).float()
            losses.append(log_loss(log_odds(told[:, place]), right))
    return statistics.mean(losses)


def without(grid: OutcomeMatrix, model: str) -> OutcomeMatrix:
    """The grid less a model's pairs."""
    kept = [n for n, pair in enumerate(grid.pairs) if pair.model != model]
    arrays = ("correct", "tokens", "cost", "cut", "answers")
    return OutcomeMatrix(
        tuple(grid.pairs[n] for n in kept),
        grid.ids,
        grid.texts,
        *(getattr(grid, name)[:, kept] for name in arrays),
    )


def measure(grid: OutcomeMatrix, models: list[str], encoder: Encoder) -> dict[str, dict[str, float]]:
    out = held_out(near_duplicates(grid.texts), 0.3, seed=0)
    train, test = grid.select(~out), grid.select(out)
    whole = fit(train, encoder, settings=RTRSettings(plans=False))
    found: dict[str, dict[str, float]] = {}
    for model in models:
        sys.stderr.write(f"{model}\n")
        base = fit(without(train, model), encoder, settings=RTRSettings(plans=False))
        told = found.setdefault(model, {"fitted with it": columns_of(whole, test, model)})
        chosen = np.random.default_rng(0).permutation(len(train))
        for count in COUNTS:
            some, router = train.select(chosen[: max(count, 1)]), base
            losses = []
            for column, pair in enumerate(grid.pairs):
                if pair.model == model:
                    router = add(router, pair, {}, (0.0, 1.0), some if count else None)
                    rate = (np.nansum(some.correct[:, column]) + 1) / (count + 2) if count else 0.5
                    right = torch.from_numpy(test.correct[:, column]).float()
                    losses.append(log_loss(torch.full_like(right, float(np.log(rate / (1 - rate)))), right))
            told[f"added, {count} outcomes"] = columns_of(router, test, model)
            told[f"their mean, {count} outcomes"] = statistics.mean(losses)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outcomes", type=Path)
    parser.add_argument("--prices", type=Path)
    parser.add_argument("--models", type=int, default=99, help="only the last so many models, by name")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prices = read_prices(arguments.prices) if arguments.prices else None
    grid = OutcomeMatrix.from_outcomes(read_outcomes(arguments.outcomes), prices)
    models = sorted({pair.model for pair in grid.pairs})[-arguments.models :]
    found = measure(grid, models, Encoder())
    mean = {
        name: statistics.mean(told[name] for told in found.values()) for name in next(iter(found.values()))
    }
    if arguments.json:
        print(json.dumps({"models": found, "mean": mean, "torch": torch.__version__}))
        return
    for name, value in mean.items():
        print(f"{name}: {value:.4f}")
    print(f"{len(models)} models, {len(grid)} questions, torch {torch.__version__}")


if __name__ == "__main__":
    main()
