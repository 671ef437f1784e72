"""Synthetic outcome tables whose true output lengths are known, for token_quantiles.py.

A question is a bag of words; a quarter of them tell how hard it is. Lengths are log-normal, Pareto mixtures,
bimodal, or follow the length of the prompt; everything above a limit is cut, as a token limit cuts it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from viaticum.routers.query.outcome_matrix import Array
from viaticum.types import Outcome, Pair

LEVELS, WORDS_A_LEVEL = 8, 12
PAIRS = (Pair("small", "direct"), Pair("small", "think"), Pair("large", "think:2k"), Pair("large", "think"))
PRICES = {"small": (0.1, 0.4), "large": (2.0, 8.0)}  # dollars a million input and output tokens
CUT_SHARE = 1 / 3  # of the longest pair's outputs
Lengths = Callable[
    [np.random.Generator, Array, Array], Array
]  # rng, hardness [Q], prompt tokens [Q] -> [Q, P]


class WordEncoder:
    """Texts as bags of words, hashed to 128 numbers; sees a prompt's first 256 words, as an encoder does."""

    name = "words"

    def __call__(self, texts: Sequence[str], progress: object = None) -> Tensor:
        vectors = np.zeros((len(texts), 128), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.split()[:256]:
                digest = hashlib.sha256(word.encode()).digest()
                vectors[row, digest[0] % 128] += 1 if digest[1] % 2 else -1
        return torch.nn.functional.normalize(torch.from_numpy(vectors) + 1e-6, dim=1)


@dataclass(frozen=True)
class SyntheticTable:
    """Outcomes, and the lengths [Q, P] that nothing had cut. limit: at which they were cut."""

    outcomes: list[Outcome]
    lengths: Array
    limit: int


def _log_normal(rng: np.random.Generator, hardness: Array, prompt: Array) -> Array:
    medians = np.log([12, 700, 900, 1200]) + np.outer(hardness, [0.3, 1.5, 1.2, 2.0])
    return np.exp(medians + rng.standard_normal(medians.shape) * [0.3, 0.7, 0.4, 0.9])


def _pareto(rng: np.random.Generator, hardness: Array, prompt: Array) -> Array:
    """A tenth to a third of the outputs follow a Pareto law of exponent 1.5 from twice the usual length."""
    lengths = _log_normal(rng, hardness, prompt)
    tail = rng.random(lengths.shape) < 0.1 + 0.2 * hardness[:, None]
    return np.where(tail, 2 * lengths * rng.random(lengths.shape) ** (-1 / 1.5), lengths)


def _bimodal(rng: np.random.Generator, hardness: Array, prompt: Array) -> Array:
    """A short answer, or a thought: the harder, the more often."""
    short = np.exp(np.log(15) + 0.4 * rng.standard_normal((len(hardness), len(PAIRS))))
    share = np.outer(hardness, [0.1, 0.8, 0.9, 1.0]) + np.array([0.0, 0.1, 0.1, 0.1])
    thinks = rng.random(short.shape) < share
    return np.where(thinks, _log_normal(rng, hardness, prompt) * [20, 1, 1, 1], short)


def _long_prompts(rng: np.random.Generator, hardness: Array, prompt: Array) -> Array:
    return _log_normal(rng, hardness, prompt) * (prompt[:, None] / 1000) ** 0.4


KINDS: dict[str, Lengths] = {
    "log-normal": _log_normal,
    "pareto": _pareto,
    "bimodal": _bimodal,
    "long prompts": _long_prompts,
}


def synthetic_table(kind: str, questions: int, seed: int) -> SyntheticTable:
    """A table of `questions` by the four `PAIRS`; a third of the longest pair's outputs are cut."""
    rng = np.random.default_rng(seed)
    hardness = rng.random(questions)
    prompt = np.full(questions, 200.0)
    if kind == "long prompts":
        prompt = np.exp(rng.uniform(np.log(100), np.log(32_000), questions))
    texts = [_text(rng, each, int(size)) for each, size in zip(hardness, prompt, strict=True)]
    lengths = np.maximum(1, KINDS[kind](rng, hardness, prompt).round())
    lengths[:, 2] = np.minimum(
        lengths[:, 2], 2048 + 100
    )  # a thought that is closed at its budget, and an answer
    limit = int(np.quantile(lengths[:, 3], 1 - CUT_SHARE))
    right = rng.random(lengths.shape) < np.array([0.4, 0.6, 0.75, 0.85]) - 0.3 * hardness[:, None]
    rows = []
    for number, text in enumerate(texts):
        for column, pair in enumerate(PAIRS):
            written, cut = min(lengths[number, column], limit), lengths[number, column] > limit
            input_price, output_price = PRICES[pair.model]
            correct = bool(right[number, column] and not cut)
            rows.append(
                Outcome(
                    kind,
                    str(number),
                    text,
                    pair.model,
                    pair.strategy,
                    "right" if correct else None if cut else f"wrong {rng.integers(12)}",
                    correct,
                    input_tokens=int(prompt[number]),
                    output_tokens=int(written),
                    cost_nanousd=round(1000 * (prompt[number] * input_price + written * output_price)),
                    finish_reason="length" if cut else "stop",
                )
            )
    return SyntheticTable(rows, lengths, limit)


def _text(rng: np.random.Generator, hardness: float, words: int) -> str:
    """Words of which a few tell the level of hardness, and the others nothing."""
    count = max(24, min(words, 32_000))
    level = np.clip(np.round(hardness * (LEVELS - 1) + 0.5 * rng.standard_normal(6)), 0, LEVELS - 1)
    telling = [f"{_word(int(each))}{_word(rng.integers(WORDS_A_LEVEL))}" for each in level]
    return " ".join([*telling, *(f"x{_word(each)}" for each in rng.integers(17_000, size=count - 6))])


def _word(number: int) -> str:
    return "".join(chr(97 + number // 26**place % 26) for place in range(3))
