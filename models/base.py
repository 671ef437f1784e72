"""The `Model` contract: one interface for local models, small/large pairs and remote models.

Leaves out how a local model decodes (`models.local`), prices and budgets. A ledger reserves and settles the
token counts that come from here, so a worst case is an upper bound, never an estimate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from viaticum.catalogue import ModelSpec
from viaticum.types import Completion, Message, ThinkingDelta, TokenCount

BYTES_PER_TOKEN = 4  # of texts that nobody has counted; nothing is held by it
StreamPiece = str | ThinkingDelta | Completion  # the completion comes last


@dataclass(frozen=True, slots=True)
class Generation:
    """Sampling settings and limits of one completion.

    Args:
        max_new_tokens: most tokens of the completion.
        temperature: 0 is greedy decoding.
        top_p, top_k, min_p: limits on the sampled tokens; 1, 0 and 0 set none.
        frequency_penalty, presence_penalty, repetition_penalty, logit_bias: what changes the logits before a
            token is sampled (see `viaticum.generation.GenerationSettings`); 0, 0, 1 and {} change nothing.
        seed: makes sampling repeatable.
        stop: strings that end the completion.
        thinking_budget: most tokens of the thought, part of max_new_tokens; None sets no limit of its own, 0
            asks for no thought. A local model's thought is closed there (budget forcing, arXiv 2501.19393).
        reasoning_effort: how long a remote model should think, in the provider's words.
        chat_template_kwargs: variables of the chat template, such as enable_thinking.
        extra_body: further fields of the request body, passed on unread.
        extra: further parameters by OpenAI's names: logprobs and top_logprobs, and of remote models tools,
            tool_choice and response_format. A model that does not support one raises `InputError`.
    """

    max_new_tokens: int = 400
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    min_p: float = 0.0
    thinking_budget: int | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


class Model(ABC):
    """Answers chats. name: its catalogue name; members: names of the models whose tokens are billed.

    runs_here: whether it computes on this machine, so that a call which a kill cut short is made again under
    its hold. Anywhere else that call may be charged for: its hold becomes unknown, and the next try has one
    of its own.
    """

    name: str
    members: tuple[str, ...]
    runs_here: bool = False

    @abstractmethod
    def worst_case(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, TokenCount]:
        """Return the most tokens that each member can read and write.

        Raises:
            PromptTooLong: prompt and new tokens exceed the context.
        """

    @abstractmethod
    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[StreamPiece]:
        """Yield pieces of text and thought as they come, then the completion.

        Closing the iterator ends the call. A model that may be silent for long yields empty pieces meanwhile,
        at which its caller can end it.
        """

    def count(self, text: str) -> int:
        """Return an upper bound of a text's tokens. By default its bytes: a token has at least one."""
        return len(text.encode())

    @property
    def counting_hint(self) -> str:
        """What is to be known about `count` where a call is refused for its worst case; "" for nothing."""
        return ""

    def worst_case_of(self, messages: Sequence[Message], generation: Generation) -> dict[str, TokenCount]:
        """Return the worst case of a whole call, including what `generation.extra` adds to the prompt."""
        return self.worst_case(messages, generation.max_new_tokens)

    def prompt_tokens(self, messages: Sequence[Message], generation: Generation) -> int:
        """Return how many tokens the prompt of a call likely has; nothing is held by it.

        Raises `PromptTooLong` where it fits no context. By default what the worst case holds.
        """
        worst = self.worst_case_of(messages, replace(generation, max_new_tokens=1))
        return max(count.input_tokens for count in worst.values())

    def catalogue_entry(self) -> ModelSpec | None:
        """Return the model's own entry with its price; None for a model that comes from a catalogue."""
        return None

    def generate(self, messages: Sequence[Message], generation: Generation) -> Completion:
        """Return the whole completion at once."""
        for piece in self.stream(messages, generation):
            if isinstance(piece, Completion):
                return piece
        raise AssertionError("a stream ends with its completion")
