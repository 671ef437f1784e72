"""Quantiles of output tokens for a question, from one index per pair.

The index is a location of the log tokens: a linear combination of the mean over the nearest known questions,
the median of the dual head (RTR, arXiv 2505.19435, section 3.2) and the logarithm of the question's length.
Around it the quantiles are those of the known answers with an index near it (a conformal prediction local in
the index, after Lei and Wasserman 2014), so that spread and shape may differ from short to long answers, and
a mixture of short answers and thoughts keeps its two sides. An answer that was cut says only that it would
have been longer: the index counts its expected length, the quantiles are those of Kaplan and Meier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from viaticum.quantiles import Array, censored_quantile, expected_beyond
from viaticum.routers.query.heads import QUANTILES, mean_known

KNOTS = 9
WINDOW = 0.3  # share of the known answers around a knot
MIN_WINDOW = 60
RIDGE = 10.0  # in answers
ROUNDS = 3  # of regression and expectation, where answers were cut


@dataclass(frozen=True)
class TokenQuantiles:
    """What was fitted, for P pairs and F = 3 features.

    Args:
        log_tokens: of the known questions, cut ones as expected; NaN where unknown [Q, P].
        characters: of the known questions [Q].
        weights, bias: of the features [P, F], [P].
        knots: values of the index, rising [P, K].
        offsets: added to the index at each knot, median and 90% quantile [P, K, 2].
        lengths: mean, least and largest log characters of the known questions [3].
        cut_at: tokens at which outputs were cut; NaN where none was [P].
        prompt_price: dollars of a character of the question [P].
    """

    log_tokens: Tensor
    characters: Tensor
    weights: Tensor
    bias: Tensor
    knots: Tensor
    offsets: Tensor
    lengths: Tensor
    cut_at: Tensor
    prompt_price: Tensor

    def __call__(self, neighbours: Tensor, dual: Tensor, log_chars: Tensor | None) -> Tensor:
        """Quantiles of log tokens [N, P, 2].

        Args:
            neighbours: means of the nearest known log tokens [N, P].
            dual: medians of the dual head [N, P].
            log_chars: logarithm of the characters of each question [N]; None for questions of usual length.
        """
        index = (self._features(neighbours, dual, log_chars) * self.weights).sum(-1) + self.bias
        return index[..., None] + self._offsets_at(index)

    def filled(self) -> Tensor:
        """Log tokens of the known questions; of a pair without any the mean of the others [Q, P]."""
        unknown = self.log_tokens.isnan().all(0)
        return torch.where(unknown, mean_known(self.log_tokens), self.log_tokens)

    def growth(self, log_chars: Tensor, to: Tensor | None) -> Tensor:
        """By how much tokens grow from questions of one length [N] to another; 0: not at all [N, P]."""
        if to is None:
            return torch.zeros(len(log_chars), len(self.weights), dtype=torch.float32)
        _, least, largest = self.lengths.tolist()
        longer = to.clamp(least, largest) - log_chars.clamp(least, largest)
        return torch.expm1(longer[:, None] * self.weights[:, 2])

    def _features(self, neighbours: Tensor, dual: Tensor, log_chars: Tensor | None) -> Tensor:
        mean, least, largest = self.lengths.tolist()
        length = torch.full_like(neighbours[:, 0], mean) if log_chars is None else log_chars
        length = length.clamp(least, largest) - mean
        return torch.stack((neighbours, dual, length[:, None].expand_as(neighbours)), -1)

    def _offsets_at(self, index: Tensor) -> Tensor:
        """Offsets between the knots around each index, linear; those of the ends outside them [N, P, 2]."""
        x = index.T.contiguous()  # [P, N]
        right = torch.searchsorted(self.knots, x).clamp(1, self.knots.shape[1] - 1)
        low, high = self.knots.gather(1, right - 1), self.knots.gather(1, right)
        share = ((x - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)[..., None]
        take = right[..., None].expand(-1, -1, len(QUANTILES))
        offsets = (1 - share) * self.offsets.gather(1, take - 1) + share * self.offsets.gather(1, take)
        return offsets.transpose(0, 1)


def log_characters(texts: Sequence[str]) -> Tensor:
    return torch.tensor([float(len(text) + 1) for text in texts], dtype=torch.float32).log()


def expected_log_tokens(log_tokens: Tensor, truncated: Tensor) -> Tensor:
    """Log tokens in which an output that was cut counts as what is expected of one so long [Q, P]."""
    filled = log_tokens.clone()
    for pair in range(log_tokens.shape[1]):
        known = ~log_tokens[:, pair].isnan()
        if bool(truncated[known, pair].any()):
            logs, cut = log_tokens[known, pair].double().numpy(), truncated[known, pair].numpy()
            middle = censored_quantile(logs, cut, 0.5)
            filled[known, pair] = torch.from_numpy(
                expected_beyond(logs, cut, np.full(len(logs), middle))
            ).float()
    return filled


def fit_token_quantiles(
    out_of_fold: tuple[Tensor, Tensor],
    log_chars: Tensor,
    log_tokens: Tensor,
    truncated: Tensor,
    prompt_price: Tensor,
) -> TokenQuantiles:
    """Fit weights, knots and offsets on out-of-fold predictions.

    Args:
        out_of_fold: neighbours' means and the dual head's medians, each [Q, P].
        log_chars: of the questions [Q].
        log_tokens: [Q, P]; NaN where unknown.
        truncated: outputs that were cut [Q, P].
        prompt_price: dollars of a character of the question [P].
    """
    lengths = torch.stack((log_chars.mean(), log_chars.min(), log_chars.max()))
    centred = (log_chars - lengths[0])[:, None].expand_as(log_tokens)
    features = torch.stack((*out_of_fold, centred), -1).double().numpy()
    logs, cut = log_tokens.double().numpy(), truncated.numpy()
    fitted = []
    for pair in range(logs.shape[1]):
        known = ~np.isnan(logs[:, pair])
        fitted.append(_fit_pair(features[known, pair], logs[known, pair], cut[known, pair]))
    weights, bias, knots, offsets = (
        torch.from_numpy(np.stack(each)).float() for each in zip(*fitted, strict=True)
    )
    cut_at = [
        float(np.exp(np.median(column[mask]))) if mask.any() else float("nan")
        for column, mask in zip(logs.T, (cut & ~np.isnan(logs)).T, strict=True)
    ]
    return TokenQuantiles(
        expected_log_tokens(log_tokens, truncated),
        log_chars.exp(),
        weights,
        bias,
        knots,
        offsets,
        lengths,
        torch.tensor(cut_at),
        prompt_price,
    )


def quantile_excess(
    fitted: TokenQuantiles,
    out_of_kind: tuple[Tensor, Tensor],
    log_chars: Tensor,
    log_tokens: Tensor,
    truncated: Tensor,
) -> Tensor:
    """By how much log tokens of unknown kinds of questions exceed their 90% quantiles in 9 of 10 cases [P].

    0 where the quantiles hold. out_of_kind: as `out_of_fold` of `fit_token_quantiles`, of heads that did not
    see the kind of a question.
    """
    high = fitted(*out_of_kind, log_chars)[..., 1]
    excess = (log_tokens - high).double().numpy()
    found = np.zeros(excess.shape[1])
    for pair, (column, cut) in enumerate(zip(excess.T, truncated.numpy().T, strict=True)):
        known = ~np.isnan(column)
        if known.any():
            found[pair] = max(0.0, censored_quantile(column[known], cut[known], QUANTILES[1]))
    return torch.from_numpy(found).float()


def _fit_pair(features: Array, logs: Array, cut: Array) -> tuple[Array, Array, Array, Array]:
    """Weights [F], bias, knots [K] and offsets [K, 2] of one pair with n answers."""
    count = len(logs)
    if count == 0:
        flat = np.zeros((KNOTS, len(QUANTILES)))
        return np.array([1.0, 0.0, 0.0]), np.zeros(()), np.arange(float(KNOTS)), flat
    means, target = features.mean(0), logs
    for _ in range(ROUNDS if cut.any() else 1):
        x = features - means
        # The prior is the mean over neighbours as it stands; scaled by the spread of each feature.
        prior, ridge = np.array([1.0, 0.0, 0.0]), RIDGE * np.diag(x.var(0) + 1e-6)
        weights = np.linalg.solve(x.T @ x + ridge, x.T @ (target - target.mean()) + ridge @ prior)
        index = target.mean() + x @ weights
        target = expected_beyond(logs, cut, index)
    knots, offsets = _local_offsets(index, logs, cut)
    return weights, np.asarray(target.mean() - means @ weights), knots, offsets


def _local_offsets(index: Array, logs: Array, cut: Array) -> tuple[Array, Array]:
    """Knots at the middles of windows of the sorted index, and the quantiles of what is left there."""
    order = np.argsort(index, kind="stable")
    index, residual, cut = index[order], (logs - index)[order], cut[order]
    size = min(len(index), max(MIN_WINDOW, round(WINDOW * len(index))))
    starts = np.linspace(0, len(index) - size, KNOTS).round().astype(int)
    knots = np.array([np.median(index[start : start + size]) for start in starts])
    offsets = [
        [
            censored_quantile(residual[start : start + size], cut[start : start + size], level)
            for level in QUANTILES
        ]
        for start in starts
    ]
    return np.maximum.accumulate(knots) + 1e-6 * np.arange(KNOTS), np.array(offsets)
