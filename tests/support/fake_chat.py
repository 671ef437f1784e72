"""A chat model with fixed messages, and tools, for the tests of middleware."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool

CENT = 10_000_000
PRICES = {"fake": (1, 2)}  # dollars for a million tokens, read and made


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def fail() -> str:
    """Fail."""
    raise ValueError("no")


class Fake(GenericFakeChatModel):
    """Says its messages one after the other, takes tools, and goes by a name."""

    model: str = "fake"
    settings: list[Any] = []  # noqa: RUF012
    messages: Any

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self.bind(tools=tools, **kwargs)

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        self.settings.append(kwargs)
        message = next(self.messages)
        if isinstance(message, BaseException):
            raise message
        return ChatResult(generations=[ChatGeneration(message=message)])


def says(text: str = "done", *calls: dict[str, Any], usage: tuple[int, int] | None = (100, 50)) -> AIMessage:
    metadata = (
        None
        if usage is None
        else {"input_tokens": usage[0], "output_tokens": usage[1], "total_tokens": sum(usage)}
    )
    return AIMessage(text, tool_calls=list(calls), usage_metadata=metadata)  # type: ignore[arg-type]


def call(number: int, name: str = "add", **args: Any) -> dict[str, Any]:
    return {"name": name, "args": args, "id": f"c{number}", "type": "tool_call"}


def fake(*messages: Any, **fields: Any) -> Fake:
    return Fake(messages=iter(messages), settings=[], **fields)


async def run(agent: Any, way: str, text: str = "What is 1 + 2?", **config: Any) -> list[BaseMessage]:
    given: Any = {"messages": [HumanMessage(text)]}
    out = agent.invoke(given, **config) if way == "sync" else await agent.ainvoke(given, **config)
    messages: list[BaseMessage] = out["messages"]
    return messages


both = pytest.mark.parametrize("way", ["sync", "async"])
