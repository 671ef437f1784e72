"""Counts of tokens of LangChain's interface, by the model's own tokenizer instead of a downloaded one.

LangChain's default fetches GPT-2's tokenizer. Counts are upper bounds, as calls are held for by them.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.utils.function_calling import convert_to_openai_tool

from viaticum.agents.integrations.langchain_messages import from_langchain
from viaticum.errors import InputError
from viaticum.models.base import Generation, Model


class CountingChatModel(BaseChatModel):
    """A chat model whose tokens one of our models counts."""

    @abstractmethod
    def _counting_model(self) -> Model | None:
        """The model that answers; None where it is chosen for each question."""

    def get_num_tokens(self, text: str) -> int:
        """An upper bound of a text's tokens: its bytes where no model is named."""
        if self.custom_get_token_ids is not None:
            return len(self.custom_get_token_ids(text))
        model = self._counting_model()
        return len(text.encode(errors="replace")) if model is None else model.count(text)

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """An upper bound of the tokens of a chat with its tools."""
        chat, schemas = from_langchain(messages), [convert_to_openai_tool(tool) for tool in tools or ()]
        model = self._counting_model()
        if model is None or self.custom_get_token_ids is not None:
            return sum(
                map(self.get_num_tokens, [*(each["content"] for each in chat), *map(json.dumps, schemas)])
            )
        worst = model.worst_case_of(chat, Generation(1, extra={"tools": schemas} if schemas else {}))
        return max(count.input_tokens for count in worst.values())

    def get_token_ids(self, text: str) -> list[int]:
        """Raises `InputError` without `custom_get_token_ids`: what counts tokens need not name them."""
        if self.custom_get_token_ids is None:
            raise InputError("no ids of tokens are known; use get_num_tokens, or give custom_get_token_ids")
        return self.custom_get_token_ids(text)
