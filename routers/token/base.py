"""The contract of a token router, and the entropy that most of them look at.

A router decides and does nothing else: no sampling, no cache, no model call. It is asked once a step for
the whole batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Normalised entropy H = -sum(p ln p) / ln|V| of logits [B, V], in [0, 1]; float32 [B].

    R-Stitch, arXiv 2507.17307, equation 1. H is 1 where all tokens are equally likely.
    """
    logs = torch.log_softmax(logits.float(), dim=-1)
    return -(logs.exp() * logs).nan_to_num(0.0).sum(-1) / math.log(logits.shape[-1])


@dataclass(frozen=True, slots=True)
class Step:
    """What a router sees of one step: row i belongs to request `requests[i]`.

    logits: float32 [B, V] of the model that has the pen; entropy: its normalised entropy [B];
    positions: how many output tokens each request already has; tokens: the token each row would take.
    """

    logits: Tensor
    entropy: Tensor
    requests: Sequence[int]
    positions: Sequence[int]
    tokens: Sequence[int]


class TokenRouter(ABC):
    """Decides token by token between a small model (SLM) and a large one (LLM)."""

    starts_small: bool = True

    @abstractmethod
    def keep_small(self, step: Step) -> Tensor:
        """The SLM proposes `step.tokens`: bool [B], True keeps the token, False gives the LLM the pen."""

    @abstractmethod
    def hand_back(self, step: Step) -> Tensor:
        """The LLM wrote `step.tokens`, which are kept: bool [B], True returns the pen to the SLM."""
