"""The contract of a token router, and the entropy that most of them look at.

A router decides and does nothing else: no sampling, no cache, no model call. It is asked once a model call
for the whole batch, on the device: it should give tensors back and never read one on the host.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 100  # logits that R2R's router reads
BLOCK = 128  # neighbouring logits that are looked at together
NOTHING = -200.0  # e to this power is 0 in float32, and 0 times it is no NaN as 0 times -inf is
IN_CACHE = 2  # rows of logits whose passes stay in a core's cache: 3 times as fast as 64 rows of 152k at once


def entropy(logits: Tensor) -> Tensor:
    """Normalised entropy H = -sum(p ln p) / ln|V| of logits [B, V], in [0, 1]; float32 [B].

    R-Stitch, arXiv 2507.17307, equation 1. H is 1 where all tokens are equally likely.
    """
    if logits.device.type == "cpu" and len(logits) > IN_CACHE:
        return torch.cat([entropy(part) for part in torch.split(logits, IN_CACHE)])
    # With x the logits below the largest: -sum(p ln p) = ln(sum(e^x)) - sum(x e^x) / sum(e^x), in fewer passes than ln p.
    below = (logits.float() - logits.amax(-1, keepdim=True)).clamp_min_(NOTHING)
    weights = below.exp()
    whole = weights.sum(-1)
    return (whole.log() - weights.mul_(below).sum(-1) / whole) / math.log(logits.shape[-1])


def argmax_token(logits: Tensor) -> Tensor:
    """The token with the largest logit, the first of equals: int64 [B], of logits [B, V].

    As `argmax`, which on a CPU takes six times as long as the largest value itself: so by blocks there.
    """
    rows, size = logits.shape
    if logits.device.type != "cpu" or size % BLOCK:
        return logits.argmax(-1)
    body = logits.reshape(rows, -1, BLOCK)
    block = body.amax(-1).argmax(-1)
    return block * BLOCK + body[torch.arange(rows), block].argmax(-1)


def top_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row, sorted downwards, and their tokens: both [B, count] of [B, V], or all where V is less.

    The blocks with the largest maxima hold them all, so that only a few have to be sorted: on a CPU a third of the
    time of `topk` over 152k logits.
    """
    rows, size = logits.shape
    count, blocks = min(count, size), size // BLOCK
    if blocks <= 2 * count:
        values, places = logits.topk(count)
        return values, places
    body, first = logits[:, : blocks * BLOCK].view(rows, blocks, BLOCK), blocks * BLOCK
    best = body.amax(-1).topk(count, sorted=False).indices
    found = body.gather(1, best[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    values, places = torch.cat((found, logits[:, first:]), 1).topk(count)
    # A place among the blocks that were found, or behind them in what no block holds.
    of_block = best.gather(1, (places // BLOCK).clamp_max(count - 1)) * BLOCK + places % BLOCK
    return values, torch.where(places < count * BLOCK, of_block, places - count * BLOCK + first)


def second_choice(best: Tensor, tokens: Tensor) -> Tensor:
    """The most likely token beside the one at hand: int64 [B], of the most likely ones [B, 2 or more] and tokens [B]."""
    return torch.where(best[:, 0] == tokens, best[:, 1], best[:, 0])


@dataclass(frozen=True, slots=True)
class Step:
    """What a router sees of one model call: row i is a place in the text of request `requests[i]`.

    logits: float32 [B, V] of the model that has the pen; entropy: its normalised entropy [B];
    positions: how many output tokens each text has before that place; tokens: int64 [B], what each row would
    take; hidden: the last hidden states [B, D] that the logits come from, for `keep_small` of a router that
    `needs_hidden`; scores: what the router's own `score` gave for this step [B], or None.

    Where the LLM verifies a draft a request has several rows, one a place; the rows after a token that differs
    from the draft are asked in vain, so an answer must depend on its own row alone.
    """

    logits: Tensor
    entropy: Tensor
    requests: Sequence[int]
    positions: Sequence[int]
    tokens: Tensor
    hidden: Tensor | None = None
    scores: Tensor | None = None

    def top_logits(self, count: int = TOP) -> Tensor:
        """The largest logits, sorted downwards: [B, count] (R2R's router reads 100)."""
        return top_tokens(self.logits, count)[0]


class TokenRouter(ABC):
    """Decides token by token between a small model (SLM) and a large one (LLM).

    starts_small: who has the pen first. needs_hidden: whether `keep_small` reads `step.hidden`.
    large_stretches: False where `hand_back` is always True, so that drafting for the LLM is of no use.
    looks_at_tokens: whether `keep_small` depends on the token drawn, and not on its distribution alone; where
    it does, a dropped token is no fair draw any more and is not reused as a draft of sampled text.
    """

    starts_small: bool = True
    needs_hidden: bool = False
    multi_token_handoff: bool = True
    depends_on_token: bool = True

    @abstractmethod
    def keep_small(self, step: Step) -> Tensor:
        """The SLM proposes `step.tokens`: bool [B], True keeps the token, False gives the LLM the pen."""

    @abstractmethod
    def hand_back(self, step: Step) -> Tensor:
        """The LLM wrote `step.tokens`, which are kept: bool [B], True returns the pen to the SLM."""

    def score(self, step: Step) -> Tensor | None:
        """Numbers [B] behind `keep_small`, asked before it and kept in the trace; None where there are none."""
        return None
