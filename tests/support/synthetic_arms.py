"""Outcomes of five thinking budgets of one model with known rules."""

from __future__ import annotations

import numpy as np
from synthetic_outcomes import a_question

from viaticum.types import Outcome

ARMS = {"think:0": 20, "think:512": 400, "think:2k": 1500, "think:8k": 6000, "think:32k": 24_000}
RIGHT = {
    "sums": (0.90, 0.92, 0.93, 0.93, 0.93),
    "games": (0.30, 0.70, 0.85, 0.87, 0.88),
    "kin": (0.05, 0.15, 0.40, 0.75, 0.92),
}


def five_budgets(count: int, seed: int = 0) -> list[Outcome]:
    """Sums need no thought, kin questions a long one; a dollar a million tokens."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        kind = ("sums", "kin", "games")[number % 3]
        text = a_question(kind, rng)
        for (arm, usual), right in zip(ARMS.items(), RIGHT[kind], strict=True):
            tokens = round(usual * float(np.exp(0.3 * rng.standard_normal())))
            rows.append(
                Outcome(
                    kind,
                    str(number),
                    text,
                    "m",
                    arm,
                    None,
                    bool(rng.random() < right),
                    10,
                    tokens,
                    1000 * tokens,
                )
            )
    return rows
