"""Drawing tokens from logits: greedy, or temperature, top-k and top-p, each request with its seed.

All rows of a step at once, on the device of the logits. A row's randomness is a hash of its seed, its place in
the text and what it is for, so it depends neither on its neighbours nor on what was drawn before.
Knows nothing of models or requests beyond their `Sampling`. Truncation follows Holtzman et al. (arXiv
1904.09751): the smallest set of most likely tokens whose probability reaches top_p; equals of the least of
them stay too, as they do with top-k, so that no order among equals has to be made up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from viaticum.decoders.request import Sampling
from viaticum.routers.token.base import likeliest

FIRST, SECOND, ACCEPT, INSTEAD = range(
    4
)  # what a number is for: two draws at a place, a draft's test, its substitute
NUCLEUS = 512  # most likely tokens looked at first for top_p; more where they are not enough
_MASK = (1 << 64) - 1


def uniform(seed: int, position: int, use: int) -> float:
    """A number in [0, 1) that looks random and depends on its arguments alone (SplitMix64's mixing, 24 bits)."""
    state = 0
    for part in (seed, position, use):
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return float(state >> 40) / (1 << 24)


def distributions(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """logits [B, V] -> the probabilities [B, V] that each row is drawn from; one-hot where it is greedy."""
    size = logits.shape[-1]
    heat = [sampling.temperature or 1.0 for sampling in samplings]
    kept = [1 if s.temperature == 0 else s.top_k or size for s in samplings]
    scaled = logits.float() / torch.tensor(heat, device=logits.device)[:, None]
    cut = [min(k, size) for k in kept]
    if (most := max((k for k in cut if k < size), default=0)) > 0:
        index = torch.tensor([min(k, most) for k in cut], device=logits.device)[:, None] - 1
        floor = scaled.topk(most).values.gather(-1, index)  # [B, 1]: the least logit that stays
        whole = torch.tensor([k == size for k in cut], device=logits.device)[:, None]
        scaled = scaled.masked_fill((scaled < floor) & ~whole, float("-inf"))
    probabilities = torch.softmax(scaled, -1)
    if any(sampling.top_p < 1 for sampling in samplings):
        probabilities = _nucleus(probabilities, [sampling.top_p for sampling in samplings])
    if any(sampling.temperature == 0 for sampling in samplings):
        greedy = torch.tensor([s.temperature == 0 for s in samplings], device=logits.device)[:, None]
        one_hot = torch.nn.functional.one_hot(likeliest(logits), size).to(probabilities.dtype)
        probabilities = torch.where(greedy, one_hot, probabilities)
    return probabilities


def _nucleus(probabilities: Tensor, top_p: list[float]) -> Tensor:
    """Zero what lies beyond each row's nucleus and let the rest sum to 1; rows with top_p 1 stay as they are."""
    size = probabilities.shape[-1]
    share = torch.tensor(top_p, device=probabilities.device)[:, None]
    count = min(NUCLEUS, size)
    while True:
        ordered = probabilities.topk(count).values
        before = ordered.cumsum(-1) - ordered  # what the more likely tokens cover
        if count == size or bool(((before[:, -1:] >= share) | (share >= 1)).all()):
            break
        count = min(8 * count, size)
    inside = (before < share).sum(-1, keepdim=True).clamp_min(1)  # [B, 1] tokens in the nucleus
    floor = ordered.gather(-1, inside - 1).masked_fill(share >= 1, 0.0)
    nucleus = probabilities.masked_fill(probabilities < floor, 0.0)
    return torch.where(share < 1, nucleus / nucleus.sum(-1, keepdim=True), probabilities)


def pick(weights: Tensor, numbers: Sequence[float]) -> Tensor:
    """One index a row, with the probability of its weight [B, V] (any sum): the inverse of the cumulated weights."""
    sums = weights.cumsum(-1)
    aim = torch.tensor(numbers, device=weights.device, dtype=sums.dtype)[:, None] * sums[:, -1:]
    index = torch.searchsorted(sums, aim, right=True).squeeze(-1)
    # The product may round up to the very sum: then no index is beyond it.
    return torch.where(index < weights.shape[-1], index, weights.argmax(-1))


def draw(
    logits: Tensor, samplings: Sequence[Sampling], numbers: Sequence[float]
) -> tuple[Tensor, dict[int, Tensor]]:
    """logits [B, V] -> token ids int64 [B], and of the rows that are sampled the probabilities [V] drawn from.

    numbers: one in [0, 1) for each row. A greedy row takes the first of equal maxima.
    """
    tokens = likeliest(logits)
    rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not rows:
        return tokens, {}
    chosen = logits if len(rows) == len(samplings) else logits[torch.tensor(rows, device=logits.device)]
    probabilities = distributions(chosen, [samplings[row] for row in rows])
    drawn = pick(probabilities, [numbers[row] for row in rows])
    tokens = tokens.index_copy(0, torch.tensor(rows, device=tokens.device), drawn)
    return tokens, dict(zip(rows, probabilities, strict=True))
