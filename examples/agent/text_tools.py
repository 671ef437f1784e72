"""Tools for models that only write text, as in ReAct (arXiv 2210.03629): a chat model around another one.

Local and scripted models of Viaticum take no tools. Here a model calls one by a line such as
`SQL: SELECT COUNT(*) FROM boats`, or gives its answer; results come back as text. So any agent of LangChain
can use it, unchanged.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import BaseTool

RESULT, ERROR, ANSWER = "RESULT", "ERROR", "ANSWER"
FORM = """Reply with one of these and nothing else:
{tools}
ANSWER: the final answer, short
After a tool you get a RESULT or an ERROR, then reply again."""
# Turns of a conversation: small models follow them better than a description. None is of the tasks.
EXAMPLES = (
    ("How many boats are tugs?", "SQL: SELECT COUNT(*) FROM boats WHERE kind = 'tug'", "3", "3"),
    ("Who is the captain of the Swan?", "SEARCH: captain Swan", "Captain of the Swan: Tom Bell", "Tom Bell"),
    ("What is the remainder when 7 ** 20 is divided by 90?", "PYTHON: print(7 ** 20 % 90)", "31", "31"),
)
_BARE = {"sql": re.compile(r"(?:select|with)\b", re.IGNORECASE)}  # a call without the name of its tool
_FENCED = re.compile(r"```(\w*)\n(.*?)(?:```|$)", re.DOTALL)


class TextTools(BaseChatModel):
    """A chat model whose tools are called in text.

    Args:
        chat: the model that writes, such as a `ChatViaticum`.
        model_name: the name that it is traced and priced under.
    """

    chat: BaseChatModel
    model_name: str

    @property
    def _llm_type(self) -> str:
        return "text-tools"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Any:
        return self.bind(tools=list(tools))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        tools: Sequence[BaseTool] = (),
        **kwargs: Any,
    ) -> ChatResult:
        sent = [as_text(message) for message in messages]
        if tools:
            form = FORM.format(tools="\n".join(f"{each.name.upper()}: {each.description}" for each in tools))
            before = sent.pop(0).text if isinstance(sent[0], SystemMessage) else ""
            sent = [SystemMessage(f"{before}\n\n{form}".strip()), *_examples(tools), *sent]
        written = self.chat.invoke(sent, stop=[f"\n{RESULT}", f"\n{ERROR}", *(stop or ())])
        tool, text = parse(written.text, [each.name for each in tools])
        calls = [{"name": tool, "args": {"text": text}, "id": uuid.uuid4().hex}] if tool else []
        message = AIMessage(
            written.text if tool else text,
            tool_calls=calls,
            usage_metadata=written.usage_metadata,
            response_metadata=dict(written.response_metadata),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])


def as_text(message: BaseMessage) -> BaseMessage:
    """A message as the model inside reads it."""
    if isinstance(message, ToolMessage):
        return HumanMessage(f"{ERROR if message.status == 'error' else RESULT}: {message.text}")
    return AIMessage(message.text or ANSWER) if isinstance(message, AIMessage) else message


def parse(text: str, tools: Sequence[str]) -> tuple[str | None, str]:
    """The tool that a text calls, and its input; or None and the answer.

    The first line that begins with a name counts, up to the next one that does: what a model makes up of
    results and further steps is left out. Without any, a block of code in the language of a tool is a call of
    it, as is a text that can be nothing else, and any other text the answer.
    """
    names = "|".join(map(re.escape, (*tools, ANSWER, RESULT, ERROR)))
    parts = re.split(rf"(?mi)^[\s*]*({names}):\**", text)
    for name, given in zip(map(str.lower, parts[1::2]), map(str.strip, parts[2::2]), strict=True):
        if name == ANSWER.lower():
            return None, given
        if name in tools:
            fenced = _FENCED.search(given)
            return name, (fenced[2] if fenced else given).strip().strip("`").strip()
    for language, code in _FENCED.findall(text):
        if language.lower() in tools:
            return language.lower(), code.strip()
    for tool, begins in _BARE.items():
        if tool in tools and begins.match(text.strip()):
            return tool, text.strip()
    return None, text.strip()


def _examples(tools: Sequence[BaseTool]) -> list[BaseMessage]:
    """The examples that these tools suffice for."""
    names = [tool.name for tool in tools]
    turns: list[BaseMessage] = []
    for question, call, result, answer in EXAMPLES:
        if call.partition(":")[0].lower() in names:
            turns += [HumanMessage(question), AIMessage(call)]
            turns += [HumanMessage(f"{RESULT}: {result}"), AIMessage(f"{ANSWER}: {answer}")]
    return turns
