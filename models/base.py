"""What answers a chat: one contract for local models, small/large pairs and remote models.

Leaves out how a local model decodes (`models.local`), prices and budgets. Token counts here are what a
ledger reserves and settles, so a worst case is never an estimate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from viaticum.catalogue import ModelSpec
from viaticum.types import Completion, Message, TokenCount


@dataclass(frozen=True, slots=True)
class Generation:
    """How long and how to write: at most `max_new_tokens`, ended early by any of `stop`.

    temperature 0 is greedy; seed makes sampling repeatable. extra: what a remote model's API takes besides, by the
    names of OpenAI's (tools, tool_choice, response_format); a model that cannot do it raises `InputError`.
    """

    max_new_tokens: int = 400
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


class Model(ABC):
    """Something that answers a chat. `name` is its catalogue name; `members` are the models that bill."""

    name: str
    members: tuple[str, ...]

    @abstractmethod
    def worst_case(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, TokenCount]:
        """The most tokens each member can read and make. Raises `PromptTooLong` past the context."""

    @abstractmethod
    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str | Completion]:
        """Pieces of text as they come, then the completion. Closing the iterator ends the call."""

    def count(self, text: str) -> int:
        """Tokens of a text. By default its bytes, of which a token has at least one: never too few."""
        return len(text.encode())

    def worst_case_of(self, messages: Sequence[Message], generation: Generation) -> dict[str, TokenCount]:
        """The worst case of a whole call, with what `extra` adds to the prompt."""
        return self.worst_case(messages, generation.max_new_tokens)

    def catalogue_entry(self) -> ModelSpec | None:
        """The entry, with its price, of a model that no catalogue knows; None for one that comes from a catalogue."""
        return None

    def generate(self, messages: Sequence[Message], generation: Generation) -> Completion:
        """The whole completion at once."""
        for piece in self.stream(messages, generation):
            if isinstance(piece, Completion):
                return piece
        raise AssertionError("a stream ends with its completion")
