"""Fitting the learned router on an outcome table.

What is learned from predictions (weights of the heads, calibration, how far tokens and costs come out beyond what was
expected, how far from known questions a prediction holds) is learned from predictions for questions that the heads had
not seen: five folds, near-duplicates of a question never on both sides. Deterministic for a seed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.heads import (
    NEIGHBOURS,
    CalibratedMixture,
    Columns,
    DualHead,
    LogisticHead,
    NeighboursHead,
    TrainingData,
    fit_dual_head,
    log_loss,
    log_odds,
)
from viaticum.routers.query.outcome_matrix import FEWEST, Array, OutcomeMatrix, assign_folds, near_duplicates
from viaticum.routers.query.plans import WEIGHTS, Plan, Steps, search, simulate
from viaticum.routers.query.rtr import NEAREST, Learned, RTRRouter, RTRSettings
from viaticum.types import Pair

FOLDS = 5
EPOCHS = 40
KINDS = 8  # clusters of questions on which the pairs do alike, for the search of plans
SPREAD = 0.5  # standard deviation of log tokens about what is expected, where it cannot be seen
UNTRUSTED, TRUSTED = 0.01, 0.10  # of known questions lie further from the others than the limits of trust
Report = Callable[[str, int, int], None]  # stage, done, of


def fit(
    grid: OutcomeMatrix,
    encoder: Encoder,
    descriptions: Mapping[str, str] | None = None,
    *,
    settings: RTRSettings = RTRSettings(),  # noqa: B008 (it is frozen)
    report: Report = lambda stage, done, of: None,
) -> RTRRouter:
    """descriptions: of models and strategies by name; one without is known by its name. report: told of progress.

    Raises `DataError` for a table that has too little in it (`OutcomeMatrix.check`).
    """
    grid.check()
    began = time.perf_counter()
    embeddings = encoder(grid.texts, lambda done, of: report("questions embedded", done, of))
    embeddings = embeddings.half().float()  # as they are kept
    groups = near_duplicates(grid.texts)
    folds = torch.from_numpy(assign_folds(groups, FOLDS, settings.seed))
    started = time.perf_counter()
    report("looking for plans", 0, 1)
    steps = _plans(grid, embeddings, settings)
    right, cost = _outcomes(grid, steps)
    lesson = TrainingData(
        embeddings,
        right,
        cost,
        torch.from_numpy(np.log(np.maximum(grid.tokens, 1.0))).float(),
        torch.from_numpy(grid.cut),
        WEIGHTS,
    )
    columns = _columns(grid.pairs, steps, descriptions or {}, encoder)
    unseen, epochs = _unseen(columns, lesson, folds, settings, report)
    mixture = CalibratedMixture.fit(
        [unseen[name] for name in settings.heads], right, calibrate=settings.calibrate
    )
    report("fitting on all questions", 0, 1)
    learned = Learned(
        pairs=grid.pairs,
        plans=tuple(Plan(tuple(grid.pairs[pair] for pair in order), need) for order, need in steps),
        embeddings=embeddings,
        right=right,
        cost=cost,
        columns=columns,
        logistic=LogisticHead.fit(embeddings, right),
        dual=_dual(columns, lesson, epochs, settings),
        mixture=mixture,
        static=torch.stack([_over_datasets(each, grid.datasets) for each in (right, cost)]),
        limits=torch.quantile(unseen["near"], torch.tensor([UNTRUSTED, TRUSTED])),
        stretch=_stretch(unseen["tokens"], lesson),
        rate=_rates(grid),
        worth=torch.tensor(WEIGHTS, dtype=torch.float32),
        spend=torch.ones(len(WEIGHTS)),
        settings=settings,
        facts={},
    )
    chances = mixture([unseen[name] for name in settings.heads])
    learned.spend = _spend(chances, unseen["cost"], cost)
    pairs = slice(0, len(grid.pairs))
    learned.facts = {
        "encoder": encoder.name,
        "questions": len(grid),
        "groups": int(groups.max()) + 1,
        "fingerprint": fingerprint(grid),
        "datasets": {
            str(name): int(count)
            for name, count in zip(*np.unique(grid.datasets, return_counts=True), strict=True)
        },
        "epochs": epochs,
        "unseen": {
            "log_loss": round(log_loss(log_odds(chances[:, pairs]), right[:, pairs]), 4),
            "ece": round(calibration_error(chances[:, pairs], right[:, pairs]), 4),
        },
        "shares": {
            name: round(float(share), 3) for name, share in zip(settings.heads, mixture.shares, strict=True)
        },
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_with_embeddings": round(time.perf_counter() - began, 1),
    }
    report("done", 1, 1)
    return RTRRouter(learned, encoder)


def fingerprint(grid: OutcomeMatrix) -> str:
    """A hash of what was learned from: questions, pairs and outcomes."""
    told = hashlib.sha256()
    for text in (
        *map(str, grid.pairs),
        *(f"{d}\0{q}\0{t}" for (d, q), t in zip(grid.ids, grid.texts, strict=True)),
    ):
        told.update(text.encode() + b"\n")
    told.update(np.nan_to_num(grid.correct, nan=-1).astype(np.int8).tobytes())
    return told.hexdigest()


def calibration_error(chances: Tensor, right: Tensor, bins: int = 15) -> float:
    """Expected calibration error of the known outcomes: mean distance of confidence from accuracy over equal bins."""
    known = ~right.isnan()
    chance, true = chances[known].double(), right[known].double()
    place = (chance * bins).long().clamp_max(bins - 1)
    sums = torch.zeros(bins, dtype=torch.float64).index_add(0, place, chance - true)
    return float(sums.abs().sum() / max(1, len(chance)))


def _plans(grid: OutcomeMatrix, embeddings: Tensor, settings: RTRSettings) -> list[Steps]:
    """The columns: every pair, then the plans worth having, where enough questions were given to every pair."""
    singles: list[Steps] = [((pair,), 2) for pair in range(len(grid.pairs))]
    whole = grid.complete
    if not settings.plans or whole.sum() < FEWEST or len(grid.pairs) < 2:
        return singles
    from sklearn.cluster import KMeans

    part = grid.select(whole)
    near = NeighboursHead(embeddings[torch.from_numpy(whole)], torch.from_numpy(part.correct).float())
    odds = log_odds(near.mean(*near.nearest(near.embeddings, NEIGHBOURS // 2))).numpy()
    count = min(KINDS, max(1, len(part) // 50))
    kinds = KMeans(count, n_init=3, random_state=settings.seed).fit_predict(odds)
    found = search(part.correct, part.cost, part.answers, kinds)
    return [*singles, *(steps for steps in found if len(steps[0]) > 1)]


def _outcomes(grid: OutcomeMatrix, steps: list[Steps]) -> tuple[Tensor, Tensor]:
    """right and dollars [Q, M]; NaN for pairs not asked, and for plans where any pair was not."""
    whole = grid.complete
    right, cost = (np.full((len(grid), len(steps)), np.nan) for _ in range(2))
    count = len(grid.pairs)
    right[:, :count], cost[:, :count] = grid.correct, grid.cost
    for column, plan in enumerate(steps[count:], count):
        right[whole, column], cost[whole, column], _ = simulate(
            plan, grid.correct[whole], grid.cost[whole], grid.answers[whole]
        )
    return torch.from_numpy(right).float(), torch.from_numpy(cost).float()


def _columns(
    pairs: tuple[Pair, ...], steps: list[Steps], descriptions: Mapping[str, str], encoder: Encoder
) -> Columns:
    models = list(dict.fromkeys(pair.model for pair in pairs))
    strategies = list(dict.fromkeys(pair.strategy for pair in pairs))
    members = torch.zeros(len(steps), len(pairs))
    for column, (order, _) in enumerate(steps):
        members[column, list(order)] = 1 / len(order)
    told = [
        encoder([descriptions.get(name, name) for name in names]).float() for names in (models, strategies)
    ]
    of_pair = [[models.index(pair.model), strategies.index(pair.strategy)] for pair in pairs]
    return Columns(told[0], told[1], torch.tensor(of_pair), members)


def _dual(columns: Columns, lesson: TrainingData, epochs: int, settings: RTRSettings) -> DualHead:
    return fit_dual_head(columns, lesson, epochs=epochs, seed=settings.seed, decision=settings.decision)[0]


def _unseen(
    columns: Columns, lesson: TrainingData, folds: Tensor, settings: RTRSettings, report: Report
) -> tuple[dict[str, Tensor], int]:
    """What each head says of questions in the fold that it was not fitted on, and for how many epochs to train.

    The epochs are those at which the second fold is predicted best by what the third and later ones teach.
    """
    questions, count = lesson.right.shape
    found = {name: torch.zeros(questions, count) for name in ("logistic", "neighbours", "dual", "cost")}
    found |= {"tokens": torch.zeros(*lesson.log_tokens.shape, 2), "near": torch.zeros(questions)}
    epochs = fit_dual_head(
        columns,
        lesson.select(folds > 1),
        epochs=EPOCHS,
        seed=settings.seed,
        decision=settings.decision,
        watch=lesson.select(folds == 1),
    )[1]
    for fold in range(FOLDS):
        report("learning from the other folds", fold, FOLDS)
        out = folds == fold
        known, asked = lesson.select(~out), lesson.embeddings[out]
        near = NeighboursHead(known.embeddings, known.right)
        places = near.nearest(asked, NEIGHBOURS)
        found["neighbours"][out] = log_odds(near.mean(*places))
        found["cost"][out] = NeighboursHead(known.embeddings, known.cost).mean(*places)
        found["near"][out] = places[0][:, :NEAREST].mean(1)
        found["logistic"][out] = LogisticHead.fit(known.embeddings, known.right)(asked)
        dual = _dual(columns, known, epochs, settings)
        found["dual"][out], found["tokens"][out] = dual.predict(asked)
    return found, epochs


def _over_datasets(values: Tensor, datasets: Array) -> Tensor:
    """Column means [M], every data set counting alike: of an unknown question each is as likely its home."""
    parts = [values[torch.from_numpy(datasets == name)] for name in np.unique(datasets)]
    means = torch.stack([part.nanmean(0) for part in parts]).nanmean(0)
    return means.nan_to_num(float(values.nanmean()))


def _stretch(found: Tensor, lesson: TrainingData) -> Tensor:
    """What to add to predicted log tokens [P, 2] so that half, and nine tenths, of unseen answers are no longer.

    Split conformal prediction (Vovk et al. 2005), a pair at a time. Of an answer that was cut only that it is at least
    so long is known: quantiles are those of Kaplan and Meier (1958).
    """
    beyond = lesson.log_tokens[..., None] - found  # [Q, P, 2]
    known = ~lesson.log_tokens.isnan()
    levels = (0.5, 0.9)
    every = [
        censored_quantile(beyond[..., n][known], lesson.cut[known], level) for n, level in enumerate(levels)
    ]
    stretch = torch.tensor(every).repeat(beyond.shape[1], 1)
    for pair in range(beyond.shape[1]):
        own = known[:, pair]
        if int(own.sum()) >= FEWEST:
            for n, level in enumerate(levels):
                stretch[pair, n] = censored_quantile(beyond[own, pair, n], lesson.cut[own, pair], level)
    return stretch.clamp(-5, 5)


def censored_quantile(values: Tensor, cut: Tensor, level: float) -> float:
    """The value [n] that a share `level` does not exceed, where of those that were cut only the least they may be is known.

    Where too many were cut for the quantile to be seen it is drawn out from the last one that is, as that of a normal
    distribution with `SPREAD`. 0 for no values.
    """
    if len(values) == 0:
        return 0.0
    order = np.lexsort((cut.numpy(), values.numpy()))  # of equals those that were not cut come first
    ordered, event = values.numpy()[order], ~cut.numpy()[order]
    below = 1 - np.cumprod(1 - event / np.arange(len(ordered), 0, -1))
    reached = np.flatnonzero(below >= level - 1e-9)
    if len(reached):
        return float(ordered[reached[0]])
    seen, last = (
        (float(below[event].max()), float(ordered[event].max())) if event.any() else (0.0, float(ordered[0]))
    )
    normal = NormalDist(sigma=SPREAD)
    return last + normal.inv_cdf(level) - normal.inv_cdf(max(seen, 0.01))


def _rates(grid: OutcomeMatrix) -> Tensor:
    """Dollars of a prompt and of an output token for each pair [P, 2], by least squares; of a pair of models the mix
    that their tokens really had."""
    rates = np.zeros((len(grid.pairs), 2))
    for column in range(len(grid.pairs)):
        known = ~np.isnan(grid.tokens[:, column]) & ~np.isnan(grid.cost[:, column])
        tokens, cost = grid.tokens[known, column], grid.cost[known, column]
        if len(tokens) == 0:
            continue
        spread = tokens.var()
        each = float(((tokens - tokens.mean()) * (cost - cost.mean())).mean() / spread) if spread > 0 else 0.0
        rates[column] = max(0.0, cost.mean() - max(0.0, each) * tokens.mean()), max(0.0, each)
    return torch.from_numpy(rates).float()


def _spend(chances: Tensor, expected: Tensor, cost: Tensor) -> Tensor:
    """For each worth of a dollar the real over the expected cost of what is chosen, on unseen questions [W].

    The costliest questions rule a mean, so the ratio is drawn towards 1 by as much as 20 questions.
    """
    ratios = []
    for worth in WEIGHTS:
        utility = (chances - worth * expected).masked_fill(cost.isnan(), float("-inf"))
        chosen = utility.argmax(1)[:, None]
        real, told = cost.gather(1, chosen).nan_to_num(0.0).sum(), expected.gather(1, chosen).sum()
        few = 20 * told / len(cost)
        ratios.append((real + few) / (told + few))
    return torch.stack(ratios)


def describe(models: Mapping[str, Any], strategies: Mapping[str, Any]) -> dict[str, str]:
    """Descriptions by name, of a catalogue's models and the registered strategies."""
    return {name: each.description for name, each in (*models.items(), *strategies.items())}
