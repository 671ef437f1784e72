"""R2R's rule (arXiv 2505.21600): the LLM decodes single tokens where the SLM's would diverge.

A base class; a subclass estimates in `score` whether a token diverges (a trained network, a rule).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from viaticum.errors import InputError
from viaticum.routers.token.base import Step, TokenRouter


class DivergenceRouter(TokenRouter):
    """Drops the SLM's token where `score` is above the threshold; the LLM decodes it and hands back.

    A subclass implements `score`, e.g. the probability that the token changes where the text leads; it may
    read `step.hidden` [B, D], `step.top_logits()` [B, 100] and `step.tokens` [B], all on the model's device.

    Args:
        threshold: of the score, a probability.

    Raises:
        InputError: a threshold outside [0, 1].
    """

    needs_hidden = True
    multi_token_handoff = False

    def __init__(self, threshold: float = 0.5) -> None:
        if not 0 <= threshold <= 1:
            raise InputError(f"the threshold is a probability between 0 and 1, got {threshold}")
        self.threshold = threshold

    @abstractmethod
    def score(self, step: Step) -> Tensor:
        """Probability that each row's token diverges: float [B] in [0, 1]."""

    def keep_small(self, step: Step) -> Tensor:
        return (self.score(step) if step.scores is None else step.scores) <= self.threshold

    def hand_back(self, step: Step) -> Tensor:
        return torch.ones_like(step.entropy, dtype=torch.bool)
