"""Which outcomes to buy for a router: accuracy on held-out questions against the money spent on outcomes.

A simulation on a table that has every outcome: a pool of questions is drawn from 70% of them (near-duplicates
on one side), outcomes are bought for a share of what all of the pool's cost, a router is fitted on them, and
it answers the other 30%. Ways to buy: in rounds (`viaticum.routers.query.acquisition`), random outcomes, and
all pairs on as many random questions as the money allows. At all of the money they are the same.

A router's score is the mean over `WEIGHTS` of its accuracy less weight * cost / (mean cost of the dearest
pair), the trade that it was asked to make, on questions that it did not see; accuracy and cost are also given
alone. Intervals, 95%, are of differences on the same questions, the seeds' results of one question drawn
together. "Money for the same score": our money over that at which the rival's curve, interpolated, has our
score; below 1 we are cheaper.

The router is that of `viaticum.routers.query.fit`; with --quick its logistic and nearest-neighbour heads
alone, without plans and calibration, seconds instead of minutes. A way that buys too few questions for a fit
has the static choice instead, as the error of `router fit` advises. Beside it: the best static choice and
tuned nearest neighbours, both on the complete rows that the same money buys.

    viaticum models pull all-minilm-l6-v2
    python benchmarks/tune.py OUTCOMES --prices PRICES.json [--pools 100 300 1000] [--seeds 0 1 2] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from viaticum.outcomes import read_outcomes
from viaticum.routers.query.acquisition import AcquisitionSettings, Cell, acquire
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.fit import fit
from viaticum.routers.query.heads import NEIGHBOURS, LogisticHead, NeighboursHead, log_odds
from viaticum.routers.query.outcome_matrix import (
    MIN_QUESTIONS,
    Array,
    OutcomeMatrix,
    assign_folds,
    held_out,
    near_duplicates,
    read_prices,
)
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.plans import simulate

SHARE = 0.3  # of the questions is held out
SHARES = (0.125, 0.25, 0.5, 1.0)  # of what all outcomes of the pool cost
WEIGHTS = (0.03, 0.1, 0.3, 1.0)
OURS, RANDOM, ROWS = "in rounds", "random outcomes", "all pairs on few questions"
STATIC, KNN = "static choice", "neighbours, tuned"
TUNED_K = (5, 10, 25, 50, 100)


@dataclass(frozen=True)
class Scores:
    """On the test questions of one seed [T]: score, accuracy and dollars, means over the weights."""

    numbers: Array
    score: Array
    correct: Array
    cost: Array


@dataclass(frozen=True)
class Case:
    """A pool of questions to buy outcomes of, and the test questions with their dearest pair's mean cost."""

    pool: OutcomeMatrix
    x: Array
    test: OutcomeMatrix
    x_test: Array
    numbers: Array
    dearest: float
    seed: int


# --- buying -------------------------------------------------------------------------------------------------


def buy_in_rounds(case: Case, money: float) -> tuple[OutcomeMatrix, list[int]]:
    """Expected prices are the pool's means, which a forecast would say; returns the pairs that are left."""
    cost, correct = case.pool.cost, case.pool.correct

    def ask(cell: Cell, left: float) -> tuple[float, float] | None:
        dollars = float(cost[cell[:2]])
        return None if dollars > left else (float(correct[cell[:2]]), dollars)

    bought = acquire(case.x, cost.mean(0), money, ask, AcquisitionSettings(seed=case.seed))
    dropped = {each.pair for each in bought.dropped}
    return masked(case.pool, bought.known.asked), [n for n in range(cost.shape[1]) if n not in dropped]


def buy_random(case: Case, money: float, *, rows: bool) -> tuple[OutcomeMatrix, list[int]]:
    """Random outcomes, or all outcomes of random questions."""
    rng = np.random.default_rng(case.seed)
    count, pairs = case.pool.cost.shape
    order = (
        (rng.permutation(count)[:, None] * pairs + np.arange(pairs)).ravel()
        if rows
        else rng.permutation(count * pairs)
    )
    spent = np.cumsum(case.pool.cost.ravel()[order])
    asked = np.zeros(count * pairs, dtype=bool)
    asked[order[: int((spent <= money * (1 + 1e-9)).sum())]] = True
    return masked(case.pool, asked.reshape(count, pairs)), list(range(pairs))


def masked(matrix: OutcomeMatrix, asked: Array) -> OutcomeMatrix:
    """The outcomes that were bought; questions of which none was are left out."""
    correct, tokens, cost = (
        np.where(asked, each, np.nan) for each in (matrix.correct, matrix.tokens, matrix.cost)
    )
    hidden = replace(matrix, correct=correct, tokens=tokens, cost=cost)
    return hidden.select(np.asarray(asked.any(1)))


# --- routers ------------------------------------------------------------------------------------------------


def score(case: Case, choose: Callable[[float], tuple[Array, Array]]) -> Scores:
    """choose: returns correct and dollars of the choices at a value of a dollar [T]."""
    results = [choose(weight / case.dearest) for weight in WEIGHTS]
    utilities = [
        right - weight * cost / case.dearest for weight, (right, cost) in zip(WEIGHTS, results, strict=True)
    ]
    right, cost = (np.mean(each, 0) for each in zip(*results, strict=True))
    return Scores(case.numbers, np.mean(utilities, 0), right, cost)


def quick_router(case: Case, known: OutcomeMatrix, pairs: Sequence[int], encoder: Encoder) -> Scores:
    """The mean log-odds of the logistic and the nearest-neighbour head."""
    columns = list(pairs)
    x, asked = (torch.from_numpy(encoder(each.texts).numpy()) for each in (known, case.test))
    correct, cost = (torch.from_numpy(each[:, columns]).float() for each in (known.correct, known.cost))
    near, dollars = NeighboursHead(x, correct), NeighboursHead(x, cost)
    nearest = near.nearest(asked, NEIGHBOURS)
    logits = LogisticHead.fit(x, correct)(asked) + log_odds(near.mean(*nearest))
    accuracy, price = torch.sigmoid(logits / 2).numpy(), dollars.mean(*nearest).numpy()

    def choose(weight: float) -> tuple[Array, Array]:
        chosen = np.array(columns)[(accuracy - weight * price).argmax(1)]
        rows = np.arange(len(chosen))
        return case.test.correct[rows, chosen], case.test.cost[rows, chosen]

    return score(case, choose)


def full_router(case: Case, known: OutcomeMatrix, pairs: Sequence[int], encoder: Encoder) -> Scores:
    """The router as `viaticum router fit` makes it, on the pairs that are left."""
    columns = list(pairs)
    kept = replace(
        known,
        pairs=tuple(known.pairs[n] for n in columns),
        correct=known.correct[:, columns],
        tokens=known.tokens[:, columns],
        cost=known.cost[:, columns],
        truncated=known.truncated[:, columns],
        answers=known.answers[:, columns],
    )
    kept = kept.select(np.asarray(~np.isnan(kept.correct).all(1)))
    if len(kept) < MIN_QUESTIONS:
        return static_choice(case, known, columns)
    router = fit(kept, encoder, settings=RTRSettings(seed=case.seed))
    prediction = router.predict_texts(case.test.texts)
    index = {pair: n for n, pair in enumerate(case.test.pairs)}
    test = case.test
    results = [
        simulate(
            (tuple(index[pair] for pair in plan.pairs), plan.need), test.correct, test.cost, test.answers
        )[:2]
        for plan in router.plans
    ]
    correct, cost = (np.stack(each, 1) for each in zip(*results, strict=True))

    def choose(weight: float) -> tuple[Array, Array]:
        chosen = router.choose_columns(prediction, weight).numpy()
        rows = np.arange(len(chosen))
        return correct[rows, chosen], cost[rows, chosen]

    return score(case, choose)


def static_choice(case: Case, known: OutcomeMatrix, pairs: Sequence[int] | None = None) -> Scores:
    """At each value of a dollar the pair that was best on what is known: the hull's corners.

    pairs: among these; default: all.
    """
    columns = list(range(len(known.pairs))) if pairs is None else list(pairs)
    right, cost = (np.nanmean(each[:, columns], 0) for each in (known.correct, known.cost))

    def choose(weight: float) -> tuple[Array, Array]:
        best = columns[int((right - weight * cost).argmax())]
        return case.test.correct[:, best], case.test.cost[:, best]

    return score(case, choose)


def tuned_neighbours(case: Case, known: OutcomeMatrix, encoder: Encoder) -> Scores:
    """Plain means of the k nearest complete rows; k by the score on a fifth of them."""
    x, x_test = encoder(known.texts).numpy(), case.x_test

    def predict(train: Array, asked: Array, k: int) -> tuple[Array, Array]:
        near = np.argsort(-(asked @ x[train].T), axis=1)[:, :k]
        return known.correct[train][near].mean(1), known.cost[train][near].mean(1)

    def worth(k: int) -> float:
        inner = assign_folds(np.arange(len(known)), 5, case.seed) == 0
        right, cost = predict(np.flatnonzero(~inner), x[inner], k)
        rows, total = np.arange(inner.sum()), 0.0
        for weight in WEIGHTS:
            chosen = (right - weight / case.dearest * cost).argmax(1)
            utility = known.correct[inner] - weight / case.dearest * known.cost[inner]
            total += float(utility[rows, chosen].mean())
        return total

    k = max((k for k in TUNED_K if k <= max(5, len(known) // 2)), key=worth)
    right, cost = predict(np.arange(len(known)), x_test, k)

    def choose(weight: float) -> tuple[Array, Array]:
        chosen = (right - weight * cost).argmax(1)
        rows = np.arange(len(chosen))
        return case.test.correct[rows, chosen], case.test.cost[rows, chosen]

    return score(case, choose)


# --- the measurement ----------------------------------------------------------------------------------------


def measure_case(
    case: Case, encoder: Encoder, shares: Sequence[float], *, quick: bool
) -> dict[tuple[float, str], Scores]:
    """Scores by share of the money and way to buy."""
    router = quick_router if quick else full_router
    total, found = float(case.pool.cost.sum()), {}
    for share in shares:
        complete, pairs = buy_random(case, share * total, rows=True)
        found[share, ROWS] = router(case, complete, pairs, encoder)
        whole = complete.select(complete.complete)
        found[share, STATIC], found[share, KNN] = (
            static_choice(case, whole),
            tuned_neighbours(case, whole, encoder),
        )
        if share < 1:
            found[share, OURS] = router(case, *buy_in_rounds(case, share * total), encoder)
            found[share, RANDOM] = router(case, *buy_random(case, share * total, rows=False), encoder)
        else:
            found[share, OURS] = found[share, RANDOM] = found[share, ROWS]
        report(f"pool {len(case.pool)}, seed {case.seed}, {share:.1%} of the money")
    return found


def difference(first: Sequence[Scores], second: Sequence[Scores]) -> dict[str, float]:
    """First minus second, mean over seeds and questions, with a bootstrap over questions."""
    sums: dict[int, list[float]] = {}
    for one, two in zip(first, second, strict=True):
        for number, gap in zip(one.numbers.tolist(), (one.score - two.score).tolist(), strict=True):
            sums.setdefault(number, []).append(gap)
    totals = np.array([sum(each) for each in sums.values()])
    counts = np.array([len(each) for each in sums.values()])
    draws = np.random.default_rng(0).integers(0, len(totals), (1000, len(totals)))
    low, high = np.quantile(totals[draws].sum(1) / counts[draws].sum(1), (0.025, 0.975))
    return {"difference": float(totals.sum() / counts.sum()), "low": float(low), "high": float(high)}


def summarise(cases: Sequence[dict[tuple[float, str], Scores]], shares: Sequence[float]) -> dict[str, Any]:
    """Means over seeds; ours against the others at the same money, and at twice the money."""
    parts = [share for share in shares if share < 1]  # with all of it the three ways to buy are the same

    def scores(share: float, way: str) -> list[Scores]:
        return [each[share, way] for each in cases]

    def mean(share: float, way: str, name: str) -> float:
        return float(np.mean([getattr(each, name).mean() for each in scores(share, way)]))

    ways = (OURS, RANDOM, ROWS, STATIC, KNN)
    curves = {
        way: [
            {name: mean(share, way, name) for name in ("score", "correct", "cost")} | {"money": share}
            for share in shares
        ]
        for way in ways
    }
    return {
        "curves": curves,
        "same_money": {
            way: [
                difference(scores(share, OURS), scores(share, way)) | {"money": share}
                for share in (shares if way in (STATIC, KNN) else parts)
            ]
            for way in ways[1:]
        },
        "half_the_money": {
            way: [
                difference(scores(share, OURS), scores(2 * share, way)) | {"money": share}
                for share in parts
                if 2 * share in shares
            ]
            for way in (RANDOM, ROWS)
        },
        "money_for_the_same_score": {
            way: [money_ratio(curves[way], point) for point in curves[OURS] if point["money"] < 1]
            for way in (RANDOM, ROWS)
        },
    }


def money_ratio(rival: Sequence[dict[str, float]], point: dict[str, float]) -> float | None:
    """Our money over the least of the rival's for our score; None where it never gets there."""
    previous = None
    for each in rival:
        if each["score"] >= point["score"]:
            if previous is None:
                return float(point["money"] / each["money"])
            part = (point["score"] - previous["score"]) / (each["score"] - previous["score"])
            return float(point["money"] / (previous["money"] + part * (each["money"] - previous["money"])))
        previous = each
    return None


def report(text: str) -> None:
    sys.stderr.write(f"\r{text:<78}")
    sys.stderr.flush()


def show(pool: str, result: dict[str, Any]) -> None:
    print(
        f"\npool of {pool} questions; score (accuracy, $ a question) by share of the money for all outcomes"
    )
    for way, line in result["curves"].items():
        cells = [f"{100 * p['score']:.1f} ({100 * p['correct']:.1f}, {p['cost']:.5f})" for p in line]
        print(f"{way:<28}" + "".join(f"{cell:<26}" for cell in cells))
    for title in ("same_money", "half_the_money"):
        for way, line in result[title].items():
            cells = [
                f"{100 * p['difference']:+.1f} ({100 * p['low']:+.1f} to {100 * p['high']:+.1f})"
                for p in line
            ]
            if cells:
                print(f"{title.replace('_', ' ')}, - {way:<28}" + "".join(f"{cell:<24}" for cell in cells))
    for way, ratios in result["money_for_the_same_score"].items():
        if not ratios:
            continue
        print(
            f"money for the same score, {way}: "
            + ", ".join("never" if r is None else f"{r:.2f}" for r in ratios)
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outcomes", type=Path, help="an outcome table with every pair on every question")
    parser.add_argument("--prices", type=Path, help="dollars a million tokens of each model")
    parser.add_argument("--pools", type=int, nargs="+", default=[100, 300, 1000], help="sizes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of split and purchases")
    parser.add_argument("--questions", type=int, help="so many of the table at most, at random")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=SHARES, help="of what all of the pool's outcomes cost"
    )
    parser.add_argument("--quick", action="store_true", help="two heads instead of the whole router")
    parser.add_argument("--embeddings", type=Path, help="another cache of embeddings")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    prices = read_prices(arguments.prices) if arguments.prices else None
    matrix = OutcomeMatrix.from_outcomes(read_outcomes(arguments.outcomes), prices)
    matrix = matrix.select(matrix.complete)
    if arguments.questions and arguments.questions < len(matrix):
        drawn = np.random.default_rng(0).choice(len(matrix), arguments.questions, replace=False)
        matrix = matrix.select(np.sort(drawn))
    encoder = Encoder(cache=arguments.embeddings or "")
    x = encoder(matrix.texts, lambda done, total: report(f"questions embedded {done}/{total}")).numpy()
    groups = near_duplicates(matrix.texts)
    shares = sorted(arguments.shares)
    results: dict[str, Any] = {
        "conditions": {
            "questions": len(matrix),
            "pairs": len(matrix.pairs),
            "seeds": arguments.seeds,
            "router": "two heads" if arguments.quick else "whole",
            "weights": WEIGHTS,
            "load": round(os.getloadavg()[0], 1),
        },
        "pools": {},
    }
    for size in arguments.pools:
        cases = []
        for seed in arguments.seeds:
            test = held_out(groups, SHARE, seed)
            train = np.random.default_rng(seed).permutation(np.flatnonzero(~test))[:size]
            tested = matrix.select(test)
            case = Case(
                matrix.select(train),
                x[train],
                tested,
                x[test],
                np.flatnonzero(test),
                float(tested.cost.mean(0).max()),
                seed,
            )
            cases.append(measure_case(case, encoder, shares, quick=arguments.quick))
        results["pools"][str(size)] = summarise(cases, shares)
    report("")
    sys.stderr.write("\r")
    if arguments.json:
        print(json.dumps(results))
        return
    print(json.dumps(results["conditions"]))
    for pool, result in results["pools"].items():
        show(pool, result)


if __name__ == "__main__":
    main()
