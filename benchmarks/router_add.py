"""A model that was never profiled: predictions from its name alone, and from 20, 50 and 100 outcomes.

Each model of an outcome table is held out in turn. A router is fitted on the others; then every pair of that
model is added as by `viaticum router add`, with so many outcomes of training questions. Its probabilities on
held-out questions are compared with (a) the share of correct answers among the same outcomes, and (b) a
router fitted with the model. Prints mean negative log-likelihood in nats (lower is better) over pairs and
models; near-duplicate questions are never on both sides.

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
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.rtr import RTRRouter

COUNTS = (0, 20, 50, 100)


def pair_log_loss(router: RTRRouter, test: OutcomeMatrix, model: str) -> float:
    """Mean negative log-likelihood of the model's pairs on held-out questions."""
    accuracy = router.predict_texts(test.texts).accuracy
    losses = []
    for column, pair in zip(router.pair_columns, router.pairs, strict=True):
        if pair.model == model:
            correct = torch.from_numpy(test.correct[:, test.pairs.index(pair)]).float()
            losses.append(log_loss(log_odds(accuracy[:, column]), correct))
    return statistics.mean(losses)


def without(matrix: OutcomeMatrix, model: str) -> OutcomeMatrix:
    """The matrix without a model's pairs."""
    kept = [n for n, pair in enumerate(matrix.pairs) if pair.model != model]
    arrays = ("correct", "tokens", "cost", "truncated", "answers", "seconds")
    return OutcomeMatrix(
        tuple(matrix.pairs[n] for n in kept),
        matrix.ids,
        matrix.texts,
        *(getattr(matrix, name)[:, kept] for name in arrays),
    )


def measure(matrix: OutcomeMatrix, models: list[str], encoder: Encoder) -> dict[str, dict[str, float]]:
    mask = held_out(near_duplicates(matrix.texts), 0.3, seed=0)
    train, test = matrix.select(~mask), matrix.select(mask)
    complete = fit(train, encoder, settings=RTRSettings(plans=False))
    result: dict[str, dict[str, float]] = {}
    for model in models:
        sys.stderr.write(f"{model}\n")
        base = fit(without(train, model), encoder, settings=RTRSettings(plans=False))
        losses_by_case = result.setdefault(model, {"fitted with it": pair_log_loss(complete, test, model)})
        chosen = np.random.default_rng(0).permutation(len(train))
        for count in COUNTS:
            some, router = train.select(chosen[: max(count, 1)]), base
            losses = []
            for column, pair in enumerate(matrix.pairs):
                if pair.model == model:
                    router = add(router, pair, {}, (0.0, 1.0), some if count else None)
                    rate = (np.nansum(some.correct[:, column]) + 1) / (count + 2) if count else 0.5
                    correct = torch.from_numpy(test.correct[:, column]).float()
                    losses.append(
                        log_loss(torch.full_like(correct, float(np.log(rate / (1 - rate)))), correct)
                    )
            losses_by_case[f"added, {count} outcomes"] = pair_log_loss(router, test, model)
            losses_by_case[f"their mean, {count} outcomes"] = statistics.mean(losses)
    return result


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
    matrix = OutcomeMatrix.from_outcomes(read_outcomes(arguments.outcomes), prices)
    models = sorted({pair.model for pair in matrix.pairs})[-arguments.models :]
    result = measure(matrix, models, Encoder())
    mean = {
        name: statistics.mean(each[name] for each in result.values()) for name in next(iter(result.values()))
    }
    if arguments.json:
        print(json.dumps({"models": result, "mean": mean, "torch": torch.__version__}))
        return
    for name, value in mean.items():
        print(f"{name}: {value:.4f}")
    print(f"{len(models)} models, {len(matrix)} questions, torch {torch.__version__}")


if __name__ == "__main__":
    main()
