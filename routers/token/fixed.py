"""Routers that look at nothing: one model for all tokens, a recorded trace, or chance.

The first two are the ends of every accuracy/cost curve, `RandomRouter` is the control that lies between them; `ReplayRouter` repeats
who wrote what, to measure or to compare decoders on equal decisions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from viaticum.errors import InputError
from viaticum.routers.token.base import Step, TokenRouter


class AlwaysSmall(TokenRouter):
    """The SLM writes everything; the LLM is never called."""

    depends_on_token = False

    def keep_small(self, step: Step) -> Tensor:
        return torch.ones_like(step.entropy, dtype=torch.bool)

    def hand_back(self, step: Step) -> Tensor:
        return torch.ones_like(step.entropy, dtype=torch.bool)


class AlwaysLarge(TokenRouter):
    """The LLM writes everything; the SLM is called for drafts alone, where the decoder is told to draft."""

    starts_small = False
    depends_on_token = False

    def keep_small(self, step: Step) -> Tensor:
        return torch.zeros_like(step.entropy, dtype=torch.bool)

    def hand_back(self, step: Step) -> Tensor:
        return torch.zeros_like(step.entropy, dtype=torch.bool)


class ReplayRouter(TokenRouter):
    """`large[r][i]` says whether the LLM writes token i of request r; past its end, the SLM writes."""

    depends_on_token = False

    def __init__(self, large: Sequence[Sequence[bool]]) -> None:
        self._large = large

    def keep_small(self, step: Step) -> Tensor:
        return self._mask(step, ahead=0)

    def hand_back(self, step: Step) -> Tensor:
        return self._mask(step, ahead=1)

    def _mask(self, step: Step, ahead: int) -> Tensor:
        """True where the SLM writes the token `ahead` of the one at hand."""
        small = [
            not (at + ahead < len(self._large[request]) and self._large[request][at + ahead])
            for request, at in zip(step.requests, step.positions, strict=True)
        ]
        return torch.tensor(small, device=step.entropy.device)


class RandomRouter(TokenRouter):
    """The LLM writes this share of the tokens, wherever it falls: one token, then it hands back, as in R2R.

    A place of a request is always decided alike for the same seed. Raises `InputError` for what is no share.
    """

    multi_token_handoff = False
    depends_on_token = False

    def __init__(self, share: float, seed: int = 0) -> None:
        if not 0 <= share <= 1:
            raise InputError(f"a share is between 0 and 1, got {share}")
        self.share, self.seed = share, seed

    def keep_small(self, step: Step) -> Tensor:
        drawn = [
            random.Random(f"{self.seed}:{request}:{at}").random()
            for request, at in zip(step.requests, step.positions, strict=True)
        ]
        return torch.tensor([each >= self.share for each in drawn], device=step.entropy.device)

    def hand_back(self, step: Step) -> Tensor:
        return torch.ones_like(step.entropy, dtype=torch.bool)
