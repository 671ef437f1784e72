"""Direct: ask for the final answer and nothing else. The cheapest strategy, for questions that need no steps."""

from __future__ import annotations

from dataclasses import dataclass

from viaticum.strategies.base import Example, Strategy, chat, read_text
from viaticum.types import Completion, Message, Query, Reading

SYSTEM = "Answer with the final answer only: no steps, no explanation, no full sentence."
EXAMPLES: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Direct(Strategy):
    """The answer at once, without reasoning."""

    system: str = SYSTEM
    examples: tuple[Example, ...] = EXAMPLES

    name = "direct"
    description = (
        "Gives the final answer at once, without any reasoning. "
        "Very cheap and fast; good for facts and one-step questions, weak where several steps are needed."
    )
    max_new_tokens = 32

    def messages(self, query: Query) -> list[Message]:
        return chat(self.system, self.examples, query)

    def read(self, completion: Completion, query: Query) -> Reading:
        return read_text(completion, query)
