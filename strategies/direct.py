"""Direct: ask for the final answer only. The cheapest strategy, for questions that need no steps."""

from __future__ import annotations

from dataclasses import dataclass

from viaticum.strategies.base import Example, PromptStrategy

SYSTEM = "Answer with the final answer only: no steps, no explanation, no full sentence."
EXAMPLES: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Direct(PromptStrategy):
    """The answer without reasoning."""

    system: str | None = SYSTEM
    examples: tuple[Example, ...] = EXAMPLES

    name = "direct"
    description = (
        "Gives the final answer at once, without any reasoning. "
        "Very cheap and fast; good for facts and one-step questions, weak where several steps are needed."
    )
    max_new_tokens = 32
