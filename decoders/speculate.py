"""Speculative decoding: verification of draft tokens, draft length, and when to call the large model.

Verification follows Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318). A greedy sequence
accepts a draft token that is the large model's argmax. A sampled one accepts draft token d with probability
min(1, p(d) / q(d)) and otherwise samples from max(p - q, 0) / sum(max(p - q, 0)), so that the output follows
p whatever q was; p and q are the distributions of the large and the small model after temperature, top-k,
top-p and min-p. Leaves out models, caches and text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from viaticum.decoders.request import Sampling
from viaticum.decoders.sampling import distributions, sample_index
from viaticum.routers.token.base import argmax_token, to_device

MAX_DRAFT = 16  # tokens of an adaptive draft
VERIFY_COST = 0.02  # of one more token in a verifying pass, in passes (CPU, 1.5B: 2.9 ms of 180 ms)
PRIOR, PRIOR_WEIGHT = 0.7, 4.0  # initial acceptance rate, and its weight in draft tokens
DECAY = 0.9  # of the weight of earlier passes, per pass
PROBE_INTERVAL = 16  # one of so many passes that pay no draft tries a token, to keep the estimate current


def verify(
    logits: Tensor,
    samplings: Sequence[Sampling],
    drafts: Sequence[int | None],
    draft_probabilities: Mapping[int, Tensor],
    uniforms: Sequence[tuple[float, float]],
) -> tuple[Tensor, Tensor]:
    """The token of every position if the drafts before it are accepted, and whether it is the draft's.

    Args:
        logits: of the large model [N, V].
        samplings: settings of each position's sequence.
        drafts: draft token of each position, None if there is none.
        draft_probabilities: by position, for sampled draft tokens: q [V], which it was sampled from.
        uniforms: random numbers in [0, 1) of each position: for the acceptance test and for sampling.

    Returns:
        Tokens int64 [N] and accepted bool [N].
    """
    device = logits.device
    drafted = to_device([-1 if draft is None else draft for draft in drafts], device)
    tokens = argmax_token(logits)
    rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not rows:
        return tokens, tokens == drafted
    index = to_device(rows, device)
    p = distributions(logits[index], [samplings[row] for row in rows])
    none = torch.zeros_like(p[0])
    # The small model may be on another device.
    q = torch.stack([none if drafts[row] is None else draft_probabilities[row].to(device) for row in rows])
    draft = drafted[index, None].clamp_min(0)
    test = to_device([uniforms[row][0] for row in rows], device)
    accepts = (test * q.gather(-1, draft)[:, 0] < p.gather(-1, draft)[:, 0]) & (drafted[index] >= 0)
    residual = (p - q).clamp_min(0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)  # p equals q up to rounding
    resampled = sample_index(residual, [uniforms[row][1] for row in rows])
    tokens = tokens.index_copy(0, index, torch.where(accepts, draft[:, 0], resampled))
    accepted = (tokens == drafted).index_copy(0, index, accepts)
    return tokens, accepted


def draft_speedups(longest: int, acceptance: float, drafted: int, cost: float) -> list[float]:
    """Expected tokens of a pass over the cost of a plain pass, for drafts of 0, 1, ... `longest` tokens.

    (1 + a + ... + a^k) / (1 + max(0, k - drafted) * cost + k * VERIFY_COST), see Leviathan et al., section
    3.3.

    Args:
        longest: maximum draft length.
        acceptance: a, the probability that a draft token is accepted and the sequence goes on after it.
        drafted: tokens drafted already, which cost nothing.
        cost: of a decode step of the small model, in passes of the large one.
    """
    speedups, tokens = [], 0.0
    for length in range(longest + 1):
        tokens += acceptance**length
        speedups.append(tokens / (1 + max(0, length - drafted) * cost + length * VERIFY_COST))
    return speedups


class BatchWaitPolicy:
    """Decides when to call the large model; a call costs little more for many rows than for one.

    Args:
        batch: ready rows that justify a call.
        draft: draft length; None: adaptive.
    """

    def __init__(self, batch: int, draft: int | None) -> None:
        self._batch = batch
        self._longest_wait = max(MAX_DRAFT, draft or 0)  # steps that ready rows wait for the drafts of others
        self._waited = 0

    def should_run(self, ready: int, drafting: bool, small_active: bool) -> bool:
        """Whether to call the large model in this step.

        Args:
            ready: rows that need the large model now.
            drafting: whether drafts are being made for other rows.
            small_active: whether the small model decodes other rows.
        """
        if ready == 0:
            return False
        if drafting or small_active:  # else no row can continue without it
            if ready < self._batch:
                return False
            self._waited += 1
            if drafting and self._waited <= self._longest_wait:
                return False
        self._waited = 0
        return True


class DraftLength:
    """Number of tokens to draft for the next pass of one sequence.

    Depends on its own sequence and on constants only, never on a clock or on other sequences, so that a seed
    gives the same text in any batch.

    Args:
        fixed: always this many; None: the number that maximises `draft_speedups`, given the acceptance rate
            of this sequence so far.
        cost: of a decode step of the small model, in passes of the large one.
    """

    def __init__(self, fixed: int | None, cost: float) -> None:
        self._fixed, self._cost = fixed, cost
        self._accepted, self._tried = PRIOR * PRIOR_WEIGHT, PRIOR_WEIGHT
        self._passes_without = 0

    @property
    def acceptance(self) -> float:
        """Estimated probability that a draft token is accepted and the sequence goes on after it."""
        return self._accepted / self._tried

    def choose(self, drafted: int, limit: int) -> int:
        """Tokens to draft, including the `drafted` ones that exist; limit: the maximum."""
        if self._fixed is not None:
            return min(limit, max(self._fixed, drafted))
        speedups = draft_speedups(min(MAX_DRAFT, limit), self.acceptance, drafted, self._cost)
        best = max(drafted, speedups.index(max(speedups)))
        if best > 0:
            self._passes_without = 0
            return best
        self._passes_without += 1
        return int(self._passes_without % PROBE_INTERVAL == 0)

    def update(self, drafted: int, made: int) -> None:
        """Record a pass over `drafted` tokens that made `made`: all but its last position were accepted."""
        self._accepted = self._accepted * DECAY + min(made - 1, drafted)
        self._tried = self._tried * DECAY + min(made, drafted)
