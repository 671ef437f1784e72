"""Synthetic outcome tables with known rules, and an encoder for them that needs no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from viaticum.types import Outcome, Pair

WORDS = {
    "sums": ["add", "plus", "total", "altogether", "apples", "marbles", "coins", "shells", "sum", "together"],
    "kin": [
        "mother",
        "sister",
        "uncle",
        "nephew",
        "daughter",
        "grandson",
        "brother",
        "aunt",
        "cousin",
        "family",
    ],
    "games": ["team", "score", "match", "player", "goal", "ball", "stadium", "coach", "season", "league"],
}
NAMES = [f"name{n}" for n in range(400)]
# Probability of a correct answer by kind of question; output tokens; dollars a token.
SKILLS = {
    Pair("tiny", "direct"): ({"sums": 0.55, "kin": 0.10, "games": 0.80}, 10, 1e-6),
    Pair("tiny", "cot"): ({"sums": 0.75, "kin": 0.15, "games": 0.85}, 60, 1e-6),
    Pair("mid", "cot"): ({"sums": 0.80, "kin": 0.60, "games": 0.80}, 60, 8e-6),
    Pair("big", "cot"): ({"sums": 0.92, "kin": 0.85, "games": 0.92}, 90, 4e-5),
}
PAIRS = tuple(sorted(SKILLS))


class Words:
    """An encoder without a model: texts as bags of words, hashed to 64 numbers."""

    name = "words"

    def __call__(self, texts: Sequence[str], progress: object = None) -> Tensor:
        vectors = np.zeros((len(texts), 64), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                digest = hashlib.sha256(word.encode()).digest()
                vectors[row, digest[0] % 64] += 1 if digest[1] % 2 else -1
        return torch.nn.functional.normalize(torch.from_numpy(vectors) + 1e-6, dim=1)


def a_question(kind: str, rng: np.random.Generator) -> str:
    words = [*rng.choice(WORDS[kind], 5, replace=False), *rng.choice(NAMES, 2, replace=False)]
    return " ".join(map(str, words))


def outcomes(count: int = 300, seed: int = 0, kinds: Sequence[str] = tuple(WORDS)) -> list[Outcome]:
    """Every pair on `count` questions. Wrong answers rarely agree."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        text = a_question(kind, rng)
        for pair, (skill, tokens, price) in SKILLS.items():
            correct = bool(rng.random() < skill[kind])
            output_tokens = max(1, round(tokens * float(np.exp(0.4 * rng.standard_normal()))))
            rows.append(
                Outcome(
                    dataset=kind,
                    question_id=f"{seed}-{number}",
                    question=text,
                    model=pair.model,
                    strategy=pair.strategy,
                    answer="right" if correct else f"wrong {rng.integers(12)}",
                    correct=correct,
                    input_tokens=20,
                    output_tokens=output_tokens,
                    cost_nanousd=round(1e9 * price * output_tokens),
                    seconds=None,
                    finish_reason="stop",
                )
            )
    return rows
