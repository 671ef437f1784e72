"""Fitting the learned router on an outcome table.

What is learned from predictions (weights of the heads, calibration, token offsets, cost ratios, trust) is
learned from out-of-fold predictions: five folds, near-duplicate questions never on both sides, and for trust
folds of whole kinds of questions too. Deterministic for a seed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

from viaticum.errors import DataError
from viaticum.routers.query.arms import BANDWIDTHS, smoother
from viaticum.routers.query.calibration import calibration_error, cost_ratios
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.forest import lexical_counts
from viaticum.routers.query.heads import (
    CalibratedMixture,
    Columns,
    LogisticHead,
    TrainingData,
    log_loss,
    log_odds,
)
from viaticum.routers.query.out_of_fold import (
    FOLDS,
    OutOfFold,
    Report,
    choose_epochs,
    fit_dual,
    fit_forest,
    fold_means,
    kind_folds,
    known_without,
    predict_out_of_fold,
)
from viaticum.routers.query.outcome_matrix import (
    Array,
    OutcomeMatrix,
    assign_folds,
    near_duplicates,
    split_templates,
)
from viaticum.routers.query.parameters import RouterParameters, RTRSettings
from viaticum.routers.query.plan_search import plan_optimism, search_checks, search_plans
from viaticum.routers.query.plans import COST_WEIGHTS, IndexedPlan, Plan, simulate
from viaticum.routers.query.rtr import RTRRouter
from viaticum.routers.query.shared_text import SharedText, find_shared
from viaticum.routers.query.token_prices import fit_prices
from viaticum.routers.query.token_quantiles import (
    TokenQuantiles,
    fit_token_quantiles,
    log_characters,
    quantile_excess,
)
from viaticum.routers.query.trust import (
    Predicted,
    Trust,
    accuracy_at,
    budgets_of,
    choices_by_weight,
    closeness_of,
    fit_trust,
    heads_alone,
    limits_of,
)
from viaticum.routers.query.verdicts import verifier_facts
from viaticum.types import Pair

MIN_KNOWN = (
    20  # questions that are left where a kind is left out; with fewer nothing is learned about unknown kinds
)
FOREST_QUESTIONS = 300  # from which a forest may be among the heads
FOREST_DOUBT = 1.0  # standard errors that its gain has to exceed


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
    shared = find_shared(matrix.texts)
    read = [shared.without(text) for text in matrix.texts]
    embeddings = encoder(read, lambda done, total: report("embedding questions", done, total))
    embeddings = embeddings.half().float()  # the precision in which they are stored
    groups = near_duplicates(read)
    if len(np.unique(groups)) < 2:
        raise DataError("all questions are near-duplicates of one another; a router needs different ones")
    groups = split_templates(groups, read)
    folds = torch.from_numpy(assign_folds(groups, FOLDS, settings.seed))
    started = time.perf_counter()
    report("searching plans", 0, 1)
    plans: list[IndexedPlan] = [((pair,), 2) for pair in range(len(matrix.pairs))]
    if settings.plans:
        plans += search_plans(matrix, embeddings, settings.seed)
    optimism = (
        plan_optimism(matrix, embeddings, folds, settings.seed) if len(plans) > len(matrix.pairs) else 0.0
    )
    if settings.plans and matrix.verdicts is not None:
        plans += search_checks(matrix, plans, groups, folds)
    data = _training_data(matrix, embeddings, plans)
    if len(matrix) < FOREST_QUESTIONS:
        settings = without_forest(settings)
    if "forest" in settings.heads:
        data = replace(data, lexical=lexical_counts(read))
    columns = _columns(matrix.pairs, plans, descriptions or {}, encoder)
    epochs = choose_epochs(columns, data, folds, settings)
    alike = torch.from_numpy(groups)
    home = predict_out_of_fold(columns, data, folds, alike, epochs, settings, report)
    settings, gain = _choose_forest(home, data, settings)
    away = None
    if settings.trust:
        kinds = kind_folds(matrix, embeddings, settings.seed)
        known = [int(known_without(kinds, kind, alike).sum()) for kind in np.unique(kinds.numpy())]
        if min(known) >= MIN_KNOWN:
            away = predict_out_of_fold(columns, data, kinds, alike, epochs, settings, report)
    if "forest" in settings.heads:
        home, away = home.with_forest(), None if away is None else away.with_forest()
    sharing = _choose_sharing(matrix, home, data, settings)
    if sharing is not None:
        home, away = home.shared(sharing), None if away is None else away.shared(sharing)
    report("fitting on all questions", 0, 1)
    parameters = _fit_parameters(matrix, plans, data, columns, (home, away), epochs, optimism, settings)
    parameters.sharing = sharing
    parameters.seconds = _plan_seconds(matrix, plans)
    if "forest" in settings.heads:
        parameters.forest = fit_forest(data, settings)
    parameters.facts = {
        **parameters.facts,
        "encoder": encoder.name,
        "windows": getattr(encoder, "windows", False),
        **({"shared_text": shared.to_json()} if shared != SharedText() else {}),
        "questions": len(matrix),
        "date": datetime.now(UTC).date().isoformat(),
        "groups": int(groups.max()) + 1,
        **_facts(matrix, parameters, home),
        **({} if matrix.verdicts is None else {"verifiers": _verifier_facts(matrix)}),
        "epochs": epochs,
        "plan_optimism": round(optimism, 4),
        "forest_gain": gain,
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_with_embeddings": round(time.perf_counter() - began, 1),
    }
    report("done", 1, 1)
    return RTRRouter(parameters, encoder)


def _choose_forest(
    home: OutOfFold, data: TrainingData, settings: RTRSettings
) -> tuple[RTRSettings, list[float]]:
    """Settings with or without the forest, by what choices are worth on folds that a mixture did not see."""
    if "forest" not in settings.heads:
        return settings, []
    without = without_forest(settings)
    correct, cost = data.correct.double().numpy(), data.cost.double().numpy()
    known = ~np.isnan(correct) & ~np.isnan(cost)
    budgets = budgets_of(correct, cost)
    values = []
    for each, side in ((without, home), (settings, home.with_forest())):
        accuracy = torch.zeros_like(data.correct)
        heads = [side.logits[name] for name in each.heads]
        for half in (0, 1):
            rows = home.folds % 2 == half
            mixture = CalibratedMixture.fit(
                [head[~rows] for head in heads], data.correct[~rows], calibrate=settings.calibrate
            )
            accuracy[rows] = mixture([head[rows] for head in heads])
        predicted = np.where(known, accuracy.double().numpy(), -np.inf)
        dollars = np.where(known, side.cost.double().numpy(), 0.0)
        values.append(accuracy_at(choices_by_weight(predicted, dollars), correct, cost, budgets))
    gains = values[1] - values[0]
    gain, error = float(gains.mean()), float(gains.std() / len(gains) ** 0.5)
    return (settings if gain > FOREST_DOUBT * error else without), [round(gain, 5), round(error, 5)]


def without_forest(settings: RTRSettings) -> RTRSettings:
    return replace(settings, heads=tuple(name for name in settings.heads if name != "forest"))


def _choose_sharing(
    matrix: OutcomeMatrix, home: OutOfFold, data: TrainingData, settings: RTRSettings
) -> Tensor | None:
    """How far arms share, by the log loss of out-of-fold predictions; None for not at all."""
    if not settings.arms:
        return None
    found, least = None, float("inf")
    candidates = [smoother(matrix.pairs, data.correct.shape[1], width) for width in BANDWIDTHS]
    for weights in [None, *candidates] if candidates[0] is not None else []:
        side = home if weights is None else home.shared(weights)
        heads = [side.logits[name] for name in settings.heads]
        mixture = CalibratedMixture.fit(heads, data.correct, calibrate=settings.calibrate)
        loss = log_loss(log_odds(mixture(heads)), data.correct)
        if loss < least:
            found, least = weights, loss
    return found


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


def _training_data(matrix: OutcomeMatrix, embeddings: Tensor, plans: list[IndexedPlan]) -> TrainingData:
    correct, cost = _plan_outcomes(matrix, plans)
    log_tokens = torch.from_numpy(np.log(np.maximum(matrix.tokens, 1.0))).float()
    return TrainingData(
        embeddings, correct, cost, log_tokens, torch.from_numpy(matrix.truncated), COST_WEIGHTS
    )


def _plan_outcomes(
    matrix: OutcomeMatrix, plans: list[IndexedPlan], spent: Array | None = None
) -> tuple[Tensor, Tensor]:
    """Correct and dollars of every column [Q, M]; NaN where the pair, or one of the plan, was not asked.

    spent: seconds in place of dollars, of pairs [Q, P].
    """
    count = len(matrix.pairs)
    correct, cost = (np.full((len(matrix), len(plans)), np.nan) for _ in range(2))
    known = matrix.with_verdicts(spent)
    correct[:, :count], cost[:, :count] = (each[:, :count] for each in known[:2])
    asked = ~np.isnan(correct[:, :count]) & ~np.isnan(cost[:, :count])
    for column, plan in enumerate(plans[count:], count):
        rows = asked[:, [number for number in plan[0] if number < count]].all(1)
        for number in plan[0]:
            if number >= count:
                rows &= matrix.verdict_known(number)
        result = simulate(plan, *(each[rows] for each in known))
        correct[rows, column], cost[rows, column], _ = result
    return torch.from_numpy(correct).float(), torch.from_numpy(cost).float()


def _plan_seconds(matrix: OutcomeMatrix, plans: list[IndexedPlan]) -> Tensor | None:
    """Seconds of every column, as `_plan_outcomes` finds its dollars [Q, M]; None where none are known."""
    if np.isnan(matrix.seconds).all():
        return None
    return _plan_outcomes(matrix, plans, matrix.seconds)[1]


def _columns(
    pairs: tuple[Pair, ...], plans: list[IndexedPlan], descriptions: Mapping[str, str], encoder: Encoder
) -> Columns:
    models = list(dict.fromkeys(pair.model for pair in pairs))
    strategies = list(dict.fromkeys(pair.strategy for pair in pairs))
    members = torch.zeros(len(plans), len(pairs))
    for column, (order, _) in enumerate(plans):
        answering = [number for number in order if number < len(pairs)]
        members[column, answering] = 1 / len(answering)
    embedded = [
        encoder([descriptions.get(name, name) for name in names]).float() for names in (models, strategies)
    ]
    of_pair = [[models.index(pair.model), strategies.index(pair.strategy)] for pair in pairs]
    return Columns(embedded[0], embedded[1], torch.tensor(of_pair), members)


def _verifier_facts(matrix: OutcomeMatrix) -> list[dict[str, Any]]:
    assert matrix.verdicts is not None
    return verifier_facts(matrix.verdicts, matrix.pairs, matrix.correct)


def _fit_parameters(
    matrix: OutcomeMatrix,
    plans: list[IndexedPlan],
    data: TrainingData,
    columns: Columns,
    predictions: tuple[OutOfFold, OutOfFold | None],
    epochs: int,
    optimism: float,
    settings: RTRSettings,
) -> RouterParameters:
    """Heads fitted on all questions, and what out-of-fold predictions, home and away, say about them.

    optimism: by how much the accuracy of plans looks too high.
    """
    out_of_fold = predictions[0]
    heads = [out_of_fold.logits[name] for name in settings.heads]
    mixture = CalibratedMixture.fit(heads, data.correct, calibrate=settings.calibrate)
    # A pair that was asked some questions only, such as hard ones, is not known by its mean on these.
    filled = (_fill(data.correct, mixture(heads)), _fill(data.cost, out_of_fold.cost))
    lower = torch.zeros(len(plans))
    lower[len(matrix.pairs) :] = optimism
    filled = (filled[0] - lower, filled[1])
    mixture = mixture.lowered(lower, heads)
    prices, prompt_price = fit_prices(matrix)
    tokens = fit_token_quantiles(
        (out_of_fold.neighbour_tokens, out_of_fold.dual_tokens),
        log_characters(matrix.texts),
        data.log_tokens,
        data.truncated,
        prompt_price,
    )
    trust, facts, (accuracy, dollars) = _fit_trust(
        matrix, data, tokens, mixture, filled, predictions, settings
    )
    return RouterParameters(
        pairs=matrix.pairs,
        plans=tuple(Plan(tuple(map(matrix.pair_of, order)), need) for order, need in plans),
        embeddings=data.embeddings,
        correct=data.correct,
        cost=data.cost,
        columns=columns,
        logistic=LogisticHead.fit(data.embeddings, data.correct),
        dual=fit_dual(columns, data, epochs, settings),
        mixture=mixture,
        static_means=torch.stack([each.mean(0) for each in filled]),
        trust=trust,
        token_offsets=torch.zeros(len(matrix.pairs), 2),
        prices=prices,
        cost_weights=torch.tensor(COST_WEIGHTS, dtype=torch.float32),
        cost_ratios=cost_ratios(accuracy, dollars, data.cost),
        settings=settings,
        facts=facts,
        tokens=tokens,
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
        "unseen": {
            "log_loss": round(log_loss(log_odds(probabilities), correct), 4),
            "ece": round(calibration_error(probabilities, correct), 4),
        },
        "shares": {
            name: round(float(share), 3) for name, share in zip(names, parameters.mixture.shares, strict=True)
        },
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }


def _fit_trust(
    matrix: OutcomeMatrix,
    data: TrainingData,
    tokens: TokenQuantiles,
    mixture: CalibratedMixture,
    filled: tuple[Tensor, Tensor],
    predictions: tuple[OutOfFold, OutOfFold | None],
    settings: RTRSettings,
) -> tuple[Trust, dict[str, Any], tuple[Tensor, Tensor]]:
    """Trust, why, and accuracy and dollars of the known questions as they are predicted with it, each [Q, M].

    filled: outcomes without holes, as `_fill` makes them.
    """
    home, away = predictions
    accuracy = mixture([home.logits[name] for name in settings.heads])
    if away is None:
        return heads_alone(len(matrix), len(matrix.pairs)), {}, (accuracy, home.cost)
    widening = quantile_excess(
        tokens,
        (away.neighbour_tokens, away.dual_tokens),
        log_characters(matrix.texts),
        data.log_tokens,
        data.truncated,
    )
    limits = limits_of(closeness_of(home.similarity, home.similarity[home.nearest]))
    known, unknown = (_predicted(each, mixture, filled, data, settings) for each in (home, away))
    trust, facts = fit_trust(known, unknown, limits, home.similarity, widening)
    means = [fold_means(each, home.folds) for each in filled]
    share = trust.shares[1]
    accuracy, dollars = (
        share * each + (1 - share) * mean for each, mean in zip((accuracy, home.cost), means, strict=True)
    )
    return trust, {"trust": facts}, (accuracy, dollars)


def _predicted(
    side: OutOfFold,
    mixture: CalibratedMixture,
    filled: tuple[Tensor, Tensor],
    data: TrainingData,
    settings: RTRSettings,
) -> Predicted:
    """Predictions and the means of the other folds, beside outcomes."""
    heads = mixture([side.logits[name] for name in settings.heads])
    means = [fold_means(each, side.folds) for each in filled]
    tensors = (heads, side.cost, *means, data.correct, data.cost)
    return Predicted(side.folds.numpy(), *(each.double().numpy() for each in tensors))


def _fill(values: Tensor, predicted: Tensor) -> Tensor:
    """Known outcomes, and in their holes what other questions' outcomes predict."""
    return torch.where(values.isnan(), predicted, values)
