"""The interface of a token router, and the entropy that most routers use.

A router only decides: it does no sampling, owns no cache and calls no model. It is asked once a model call
for the whole batch, on the device: it should return tensors and never read one on the host.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOP = 100  # logits that R2R's router reads
BLOCK = 128  # adjacent logits that are reduced together
MIN_LOGIT = -200.0  # exp of it is 0 in float32, and 0 times it is 0, while 0 * -inf is NaN
ROWS_IN_CACHE = 2  # rows of logits that fit a core's cache: 3 times as fast as 64 rows of 152k at once


def to_device(
    values: Sequence[Any] | NDArray[Any], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers of the host as a tensor on a device, of torch's usual dtype for them unless one is given.

    The host does not wait: to CUDA they go from pinned memory, behind what was launched before. A copy from
    other memory, as of `torch.tensor(values, device=device)`, waits until all of that is done.
    """
    made = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def entropy(logits: Tensor) -> Tensor:
    """Normalised entropy H = -sum(p ln p) / ln|V| of logits [B, V], in [0, 1]; float32 [B].

    R-Stitch, arXiv 2507.17307, equation 1. H is 1 if all tokens are equally likely.
    """
    if logits.device.type == "cpu" and len(logits) > ROWS_IN_CACHE:
        return torch.cat([entropy(part) for part in torch.split(logits, ROWS_IN_CACHE)])
    # With x = logits - max(logits): -sum(p ln p) = ln(sum(e^x)) - sum(x e^x) / sum(e^x), in fewer passes than
    # ln p.
    shifted = (logits.float() - logits.amax(-1, keepdim=True)).clamp_min_(MIN_LOGIT)
    weights = shifted.exp()
    total = weights.sum(-1)
    return (total.log() - weights.mul_(shifted).sum(-1) / total) / math.log(logits.shape[-1])


def argmax_token(logits: Tensor) -> Tensor:
    """The token with the largest logit, the first of equals: int64 [B] of logits [B, V].

    As `argmax`, which on a CPU takes six times as long as `amax`; hence by blocks there.
    """
    size = logits.shape[-1]
    whole = size // BLOCK * BLOCK  # logits in complete blocks
    if logits.device.type != "cpu" or not whole:
        return logits.argmax(-1)
    best = logits[:, :whole].view(len(logits), whole // BLOCK, BLOCK).amax(-1)
    if whole < size:
        best = torch.cat((best, logits[:, whole:].amax(-1, keepdim=True)), 1)
    first = best.argmax(-1) * BLOCK
    inside = (first[:, None] + torch.arange(BLOCK)).clamp_max(size - 1)  # repeats the last logit
    found: Tensor = first + logits.gather(1, inside).argmax(-1)
    return found


def top_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row, descending, and their tokens: both [B, min(count, V)] of logits [B, V].

    The blocks with the largest maxima contain them all, so that only a few logits have to be sorted: on a CPU
    a third of the time of `topk` over 152k logits.
    """
    rows, size = logits.shape
    count, blocks = min(count, size), size // BLOCK
    if blocks <= 2 * count:
        values, tokens = logits.topk(count)
        return values, tokens
    body, tail = logits[:, : blocks * BLOCK].view(rows, blocks, BLOCK), blocks * BLOCK
    best = body.amax(-1).topk(count, sorted=False).indices
    found = body.gather(1, best[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    values, indices = torch.cat((found, logits[:, tail:]), 1).topk(count)
    # An index among the selected blocks, or after them among the logits that are in no block.
    in_block = best.gather(1, (indices // BLOCK).clamp_max(count - 1)) * BLOCK + indices % BLOCK
    return values, torch.where(indices < count * BLOCK, in_block, indices - count * BLOCK + tail)


def second_choice(best: Tensor, tokens: Tensor) -> Tensor:
    """The most likely token other than `tokens` [B], given the most likely ones [B, 2 or more]: int64 [B]."""
    return torch.where(best[:, 0] == tokens, best[:, 1], best[:, 0])


@dataclass(frozen=True, slots=True)
class Step:
    """What a router sees of one model call: row i is a position in the sequence of request `requests[i]`.

    When the large model verifies a draft a request has several rows, one a position; the answers for rows
    after a rejected draft token are not used, so an answer must depend on its own row only.

    Args:
        logits: of the active model, float32 [B, V].
        entropy: their normalised entropy, float32 [B].
        requests: index of each row's request.
        positions: output tokens of each sequence before the position.
        tokens: the token that each row would append, int64 [B].
        hidden: last hidden states [B, D] that the logits come from; for `keep_small` of a router with
            `needs_hidden`.
        scores: what the router's own `score` returned for this step [B], or None.
    """

    logits: Tensor
    entropy: Tensor
    requests: Sequence[int]
    positions: Sequence[int]
    tokens: Tensor
    hidden: Tensor | None = None
    scores: Tensor | None = None

    def top_logits(self, count: int = TOP) -> Tensor:
        """The largest logits, descending: [B, count] (R2R's router reads 100)."""
        return top_tokens(self.logits, count)[0]


class TokenRouter(ABC):
    """Chooses token by token between a small model (SLM) and a large one (LLM).

    Class attributes:
        starts_small: whether the small model is active first.
        needs_hidden: whether `keep_small` reads `step.hidden`.
        multi_token_handoff: False if `hand_back` is always True, so that drafts for the large model are of no
            use.
        depends_on_token: whether `keep_small` depends on the sampled token, and not on its distribution only.
            A dropped token is then no unbiased sample any more and is not reused as a draft of sampled text.
    """

    starts_small: bool = True
    needs_hidden: bool = False
    multi_token_handoff: bool = True
    depends_on_token: bool = True

    @abstractmethod
    def keep_small(self, step: Step) -> Tensor:
        """Decide on the small model's tokens, bool [B]: True keeps the token, False calls the large model."""

    @abstractmethod
    def hand_back(self, step: Step) -> Tensor:
        """Decide after kept tokens of the large model: bool [B]; True activates the small model."""

    def score(self, step: Step) -> Tensor | None:
        """Scores [B] that `keep_small` is based on, or None; called before it and kept in the trace."""
        return None
