"""Chain of draft (arXiv 2502.18600): steps as notes of at most five words, then the answer after `####`."""

from __future__ import annotations

from dataclasses import dataclass

from viaticum.strategies.base import Example, PromptStrategy

SYSTEM = (
    "Think step by step, but write only a minimal draft of each step: one line, five words at most, with "
    "its calculation. Then write the final answer on a last line after ####."
)

EXAMPLES = (
    Example(
        "A florist ties 12 bunches of 9 tulips and 8 bunches of 7 roses. 11 flowers are left over. How many "
        "flowers did she have?",
        "tulips: 12 * 9 = 108\nroses: 8 * 7 = 56\ntied: 108 + 56 = 164\nall: 164 + 11 = 175\n#### 175",
    ),
    Example(
        "A coat costs $80. In the sale it is 25% cheaper, and Paul pays with three $20 notes and one $5 "
        "note. "
        "How much change does he get?",
        "discount: 80 * 0.25 = 20\nprice: 80 - 20 = 60\npaid: 3 * 20 + 5 = 65\nchange: 65 - 60 = 5\n#### 5",
    ),
    Example(
        "Rosa is twice as old as her brother. In 6 years their ages will add up to 45. How old is Rosa now?",
        "sum now: 45 - 2 * 6 = 33\nbrother + 2 * brother = 33\nbrother: 33 / 3 = 11\nRosa: 2 * 11 = "
        "22\n#### 22",
    ),
)


@dataclass(frozen=True)
class Cod(PromptStrategy):
    """Reasoning in notes of a few words, then the answer."""

    system: str | None = SYSTEM
    examples: tuple[Example, ...] = EXAMPLES

    name = "cod"
    description = (
        "Reasons step by step in drafts of a few words each and then states the answer. "
        "Takes a fraction of the tokens of full reasoning; good for arithmetic with a few clear steps."
    )
    max_new_tokens = 200
