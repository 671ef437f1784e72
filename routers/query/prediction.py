"""What the learned query router predicts for some questions. Leaves out how: `viaticum.routers.query.rtr`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

SAME_TEXT = 0.9999  # cosine of two embeddings of one text; a router keeps them in half precision


class Prediction(NamedTuple):
    """Predictions for N questions.

    Args:
        accuracy: probability of a correct answer [N, M].
        cost: expected dollars, as columns are compared (`calibration.without_small_savings`) [N, M].
        tokens: output tokens of the pairs, median and 90% quantile [N, P, 2].
        trust: 0 far from all known questions, 1 among them [N].
        prompt: dollars by which its prompt differs from a usual one, by pair [N, P].
        more_prompt: dollars by which the prompts of a plan differ from those of the nearest known questions,
            without pairs that were added [N, M].
        indices: the nearest known questions [N, K].
        nearest: cosine of the nearest one [N].
        seconds: expected, of every column; NaN where none are known [N, M].
        own_cost: expected dollars of each column for itself [N, M].
    """

    accuracy: Tensor
    cost: Tensor
    tokens: Tensor
    trust: Tensor
    indices: Tensor
    prompt: Tensor
    more_prompt: Tensor
    nearest: Tensor
    seconds: Tensor
    own_cost: Tensor

    @property
    def seen(self) -> Tensor:
        """Which questions the router was fitted on, as far as its encoder can tell texts apart [N]."""
        return self.nearest > SAME_TEXT
