"""The last call of an agent whose budget is used up: its conversation as one text, without tools.

One message in plain words is cheap (no schemas), every provider takes it (some want the tools again beside
calls of them), and it can be cut to what is held. Leaves out money
(`viaticum.agents.integrations.middleware`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

ANSWER_TOKENS = 256  # of the last answer, at most
GROWTH_TOKENS = 512  # beside the next answer: what a tool says until the last call
CUT = "\n[...]\n"
INSTRUCTION = (
    "The budget of this task is used up: no further step can be taken. Answer now from what is above: the "
    "result as far as it goes, then what is left undone."
)
_SPEAKERS = {"human": "User", "ai": "Assistant", "system": "System"}


def transcript(messages: Sequence[BaseMessage]) -> str:
    """A conversation in plain words, with the calls of tools and what came of them."""
    return "\n\n".join(line for message in messages for line in _lines(message))


def _lines(message: BaseMessage) -> Iterator[str]:
    text = str(message.text)
    if isinstance(message, ToolMessage):
        yield f"Tool {message.name or ''}: {text}"
        return
    if text:
        yield f"{_SPEAKERS.get(message.type, message.type)}: {text}"
    for call in message.tool_calls if isinstance(message, AIMessage) else ():
        yield f"Assistant called {call['name']}({json.dumps(call['args'], ensure_ascii=False, default=str)})"


def last_prompt(messages: Sequence[BaseMessage]) -> str:
    return f"{transcript(messages)}\n\n{INSTRUCTION}"


def cut_to(text: str, most: int, count: Callable[[str], int]) -> str:
    """A text whose count is at most `most`, cut out of its middle: the task stays, and the latest steps.

    "" where not even the instruction fits.
    """
    kept = len(text)
    shown = text
    while count(shown) > most:
        kept = min(kept * 9 // 10, kept - 1)
        if kept < len(INSTRUCTION) + len(CUT):
            return INSTRUCTION if count(INSTRUCTION) <= most else ""
        end = max(kept // 2, len(INSTRUCTION))
        shown = text[: kept - end] + CUT + text[len(text) - end :]
    return shown
