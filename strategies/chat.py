"""Chat: free conversation. The question goes to the model unchanged, and the whole reply is the answer.

There is no final answer to grade, so such answers are not profiled, and a router uses this strategy only if
pairs with it were given.
"""

from __future__ import annotations

from dataclasses import dataclass

from viaticum.strategies.answers.markup import spoken
from viaticum.strategies.base import Example, PromptStrategy
from viaticum.types import Completion, Message, Query, Reading


@dataclass(frozen=True)
class Chat(PromptStrategy):
    """The question alone; the whole text is the answer."""

    system: str | None = None
    examples: tuple[Example, ...] = ()

    name = "chat"
    description = (
        "Passes the conversation on as it is and takes the whole reply as the answer. "
        "For free conversation, writing and explaining; adds no instructions and looks for no final answer."
    )
    max_new_tokens = 2048
    graded = False

    def messages(self, query: Query) -> list[Message]:
        *before, _ = super().messages(query)
        return [*before, {"role": "user", "content": query.text}]

    def read(self, completion: Completion, query: Query) -> Reading:
        text = spoken(completion.text).strip()
        return Reading(text) if text else Reading(None, "the model wrote nothing")
