"""Drawing the next token from logits: greedy, or temperature, top-k and top-p, each request with its seed.

Knows nothing of models or requests beyond their `Sampling`. Truncation follows Holtzman et al.
(arXiv 1904.09751): the smallest set of most likely tokens whose probability reaches top_p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from viaticum.decoders.request import Sampling


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits [V] -> the probabilities [V] that `sampling` draws from; a one-hot vector where greedy."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        floor = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    probabilities = torch.softmax(logits, -1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # what the tokens before it already cover
        probabilities = probabilities.scatter(-1, order[beyond], 0.0)
        probabilities = probabilities / probabilities.sum()
    return probabilities


def draw(logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> list[int]:
    """logits [B, V] -> B token ids. A greedy row takes the first of equal maxima and uses no randomness."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, (sampling, generator) in enumerate(zip(samplings, generators, strict=True)):
        if sampling.temperature > 0:
            probabilities = distribution(logits[row], sampling)
            tokens[row] = int(torch.multinomial(probabilities.cpu(), 1, generator=generator))
    return tokens
