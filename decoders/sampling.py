"""Sample tokens from logits: greedy, or temperature, top-k, top-p and min-p, with a seed per request.

All rows of a step at once, on the device of the logits. A row's random number is a hash of its seed, its
position in the sequence and its purpose, so that it depends neither on the other rows nor on earlier draws.
Nucleus sampling follows Holtzman et al. (arXiv 1904.09751): the smallest set of most likely tokens whose
probability reaches top_p. Tokens that tie with the least likely one of the set stay too, as with top-k, so
that no order among ties is needed. Min-p (arXiv 2407.01082) keeps tokens at least `min_p` times as probable
as the most probable one; it comes last, as in transformers. Leaves out models, and requests beyond their
`Sampling`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from viaticum.decoders.request import Sampling
from viaticum.routers.token.base import argmax_token, to_device

# Purposes of a random number: the first sample at a position, a second one after a dropped proposal, the
# acceptance test of a draft token, and the sample that replaces a rejected one.
PROPOSE, REDRAW, ACCEPT, RESAMPLE = range(4)
NUCLEUS = 512  # most likely tokens searched first for top_p; more if they are not enough
_UNIT = 1 << 40  # the whole probability, in whole numbers
_HALF = 15  # of the 30 bits of a float32 from 0 to 1
_MASK = (1 << 64) - 1


def uniform(seed: int, position: int, purpose: int) -> float:
    """A pseudo-random number in [0, 1), a hash of its arguments (the mixing of SplitMix64, 24 bits)."""
    state = 0
    for part in (seed, position, purpose):
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return float(state >> 40) / (1 << 24)


def distributions(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """The probabilities [B, V] that each row of logits [B, V] is sampled from, float32; one-hot if greedy."""
    size = logits.shape[-1]
    temperatures = [sampling.temperature or 1.0 for sampling in samplings]
    top_k = [min(1 if s.temperature == 0 else s.top_k or size, size) for s in samplings]
    scaled = logits.float() / to_device(temperatures, logits.device)[:, None]
    if (largest_k := max((k for k in top_k if k < size), default=0)) > 0:
        index = to_device([min(k, largest_k) for k in top_k], logits.device)[:, None] - 1
        floor = scaled.topk(largest_k).values.gather(-1, index)  # [B, 1]: the smallest logit that is kept
        uncut = to_device([k == size for k in top_k], logits.device)[:, None]
        scaled = scaled.masked_fill((scaled < floor) & ~uncut, float("-inf"))
    probabilities = torch.softmax(scaled, -1)
    if any(sampling.top_p < 1 for sampling in samplings):
        probabilities = _nucleus(probabilities, [sampling.top_p for sampling in samplings])
    if any(sampling.min_p > 0 for sampling in samplings):
        probabilities = _drop_improbable(probabilities, [sampling.min_p for sampling in samplings])
    if any(sampling.temperature == 0 for sampling in samplings):
        greedy = to_device([s.temperature == 0 for s in samplings], logits.device)[:, None]
        one_hot = torch.nn.functional.one_hot(argmax_token(logits), size).to(probabilities.dtype)
        probabilities = torch.where(greedy, one_hot, probabilities)
    return probabilities


def _nucleus(probabilities: Tensor, top_p: list[float]) -> Tensor:
    """Zero what lies beyond each row's nucleus and renormalise; rows with top_p 1 are unchanged."""
    on_host = probabilities.device.type == "cpu"
    floor = (_floor_by_order if on_host else _floor_by_counting)(probabilities, top_p)
    nucleus = probabilities.masked_fill(probabilities < floor, 0.0)
    whole = to_device([each >= 1 for each in top_p], probabilities.device)[:, None]
    return torch.where(whole, probabilities, nucleus / nucleus.sum(-1, keepdim=True))


def _floor_by_order(probabilities: Tensor, top_p: list[float]) -> Tensor:
    """The least probability in each row's nucleus [B, 1], from the most likely tokens, more if needed.

    For the host's own tensors, where it costs least: how many tokens are enough is read from the numbers.
    """
    size = probabilities.shape[-1]
    share = torch.tensor(top_p)[:, None]
    count = min(NUCLEUS, size)
    while True:
        ordered = probabilities.topk(count).values
        before = ordered.cumsum(-1) - ordered  # probability of all more likely tokens
        if count == size or ((before[:, -1:] >= share) | (share >= 1)).numpy().all():
            break
        count = min(8 * count, size)
    inside = (before < share).sum(-1, keepdim=True).clamp_min(1)  # [B, 1] tokens in the nucleus
    return ordered.gather(-1, inside - 1)


def _floor_by_counting(probabilities: Tensor, top_p: list[float]) -> Tensor:
    """As `_floor_by_order`, without a sort and without a number that the host has to wait for.

    The bits of positive floats have the order of the floats, so their upper half is counted, then the lower
    one. Probabilities are added as whole numbers, whose sum does not depend on the order of a device.
    """
    share = to_device([max(1, int(each * _UNIT)) for each in top_p], probabilities.device)[:, None]
    bits = probabilities.view(torch.int32)
    mass = (probabilities.double() * _UNIT).long()
    upper, lower = (bits >> _HALF).clamp(0, (1 << _HALF) - 1), bits & ((1 << _HALF) - 1)  # clamped for NaN
    first, above = _crossing(upper, mass, share)
    there = upper == first
    second, _ = _crossing(torch.where(there, lower, 0), torch.where(there, mass, 0), share - above)
    return ((first << _HALF) | second).int().view(torch.float32)


def _crossing(keys: Tensor, mass: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The largest key [B, 1] such that keys from it on have at least `share` of the mass, or 0.

    keys: [B, V] of `_HALF` bits; mass: int64 [B, V]; share: int64 [B, 1]. Also returns the mass of all larger
    keys.
    """
    sums = torch.zeros(len(keys), 1 << _HALF, dtype=torch.int64, device=keys.device)
    sums = sums.scatter_add_(-1, keys.long(), mass).flip(-1)  # the largest key first
    reached = sums.cumsum(-1)
    index = (reached < share).sum(-1, keepdim=True).clamp_max((1 << _HALF) - 1)
    return (1 << _HALF) - 1 - index, (reached - sums).gather(-1, index)


def _drop_improbable(probabilities: Tensor, min_p: list[float]) -> Tensor:
    """Zero what is less probable than each row's share of its maximum; rows with min_p 0 are unchanged."""
    share = to_device(min_p, probabilities.device)[:, None]
    floor = share * probabilities.amax(-1, keepdim=True)
    kept = probabilities.masked_fill(probabilities < floor, 0.0)
    return torch.where(share > 0, kept / kept.sum(-1, keepdim=True), probabilities)


def sample_index(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Sample one index a row, int64 [B], by inverting the cumulative sum of its weights [B, V].

    uniforms: B random numbers in [0, 1). The weights of a row need not sum to 1.
    """
    sums = weights.cumsum(-1)
    target = to_device(uniforms, weights.device, sums.dtype)[:, None] * sums[:, -1:]
    index = torch.searchsorted(sums, target, right=True).squeeze(-1)
    # The product may round up to the whole sum: then no index is beyond it.
    return torch.where(index < weights.shape[-1], index, weights.argmax(-1))


def sample(
    logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Sample one token a row; a greedy row takes the first of equal maxima.

    Args:
        logits: [B, V].
        samplings: settings of each row.
        uniforms: B random numbers in [0, 1).

    Returns:
        Token ids, int64 [B], and by row the probabilities [V] that each non-greedy token was sampled from.
    """
    tokens = argmax_token(logits)
    rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not rows:
        return tokens, {}
    selected = logits if len(rows) == len(samplings) else logits[to_device(rows, logits.device)]
    probabilities = distributions(selected, [samplings[row] for row in rows])
    sampled = sample_index(probabilities, [uniforms[row] for row in rows])
    tokens = tokens.index_copy(0, to_device(rows, tokens.device), sampled)
    return tokens, dict(zip(rows, probabilities, strict=True))
