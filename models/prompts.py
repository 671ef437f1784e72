"""A chat as the token ids of one model: its chat template, rendered by its own tokenizer.

The models of a pair read one chat by two templates where these differ. Leaves out which template a model has
(`viaticum.models.templates`) and thinking budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from viaticum.errors import InputError
from viaticum.messages import fold_system
from viaticum.models.base import Generation
from viaticum.models.budget_forcing import opening_ids
from viaticum.thinking import ThinkingFormat, ThinkingSplitter
from viaticum.types import Message

PROMPT_END = 32  # tokens of a prompt that tell whether it ends inside a thought
MOST_CUT = 8  # tokens that open a thought, at most


class TemplateRefusal(Exception):
    """A chat template raised an error about the messages."""


class PromptRenderer:
    """Renders chats for one model.

    Args:
        name: of the model, for messages.
        tokenizer: of the model.
        template: in place of the tokenizer's own; None: that one.
        thinking: format of the thoughts of the text that follows.
    """

    def __init__(self, name: str, tokenizer: Any, template: str | None, thinking: ThinkingFormat) -> None:
        self.name, self.tokenizer = name, tokenizer
        self._template, self._thinking = template, thinking

    def prompt(self, messages: Sequence[Message], generation: Generation) -> list[int]:
        """Return a chat's token ids up to where the answer begins, or the thought before it.

        A last turn of the assistant is the beginning of the answer, which the model continues (a prefill).

        A template that refuses a system turn (Gemma, early Mistral) gets its text in the first user turn.

        Raises:
            InputError: the template refuses the messages.
        """
        ids = self._render_or_fold(messages, generation)
        if is_prefilled(messages):
            return ids
        return ids + opening_ids(self._thinking, self.inside_thought(ids), self.encode)

    def prompt_as(
        self, messages: Sequence[Message], generation: Generation, inside: bool | None
    ) -> list[int]:
        """As `prompt`, for the other model of a pair: the text that follows begins as it does for the first.

        inside: whether that one's prompt ends inside a thought. A thought that only one of the two templates
        opens or closes is opened, closed or left out here.
        """
        ids = self._render_or_fold(messages, generation)
        own = self.inside_thought(ids, messages)
        if inside == own or not self._thinking.tags:
            return ids
        if inside:
            return ids + self.encode(f"{self._thinking.tags[0].open[0]}\n")
        if own and inside is False:
            return ids + self.encode(f"\n{self._thinking.close}\n\n")
        if own:
            for cut in range(1, MOST_CUT + 1):
                if self.inside_thought(ids[:-cut]) is None:
                    return ids[:-cut]
        return ids

    def inside_thought(self, prompt: Sequence[int], messages: Sequence[Message] = ()) -> bool | None:
        """Whether a text begins inside a thought after this prompt; None where the prompt does not tell.

        messages: of the prompt. An answer that they begin may have a thought, open or closed, or none.
        """
        if is_prefilled(messages):
            begun = ThinkingSplitter(self._thinking, inside=False)
            begun.push(messages[-1]["content"])
            return begun.inside
        return self._thinking.inside_after(self.tokenizer.decode(list(prompt[-PROMPT_END:])))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _render_or_fold(self, messages: Sequence[Message], generation: Generation) -> list[int]:
        try:
            return self._render(messages, generation)
        except TemplateRefusal as error:
            folded = fold_system(messages)
            if len(folded) == len(messages):
                raise InputError(f"{self.name} cannot read these messages: {error}") from None
            try:
                return self._render(folded, generation)
            except TemplateRefusal:
                raise InputError(f"{self.name} cannot read these messages: {error}") from None

    def _render(self, messages: Sequence[Message], generation: Generation) -> list[int]:
        """Raises `TemplateRefusal` where the template raises an error. The template writes its own BOS."""
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=not is_prefilled(messages),
                continue_final_message=is_prefilled(messages),
                return_dict=False,
                chat_template=self._template,
                **template_variables(generation),
            )
        except Exception as error:
            if isinstance(error, ValueError) and is_prefilled(messages):
                raise InputError(
                    f"{self.name} cannot continue a turn of the assistant: its chat template changes it"
                ) from None
            line = getattr(error, "lineno", None)
            if not type(error).__module__.startswith("jinja2"):  # of an expression of the template
                raise TemplateRefusal(f"its chat template fails on them: {error!r}") from error
            raise TemplateRefusal(
                f"line {line} of its chat template: {error}" if line else str(error)
            ) from None
        return ids


def is_prefilled(messages: Sequence[Message]) -> bool:
    """Whether a chat ends with the beginning of the answer."""
    last = messages[-1] if messages else None
    return last is not None and last["role"] == "assistant" and bool(last["content"].strip())


def template_variables(generation: Generation) -> dict[str, Any]:
    """Return the variables of the chat template: those that are set, the effort, and whether to think."""
    variables: dict[str, Any] = {}
    if generation.thinking_budget == 0:
        variables["enable_thinking"] = False
    if generation.reasoning_effort is not None:
        variables["reasoning_effort"] = generation.reasoning_effort
    return variables | dict(generation.chat_template_kwargs)
