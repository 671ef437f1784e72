"""R2R's rule (arXiv 2505.21600): the LLM writes the one token at which the SLM would diverge, then it is the SLM's turn.

A base class: what tells that a token diverges (a trained network, a rule) is its `score`.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from viaticum.errors import InputError
from viaticum.routers.token.base import Step, TokenRouter


class DivergenceRouter(TokenRouter):
    """The SLM's token is dropped where `score` is above the threshold; the LLM writes that place and hands back.

    A subclass writes `score`, e.g. the probability that the token changes where the text leads; it may read
    `step.hidden` [B, D], `step.top_logits()` [B, 100] and `step.tokens` [B], all on the model's device.
    """

    needs_hidden = True
    multi_token_handoff = False

    def __init__(self, threshold: float = 0.5) -> None:
        if not 0 <= threshold <= 1:
            raise InputError(f"the threshold is a probability between 0 and 1, got {threshold}")
        self.threshold = threshold

    @abstractmethod
    def score(self, step: Step) -> Tensor:
        """How likely each row's token diverges: float [B] in [0, 1]."""

    def keep_small(self, step: Step) -> Tensor:
        return (self.score(step) if step.scores is None else step.scores) <= self.threshold

    def hand_back(self, step: Step) -> Tensor:
        return torch.ones_like(step.entropy, dtype=torch.bool)
