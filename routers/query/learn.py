"""Changes to a fitted router: a pair that was never profiled, and outcomes of live runs.

`add` predicts for a new pair from the pairs with similar descriptions, and corrects that by the outcomes that
exist. `refit` fits again on all outcomes, and refuses a result that predicts live answers worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from viaticum.errors import DataError, InputError
from viaticum.quantiles import censored_quantile
from viaticum.routers.query.arms import curve_weights
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.fit import fit
from viaticum.routers.query.heads import QUANTILES, log_loss, log_odds
from viaticum.routers.query.out_of_fold import Report
from viaticum.routers.query.outcome_matrix import (
    MIN_QUESTIONS,
    OutcomeMatrix,
    assign_folds,
    near_duplicates,
)
from viaticum.routers.query.parameters import AddedPairs
from viaticum.routers.query.rtr import RTRRouter
from viaticum.routers.query.shared_text import without_shared
from viaticum.types import Pair

SIMILARITY_SCALE = 10.0  # a known pair has the weight exp(SIMILARITY_SCALE * sum of the two cosines)
CHARACTERS_A_TOKEN = 4.0  # of a question
WEIGHTS_PRIOR, OFFSET_PRIOR = 20.0, 1.0  # strength of the priors on weights and offset, in questions


def add(
    router: RTRRouter,
    pair: Pair,
    descriptions: Mapping[str, str],
    price: tuple[float, float],
    outcomes: OutcomeMatrix | None = None,
) -> RTRRouter:
    """Return the router with one more pair; the predictions for the others stay the same.

    The log-odds of the new pair are a weighted sum of those of the known pairs plus an offset: at first by
    the similarity of descriptions, or, for an arm of a known model such as another thinking budget, by its
    place on the curve of the known arms; outcomes (20 to 100 are enough) correct both.

    Args:
        router: a fitted router.
        pair: the new pair.
        descriptions: of models and strategies by name; the name stands for one that is missing.
        price: dollars a million input and output tokens.
        outcomes: outcomes of the pair, if there are any.

    Raises:
        InputError: the router knows the pair.
        DataError: the outcomes are not about the pair, or leave out the questions' texts; the router knows no
            tokens.
    """
    if pair in router.pairs:
        raise InputError(f"the router knows {pair}; fit it again to change what it knows")
    if not bool(router.parameters.has_tokens.any()):
        raise DataError(
            "the router was fitted on a table without output_tokens, so that it cannot tell what another "
            "pair costs; fit it on outcomes of that pair too"
        )
    similarity = _description_similarity(router, pair, descriptions)
    weights, lengths = curve_weights(pair, router.parameters.pairs) or (similarity, similarity)
    offset, token_offsets = torch.zeros(1), torch.zeros(2)
    if outcomes is not None:
        weights, offset, token_offsets = _correct_by_outcomes(router, pair, (weights, lengths), outcomes)
    prices = _expected_prices(router, price, lengths)
    rows = [each[None] for each in (token_offsets, prices, _mean_seconds(pair, outcomes))]
    added = AddedPairs((pair,), weights[None], offset, lengths[None], *rows)
    before = router.parameters.added
    parameters = replace(router.parameters, added=added if before is None else before.concat(added))
    return RTRRouter(parameters, router.encoder)


def _mean_seconds(pair: Pair, outcomes: OutcomeMatrix | None) -> Tensor:
    """Of the pair's answers, a scalar; NaN where none is known."""
    seconds = np.zeros(0) if outcomes is None else outcomes.seconds[:, outcomes.pairs.index(pair)]
    known = seconds[~np.isnan(seconds)]
    return torch.tensor(known.mean() if len(known) else float("nan"), dtype=torch.float32)


def _description_similarity(router: RTRRouter, pair: Pair, descriptions: Mapping[str, str]) -> Tensor:
    """Weights of the known pairs by the similarity of descriptions, which sum to 1 [P]."""
    columns = router.parameters.columns
    embedded = router.encoder([descriptions.get(name, name) for name in (pair.model, pair.strategy)]).float()
    models, strategies = columns.models @ embedded[0], columns.strategies @ embedded[1]
    similarity = models[columns.of_pair[:, 0]] + strategies[columns.of_pair[:, 1]]
    return torch.softmax(SIMILARITY_SCALE * similarity, 0)


def _correct_by_outcomes(
    router: RTRRouter, pair: Pair, prior: tuple[Tensor, Tensor], outcomes: OutcomeMatrix
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [P] and offset [1] of the log-odds, and what to add to log tokens [2].

    prior: weights of the known pairs' log-odds and log tokens without outcomes, each [P].
    """
    if pair not in outcomes.pairs:
        raise DataError(f"the outcomes say nothing about {pair}")
    column, count = outcomes.pairs.index(pair), len(router.parameters.pairs)
    known = outcomes.select(~np.isnan(outcomes.correct[:, column]))
    known.check_texts()
    prediction = router.predict_texts(known.texts)
    weights, offset = _fit_towards_prior(
        log_odds(prediction.accuracy[:, :count]),
        torch.from_numpy(known.correct[:, column]).float(),
        prior[0],
    )
    log_tokens = torch.from_numpy(np.log(np.maximum(known.tokens[:, column], 1.0))).float()
    expected = torch.einsum("npk,p->nk", prediction.tokens[:, :count].log(), prior[1])
    residual = log_tokens[:, None] - expected
    if bool(residual.isnan().all()):
        return weights, offset, torch.zeros(2)
    counted = ~residual[:, 0].isnan()
    cut = known.truncated[:, column][counted.numpy()]
    quantiles = [
        censored_quantile(residual[counted, n].double().numpy(), cut, level)
        for n, level in enumerate(QUANTILES)
    ]
    return weights, offset, torch.tensor(quantiles)


def _fit_towards_prior(logits: Tensor, correct: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [P] and offset [1] of a logistic regression on log-odds [n, P], shrunk to `prior` and 0."""
    weights, offset = prior.clone().requires_grad_(), torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, offset], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logits @ weights + offset, correct, reduction="sum")
        loss = loss + WEIGHTS_PRIOR * (weights - prior).square().sum()
        loss = loss + 0.5 * OFFSET_PRIOR * offset.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach(), offset.detach()


def _expected_prices(router: RTRRouter, price: tuple[float, float], similarity: Tensor) -> Tensor:
    """Dollars of a prompt and of an output token [2].

    A prompt costs what it costs with the known pairs, scaled by the ratio of the output prices. Where these
    are free it is as long as the questions are on average.
    """
    known, fitted = router.parameters.prices, router.parameters.tokens
    per_token = price[1] / 1e6
    typical = float(similarity @ known[:, 1])
    if typical > 0:
        # Weights of a curve that goes on beyond its arms may be negative.
        per_prompt = max(0.0, float(similarity @ known[:, 0]) * per_token / typical)
    else:
        characters = 0.0 if fitted is None else float(fitted.characters.mean())
        per_prompt = price[0] / 1e6 * characters / CHARACTERS_A_TOKEN
    return torch.tensor([per_prompt, per_token])


@dataclass(frozen=True)
class RefitResult:
    """Both routers on live outcomes that neither was fitted on.

    Args:
        before, after: mean negative log-likelihood in nats.
        live: number of live outcomes.
        router: the new router; None where it is worse.
    """

    before: float
    after: float
    live: int
    router: RTRRouter | None


def refit(
    router: RTRRouter,
    known: OutcomeMatrix,
    live: OutcomeMatrix,
    encoder: Encoder,
    descriptions: Mapping[str, str] | None = None,
    *,
    report: Report = lambda stage, done, total: None,
) -> RefitResult:
    """Fit again on known and live outcomes, and check whether live answers are predicted better.

    Half of the live questions, near-duplicates together, are held out for the check.

    Args:
        router: the router in use.
        known: the outcomes that it was fitted on.
        live: outcomes since, with the same pairs.
        encoder: embeds questions and descriptions.
        descriptions: as in `fit`.
        report: called with the progress.

    Raises:
        InputError: known and live outcomes have other pairs.
        DataError: too few live outcomes for the check.
    """
    if known.pairs != live.pairs:
        raise InputError("known and live outcomes must be laid out for the same pairs")
    count = int((~np.isnan(live.correct)).sum())
    if count < MIN_QUESTIONS:
        raise DataError(f"{count} live outcomes; {MIN_QUESTIONS} or more can tell whether a refit is better")
    settings = router.parameters.settings
    held_out = assign_folds(near_duplicates(without_shared(live.texts)), 2, settings.seed) == 0
    test = live.select(held_out)
    trial = fit(known.concat(live.select(~held_out)), encoder, descriptions, settings=settings, report=report)
    correct = torch.from_numpy(test.correct).float()
    before, after = (log_loss(log_odds(_pair_probabilities(each, test)), correct) for each in (router, trial))
    if after > before:
        return RefitResult(before, after, count, None)
    final = fit(known.concat(live), encoder, descriptions, settings=settings, report=report)
    return RefitResult(before, after, count, final)


def _pair_probabilities(router: RTRRouter, matrix: OutcomeMatrix) -> Tensor:
    """Probabilities of the matrix's pairs [N, P]; for an unknown pair the mean over the router's columns."""
    accuracy = router.predict_texts(matrix.texts).accuracy
    columns = dict(zip(router.pairs, router.pair_columns, strict=True))
    mean = accuracy.mean(1)
    return torch.stack([accuracy[:, columns[pair]] if pair in columns else mean for pair in matrix.pairs], 1)
