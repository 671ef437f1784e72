"""What prompts and tokens of a pair cost, from the costs of an outcome table.

A pair of models (token-level decoding) has no price of its own, and an outcome table states what calls cost,
not at which prices. Leaves out how many tokens an answer has (`token_quantiles`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from viaticum.routers.query.outcome_matrix import Array, OutcomeMatrix


def fit_prices(matrix: OutcomeMatrix) -> tuple[Tensor, Tensor]:
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
