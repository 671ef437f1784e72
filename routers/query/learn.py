"""Learning on: a pair that was never profiled, and outcomes of live runs.

`add` describes a new pair by those that are described alike, and corrects that by as many outcomes as there are.
`refit` learns anew from all outcomes, and says no where that would make live answers worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from viaticum.errors import DataError, InputError
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.fit import Report, fit
from viaticum.routers.query.heads import log_loss, log_odds
from viaticum.routers.query.outcome_matrix import FEWEST, OutcomeMatrix, assign_folds, near_duplicates
from viaticum.routers.query.rtr import Added, RTRRouter
from viaticum.types import Pair

ALIKE = 10.0  # a known pair counts exp(ALIKE * cosine) times, summed over model and strategy
STAY = (
    20.0,
    1.0,
)  # questions that the description is worth, for the weights of the known pairs and for the offset


def add(
    router: RTRRouter,
    pair: Pair,
    descriptions: Mapping[str, str],
    price: tuple[float, float],
    outcomes: OutcomeMatrix | None = None,
) -> RTRRouter:
    """The router with one more pair, nothing else changed. price: dollars a million input and output tokens.

    Its log-odds are a weighted sum of those of the known pairs plus an offset: to begin with the pairs whose
    descriptions are alike; `outcomes` of the pair (20 to 100 do) move both. Raises `InputError` for a pair that the
    router knows, `DataError` for outcomes that are not about it.
    """
    if pair in router.pairs:
        raise InputError(f"the router knows {pair}; fit it again to change what it knows")
    learned = router.learned
    weights = likeness = _alike(router, pair, descriptions)
    offset, lengths = torch.zeros(1), torch.zeros(2)
    rate = _rate(router, pair, price, weights)
    if outcomes is not None:
        if pair not in outcomes.pairs:
            raise DataError(f"the outcomes say nothing about {pair}")
        column = outcomes.pairs.index(pair)
        known = outcomes.select(~np.isnan(outcomes.correct[:, column]))
        told = router.predict_texts(known.texts)
        count = len(learned.pairs)
        weights, offset = _corrected(
            log_odds(told.accuracy[:, :count]), torch.from_numpy(known.correct[:, column]).float(), weights
        )
        made = torch.from_numpy(np.log(np.maximum(known.tokens[:, column], 1.0))).float()
        expected = _lengths(told.tokens[:, :count].log(), likeness)
        beyond = made[:, None] - expected
        if not bool(beyond.isnan().all()):
            levels = zip(range(2), (0.5, 0.9), strict=True)
            lengths = torch.stack([torch.nanquantile(beyond[:, n], level) for n, level in levels])
    one = Added((pair,), weights[None], offset, likeness[None], lengths[None], rate[None])
    return RTRRouter(
        replace(learned, added=one if learned.added is None else learned.added.join(one)), router.encoder
    )


def _alike(router: RTRRouter, pair: Pair, descriptions: Mapping[str, str]) -> Tensor:
    """Shares of the known pairs [P] by the likeness of descriptions; they sum to 1."""
    columns = router.learned.columns
    told = router.encoder([descriptions.get(name, name) for name in (pair.model, pair.strategy)]).float()
    models, strategies = columns.models @ told[0], columns.strategies @ told[1]
    alike = models[columns.of_pair[:, 0]] + strategies[columns.of_pair[:, 1]]
    return torch.softmax(ALIKE * alike, 0)


def _corrected(odds: Tensor, right: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [P] and offset [1] of a logistic regression on log-odds [n, P] that stays near the prior."""
    weights, offset = prior.clone().requires_grad_(), torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, offset], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.binary_cross_entropy_with_logits(odds @ weights + offset, right, reduction="sum")
        value = value + STAY[0] * (weights - prior).square().sum() + 0.5 * STAY[1] * offset.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach(), offset.detach()


def _lengths(log_tokens: Tensor, shares: Tensor) -> Tensor:
    """Quantiles of log tokens [n, 2] of a mix of pairs."""
    return torch.einsum("npk,p->nk", log_tokens, shares)


def _rate(router: RTRRouter, pair: Pair, price: tuple[float, float], shares: Tensor) -> Tensor:
    """Dollars of a prompt and of an output token [2]. A prompt costs what one costs known pairs, by the prices' ratio."""
    known = router.learned.rate
    each = price[1] / 1e6
    typical = float(shares @ known[:, 1])
    prompt = float(shares @ known[:, 0]) * each / typical if typical > 0 else 0.0
    return torch.tensor([prompt, each])


@dataclass(frozen=True)
class Refit:
    """before, after: mean negative log-likelihood of live outcomes that neither router had seen; live: how many."""

    before: float
    after: float
    live: int
    router: RTRRouter | None  # None: it got worse


def refit(
    router: RTRRouter,
    known: OutcomeMatrix,
    live: OutcomeMatrix,
    encoder: Encoder,
    descriptions: Mapping[str, str] | None = None,
    *,
    report: Report = lambda stage, done, of: None,
) -> Refit:
    """Learn anew from what was known and what came since; see whether live answers are foretold better.

    Half of the live questions (near-duplicates together) are held out for that. known and live have the same pairs.
    Raises `DataError` for fewer live outcomes than can tell.
    """
    if known.pairs != live.pairs:
        raise InputError("known and live outcomes must be laid out for the same pairs")
    count = int((~np.isnan(live.correct)).sum())
    if count < FEWEST:
        raise DataError(f"{count} live outcomes; {FEWEST} or more can tell whether a refit is better")
    groups = near_duplicates([*live.texts])
    out = assign_folds(groups, 2, router.learned.settings.seed) == 0
    trial = fit(
        known.join(live.select(~out)), encoder, descriptions, settings=router.learned.settings, report=report
    )
    right = torch.from_numpy(live.correct[out]).float()
    before, after = (log_loss(log_odds(_of_pairs(each, live.select(out))), right) for each in (router, trial))
    if after > before:
        return Refit(before, after, count, None)
    final = fit(known.join(live), encoder, descriptions, settings=router.learned.settings, report=report)
    return Refit(before, after, count, final)


def _of_pairs(router: RTRRouter, grid: OutcomeMatrix) -> Tensor:
    """Chances [N, P] of the grid's pairs; those that the router does not know are as likely as the mean of all."""
    told = router.predict_texts(grid.texts)
    columns = dict(zip(router.pairs, router.pair_columns, strict=True))
    mean = told.accuracy.mean(1)
    return torch.stack(
        [told.accuracy[:, columns[pair]] if pair in columns else mean for pair in grid.pairs], 1
    )
