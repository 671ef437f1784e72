"""What a question looks like: its length, its numbers, its marks. A sentence encoder blurs these, and they say much of how
many steps an answer takes.

Ten numbers beside the embedding, scaled by constants so that they are near 0 and of size 1 for questions of a few
sentences, and given a tenth of its weight; both together have length 1 again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

WEIGHT = 0.1
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_PARTS = ("half", "twice", "double", "third", "quarter", "each", "every", "per ")


def with_shape(embeddings: Tensor, texts: Sequence[str]) -> Tensor:
    """Embeddings [N, D] of length 1 -> [N, D + 10] of length 1."""
    return F.normalize(torch.cat((embeddings, WEIGHT * shape(texts)), 1), dim=1)


def shape(texts: Sequence[str]) -> Tensor:
    """Ten numbers for each text [N, 10]."""
    return torch.tensor([_numbers(text) for text in texts])


def _numbers(text: str) -> list[float]:
    low, numbers = text.lower(), _NUMBER.findall(text)
    largest = max(
        (float(number.replace(",", "").rstrip(".") or 0) for number in numbers if number.count(".") < 2),
        default=0.0,
    )
    return [
        2 * (math.log1p(len(text.split())) - 3.5),
        2 * (math.log1p(len(numbers)) - 1.2),
        2 * (math.log1p(len(set(numbers))) - 1.2),
        math.log1p(text.count("?")) - 0.7,
        2 * (math.log1p(len(re.findall(r"[.!?](?:\s|$)", text))) - 1.2),
        math.log1p(text.count(",")) - 0.7,
        min(math.log1p(largest), 15.0) / 3 - 1.2,
        float("%" in text or "percent" in low),
        float("$" in text),
        math.log1p(sum(low.count(part) for part in _PARTS)) - 0.4,
    ]
