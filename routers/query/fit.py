"""Fitting the learned router on an outcome table.

What is learned from predictions (weights of the heads, calibration, token offsets, cost ratios, limits of
trust) is learned from out-of-fold predictions: five folds, near-duplicate questions never on both sides.
Deterministic for a seed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from viaticum.errors import DataError
from viaticum.routers.query.calibration import calibration_error, cost_ratios
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
from viaticum.routers.query.outcome_matrix import (
    MIN_QUESTIONS,
    Array,
    OutcomeMatrix,
    assign_folds,
    near_duplicates,
    split_templates,
)
from viaticum.routers.query.parameters import RouterParameters, RTRSettings
from viaticum.routers.query.plans import COST_WEIGHTS, IndexedPlan, Plan, search, simulate
from viaticum.routers.query.rtr import TRUST_NEIGHBOURS, RTRRouter
from viaticum.routers.query.token_quantiles import expected_log_tokens, fit_token_quantiles, log_characters
from viaticum.types import Pair

FOLDS = 5
MAX_EPOCHS = 40
MAX_CLUSTERS = 8  # clusters of questions with alike outcomes, for the search of plans
# Shares of the known questions that lie further from the others than the similarities of trust 0 and 1.
TRUST_QUANTILES = (0.01, 0.10)
Report = Callable[[str, int, int], None]  # stage, done, total


class OutOfFold(NamedTuple):
    """Predictions for each question by heads that were fitted on the other folds.

    Args:
        logits: log-odds by head [Q, M].
        cost: expected dollars [Q, M].
        neighbour_tokens, dual_tokens: log tokens by the neighbours' mean and the dual head's median [Q, P].
        similarity: mean similarity to the nearest known questions [Q].
        epochs: epochs that the dual head is trained for.
    """

    logits: dict[str, Tensor]
    cost: Tensor
    neighbour_tokens: Tensor
    dual_tokens: Tensor
    similarity: Tensor
    epochs: int


def fit(
    matrix: OutcomeMatrix,
    encoder: Encoder,
    descriptions: Mapping[str, str] | None = None,
    *,
    settings: RTRSettings = RTRSettings(),  # noqa: B008 (it is frozen)
    report: Report = lambda stage, done, total: None,
) -> RTRRouter:
    """Fit a router.

    Args:
        matrix: the outcome table.
        encoder: embeds questions and descriptions.
        descriptions: of models and strategies by name; the name stands for one that is missing.
        settings: what to leave out, and the seed.
        report: called with the progress.

    Raises:
        DataError: the table has too little in it (`OutcomeMatrix.check`), or near-duplicates alone.
    """
    matrix.check()
    began = time.perf_counter()
    embeddings = encoder(matrix.texts, lambda done, total: report("embedding questions", done, total))
    embeddings = embeddings.half().float()  # the precision in which they are stored
    groups = near_duplicates(matrix.texts)
    if len(np.unique(groups)) < 2:
        raise DataError("all questions are near-duplicates of one another; a router needs different ones")
    groups = split_templates(groups, matrix.texts)
    folds = torch.from_numpy(assign_folds(groups, FOLDS, settings.seed))
    started = time.perf_counter()
    report("searching plans", 0, 1)
    plans = _search_plans(matrix, embeddings, settings)
    data = _training_data(matrix, embeddings, plans)
    columns = _columns(matrix.pairs, plans, descriptions or {}, encoder)
    out_of_fold = _predict_out_of_fold(columns, data, folds, settings, report)
    report("fitting on all questions", 0, 1)
    parameters = _fit_parameters(matrix, plans, data, columns, out_of_fold, settings)
    parameters.facts = {
        "encoder": encoder.name,
        "questions": len(matrix),
        "date": datetime.now(UTC).date().isoformat(),
        "groups": int(groups.max()) + 1,
        **_facts(matrix, parameters, out_of_fold),
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_with_embeddings": round(time.perf_counter() - began, 1),
    }
    report("done", 1, 1)
    return RTRRouter(parameters, encoder)


def fingerprint(matrix: OutcomeMatrix) -> str:
    """A hash of the training data: questions, pairs and outcomes."""
    digest = hashlib.sha256()
    for text in (
        *map(str, matrix.pairs),
        *(f"{d}\0{q}\0{t}" for (d, q), t in zip(matrix.ids, matrix.texts, strict=True)),
    ):
        digest.update(text.encode() + b"\n")
    digest.update(np.nan_to_num(matrix.correct, nan=-1).astype(np.int8).tobytes())
    return digest.hexdigest()


def _search_plans(matrix: OutcomeMatrix, embeddings: Tensor, settings: RTRSettings) -> list[IndexedPlan]:
    """A plan for each column: every pair, then plans of several where enough questions have all pairs."""
    singles: list[IndexedPlan] = [((pair,), 2) for pair in range(len(matrix.pairs))]
    complete = matrix.complete
    if not settings.plans or complete.sum() < MIN_QUESTIONS or len(matrix.pairs) < 2:
        return singles
    from sklearn.cluster import KMeans

    known = matrix.select(complete)
    head = NeighboursHead(embeddings[torch.from_numpy(complete)], torch.from_numpy(known.correct).float())
    logits = log_odds(head.mean(*head.nearest(head.embeddings, NEIGHBOURS // 2))).numpy()
    count = min(MAX_CLUSTERS, max(1, len(known) // 50))
    clusters = KMeans(count, n_init=3, random_state=settings.seed).fit_predict(logits)
    plans = search(known.correct, known.cost, known.answers, clusters)
    return [*singles, *(plan for plan in plans if len(plan[0]) > 1)]


def _training_data(matrix: OutcomeMatrix, embeddings: Tensor, plans: list[IndexedPlan]) -> TrainingData:
    correct, cost = _plan_outcomes(matrix, plans)
    log_tokens = torch.from_numpy(np.log(np.maximum(matrix.tokens, 1.0))).float()
    return TrainingData(
        embeddings, correct, cost, log_tokens, torch.from_numpy(matrix.truncated), COST_WEIGHTS
    )


def _plan_outcomes(matrix: OutcomeMatrix, plans: list[IndexedPlan]) -> tuple[Tensor, Tensor]:
    """Correct and dollars of every column [Q, M]; NaN where the pair, or one of the plan, was not asked."""
    count = len(matrix.pairs)
    correct, cost = (np.full((len(matrix), len(plans)), np.nan) for _ in range(2))
    correct[:, :count], cost[:, :count] = matrix.correct, matrix.cost
    asked = ~np.isnan(matrix.correct) & ~np.isnan(matrix.cost)
    for column, plan in enumerate(plans[count:], count):
        rows = asked[:, list(plan[0])].all(1)
        result = simulate(plan, matrix.correct[rows], matrix.cost[rows], matrix.answers[rows])
        correct[rows, column], cost[rows, column], _ = result
    return torch.from_numpy(correct).float(), torch.from_numpy(cost).float()


def _columns(
    pairs: tuple[Pair, ...], plans: list[IndexedPlan], descriptions: Mapping[str, str], encoder: Encoder
) -> Columns:
    models = list(dict.fromkeys(pair.model for pair in pairs))
    strategies = list(dict.fromkeys(pair.strategy for pair in pairs))
    members = torch.zeros(len(plans), len(pairs))
    for column, (order, _) in enumerate(plans):
        members[column, list(order)] = 1 / len(order)
    embedded = [
        encoder([descriptions.get(name, name) for name in names]).float() for names in (models, strategies)
    ]
    of_pair = [[models.index(pair.model), strategies.index(pair.strategy)] for pair in pairs]
    return Columns(embedded[0], embedded[1], torch.tensor(of_pair), members)


def _fit_dual(columns: Columns, data: TrainingData, epochs: int, settings: RTRSettings) -> DualHead:
    return fit_dual_head(columns, data, epochs=epochs, seed=settings.seed, decision=settings.decision)[0]


def _predict_out_of_fold(
    columns: Columns, data: TrainingData, folds: Tensor, settings: RTRSettings, report: Report
) -> OutOfFold:
    """Predict each fold by heads fitted on the others.

    The dual head is trained for as many epochs as predict the second fold best after training on the third
    and later.
    """
    epochs = fit_dual_head(
        columns,
        data.select(folds > 1),
        epochs=MAX_EPOCHS,
        seed=settings.seed,
        decision=settings.decision,
        validation=data.select(folds == 1),
    )[1]
    shape = data.correct.shape
    logits = {name: torch.zeros(shape) for name in ("logistic", "neighbours", "dual")}
    cost, similarity = torch.zeros(shape), torch.zeros(shape[0])
    expected = expected_log_tokens(data.log_tokens, data.truncated)
    neighbour_tokens, dual_tokens = torch.zeros(expected.shape), torch.zeros(expected.shape)
    for fold in range(FOLDS):
        report("fitting folds", fold, FOLDS)
        rows = folds == fold
        known, asked = data.select(~rows), data.embeddings[rows]
        neighbours = NeighboursHead(known.embeddings, known.correct)
        nearest = neighbours.nearest(asked, NEIGHBOURS)
        logits["neighbours"][rows] = log_odds(neighbours.mean(*nearest))
        cost[rows] = NeighboursHead(known.embeddings, known.cost).mean(*nearest)
        similarity[rows] = nearest[0][:, :TRUST_NEIGHBOURS].mean(1)
        logits["logistic"][rows] = LogisticHead.fit(known.embeddings, known.correct)(asked)
        neighbour_tokens[rows] = NeighboursHead(known.embeddings, expected[~rows]).mean(*nearest)
        logits["dual"][rows], tokens = _fit_dual(columns, known, epochs, settings).predict(asked)
        dual_tokens[rows] = tokens[..., 0]
    return OutOfFold(logits, cost, neighbour_tokens, dual_tokens, similarity, epochs)


def _fit_parameters(
    matrix: OutcomeMatrix,
    plans: list[IndexedPlan],
    data: TrainingData,
    columns: Columns,
    out_of_fold: OutOfFold,
    settings: RTRSettings,
) -> RouterParameters:
    """Heads fitted on all questions, and what the out-of-fold predictions say about them; without facts."""
    heads = [out_of_fold.logits[name] for name in settings.heads]
    mixture = CalibratedMixture.fit(heads, data.correct, calibrate=settings.calibrate)
    # A pair that was asked some questions only, such as hard ones, is not known by its mean on these.
    filled = (_fill(data.correct, mixture(heads)), _fill(data.cost, out_of_fold.cost))
    prices, prompt_price = _fit_prices(matrix)
    return RouterParameters(
        pairs=matrix.pairs,
        plans=tuple(Plan(tuple(matrix.pairs[pair] for pair in order), need) for order, need in plans),
        embeddings=data.embeddings,
        correct=data.correct,
        cost=data.cost,
        columns=columns,
        logistic=LogisticHead.fit(data.embeddings, data.correct),
        dual=_fit_dual(columns, data, out_of_fold.epochs, settings),
        mixture=mixture,
        static_means=torch.stack([_mean_over_datasets(each, matrix.datasets) for each in filled]),
        trust_limits=torch.quantile(out_of_fold.similarity, torch.tensor(TRUST_QUANTILES)),
        token_offsets=torch.zeros(len(matrix.pairs), 2),
        prices=prices,
        cost_weights=torch.tensor(COST_WEIGHTS, dtype=torch.float32),
        cost_ratios=cost_ratios(mixture(heads), out_of_fold.cost, data.cost),
        settings=settings,
        facts={},
        tokens=fit_token_quantiles(
            (out_of_fold.neighbour_tokens, out_of_fold.dual_tokens),
            log_characters(matrix.texts),
            data.log_tokens,
            data.truncated,
            prompt_price,
        ),
    )


def _facts(matrix: OutcomeMatrix, parameters: RouterParameters, out_of_fold: OutOfFold) -> dict[str, Any]:
    """What `router.json` says about the fit; `unseen` is measured on out-of-fold predictions of the pairs."""
    names, pairs = parameters.settings.heads, slice(0, len(matrix.pairs))
    probabilities = parameters.mixture([out_of_fold.logits[name] for name in names])[:, pairs]
    correct = parameters.correct[:, pairs]
    datasets = zip(*np.unique(matrix.datasets, return_counts=True), strict=True)
    return {
        "fingerprint": fingerprint(matrix),
        "datasets": {str(name): int(count) for name, count in datasets},
        "epochs": out_of_fold.epochs,
        "unseen": {
            "log_loss": round(log_loss(log_odds(probabilities), correct), 4),
            "ece": round(calibration_error(probabilities, correct), 4),
        },
        "shares": {
            name: round(float(share), 3) for name, share in zip(names, parameters.mixture.shares, strict=True)
        },
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }


def _fill(values: Tensor, predicted: Tensor) -> Tensor:
    """Known outcomes, and in their holes what other questions' outcomes predict."""
    return torch.where(values.isnan(), predicted, values)


def _mean_over_datasets(values: Tensor, datasets: Array) -> Tensor:
    """Column means [M] in which every data set has the same weight, whatever its size."""
    parts = [values[torch.from_numpy(datasets == name)] for name in np.unique(datasets)]
    means = torch.stack([part.nanmean(0) for part in parts]).nanmean(0)
    return means.nan_to_num(float(values.nanmean()))


def _fit_prices(matrix: OutcomeMatrix) -> tuple[Tensor, Tensor]:
    """Dollars of a usual prompt and of an output token [P, 2], and of a character of the question [P].

    By least squares. For a pair of models (token-level decoding) the price of a token is that of the mix that
    their tokens had.
    """
    prices, per_character = np.zeros((len(matrix.pairs), 2)), np.zeros(len(matrix.pairs))
    characters = np.array([len(text) for text in matrix.texts], dtype=np.float64)
    usual = characters.mean()
    for column in range(len(matrix.pairs)):
        known = ~np.isnan(matrix.tokens[:, column]) & ~np.isnan(matrix.cost[:, column])
        if not known.any():
            continue
        tokens, cost, extra = (
            matrix.tokens[known, column],
            matrix.cost[known, column],
            characters[known] - usual,
        )
        slopes = _slopes(np.stack((tokens, extra), 1), cost)
        if slopes[1] < 0:  # prompts were not counted, or hardly vary
            slopes = np.append(_slopes(tokens[:, None], cost), 0.0)
        per_token, per_character[column] = max(0.0, float(slopes[0])), max(0.0, float(slopes[1]))
        prompt = cost.mean() - per_token * tokens.mean() - per_character[column] * extra.mean()
        prices[column] = max(0.0, float(prompt)), per_token
    return torch.from_numpy(prices).float(), torch.from_numpy(per_character).float()


def _slopes(features: Array, values: Array) -> Array:
    """Least-squares slopes of values [n] on features [n, F]; 0 for one that does not vary."""
    centred = features - features.mean(0)
    scale = centred.std(0)
    scaled = centred / np.where(scale > 0, scale, 1.0)
    found = np.linalg.lstsq(scaled, values - values.mean(), rcond=1e-9)[0]
    return np.asarray(np.where(scale > 0, found / np.where(scale > 0, scale, 1.0), 0.0))
