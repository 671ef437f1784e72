"""Routers without features: one model for all tokens, a recorded trace, or random choice.

`AlwaysSmall` and `AlwaysLarge` are the end points of every accuracy/cost curve, `RandomRouter` is the
baseline between them; `ReplayRouter` repeats the decisions of a trace, to measure or to compare decoders with
equal decisions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from viaticum.errors import InputError
from viaticum.routers.token.base import Step, TokenRouter, to_device


class AlwaysSmall(TokenRouter):
    """The SLM decodes everything; the LLM is never called."""

    depends_on_token = False

    def keep_small(self, step: Step) -> Tensor:
        return torch.ones_like(step.entropy, dtype=torch.bool)

    def hand_back(self, step: Step) -> Tensor:
        return torch.ones_like(step.entropy, dtype=torch.bool)


class AlwaysLarge(TokenRouter):
    """The LLM decodes everything; the SLM is called for drafts only, if the decoder drafts."""

    starts_small = False
    depends_on_token = False

    def keep_small(self, step: Step) -> Tensor:
        return torch.zeros_like(step.entropy, dtype=torch.bool)

    def hand_back(self, step: Step) -> Tensor:
        return torch.zeros_like(step.entropy, dtype=torch.bool)


class ReplayRouter(TokenRouter):
    """Repeats recorded decisions: the LLM decodes token i of request r if `large[r][i]`; then the SLM."""

    depends_on_token = False

    def __init__(self, large: Sequence[Sequence[bool]]) -> None:
        self._large = large

    def keep_small(self, step: Step) -> Tensor:
        return self._mask(step, ahead=0)

    def hand_back(self, step: Step) -> Tensor:
        return self._mask(step, ahead=1)

    def _mask(self, step: Step, ahead: int) -> Tensor:
        """True where the SLM decodes the token `ahead` of the current one, bool [B]."""
        small = [
            not (i + ahead < len(self._large[request]) and self._large[request][i + ahead])
            for request, i in zip(step.requests, step.positions, strict=True)
        ]
        return to_device(small, step.entropy.device)


class RandomRouter(TokenRouter):
    """The LLM decodes a random share of the tokens: one token at a time, then it hands back, as in R2R.

    The decision for a position of a request depends on the seed only.

    Args:
        share: of the tokens that the LLM decodes.
        seed: any integer.

    Raises:
        InputError: a share outside [0, 1].
    """

    multi_token_handoff = False
    depends_on_token = False

    def __init__(self, share: float, seed: int = 0) -> None:
        if not 0 <= share <= 1:
            raise InputError(f"a share is between 0 and 1, got {share}")
        self.share, self.seed = share, seed

    def keep_small(self, step: Step) -> Tensor:
        uniforms = [
            random.Random(f"{self.seed}:{request}:{position}").random()
            for request, position in zip(step.requests, step.positions, strict=True)
        ]
        return to_device([uniform >= self.share for uniform in uniforms], step.entropy.device)

    def hand_back(self, step: Step) -> Tensor:
        return torch.ones_like(step.entropy, dtype=torch.bool)
