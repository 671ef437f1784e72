"""The contract of a strategy: how it asks, and how it reads the reply.

A strategy turns a query into chat messages and a completion into a reading. It calls no model and knows no
prices. Messages are a system turn, then alternating user and assistant turns that end with the user's, which
every chat template accepts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from viaticum.strategies.answers import read_answer
from viaticum.types import AnswerKind, Completion, Message, Query, Reading

FORMAT_INSTRUCTIONS: Mapping[AnswerKind, str] = {
    "auto": "",
    "number": "",  # the form shown by the worked examples
    "choice": "The answer is the letter of one choice.",
    "boolean": "The answer is yes or no.",
    "date": "The answer is a date, written YYYY-MM-DD.",
    "expression": "The answer is a mathematical expression.",
    "text": "The answer is a word or a short phrase.",
}


class Example(NamedTuple):
    """A worked example: a question and the reply that the model should imitate."""

    question: str
    reply: str


class Strategy(ABC):
    """One way to reason. Subclass it, set `name` and `description`, write two methods, and register it.

    Attributes:
        description: one or two sentences, embedded by query routers.
        needs: resources required of the machine, such as {"sandbox"}.
        max_new_tokens: upper bound of the tokens of a completion.
        stop: texts that end a completion.
        samples: most completions to ask for; `vote` says after each whether they suffice.
        temperature: sampling temperature, 0 for greedy.
        graded: whether its answers can be compared with a right answer; profiles skip other strategies.
    """

    name: str
    description: str
    needs: frozenset[str] = frozenset()
    max_new_tokens: int = 400
    stop: tuple[str, ...] = ()
    samples: int = 1
    temperature: float = 0.0
    graded: bool = True

    @abstractmethod
    def messages(self, query: Query) -> list[Message]:
        """The chat that asks `query`."""

    @abstractmethod
    def read(self, completion: Completion, query: Query) -> Reading:
        """The answer in `completion`, or None with the reason. Never raises because of what a model wrote."""

    def vote(self, readings: Sequence[Reading], query: Query, *, last: bool = False) -> Reading | None:
        """The answer of the completions so far, or None to ask again, for at most `samples` in all.

        last: no further completion is possible, for example for lack of budget; the answer is then not None.
        """
        return readings[-1] if readings else None


@dataclass(frozen=True)
class PromptStrategy(Strategy):
    """A strategy that is a prompt: a system turn, worked examples and the question; the reply is free text.

    A subclass sets `system` and `examples`, and overrides `read` if the reply is not free text.

    Attributes:
        system: the instructions.
        examples: question and reply of each, sent as a user and an assistant turn before the question.
    """

    system: str
    examples: tuple[Example, ...]

    def messages(self, query: Query) -> list[Message]:
        return chat(self.system, self.examples, query)

    def read(self, completion: Completion, query: Query) -> Reading:
        return read_text(completion, query)


def chat(system: str, examples: Sequence[Example], query: Query) -> list[Message]:
    """A system turn, each worked example as a user and an assistant turn, and the question."""
    messages: list[Message] = [{"role": "system", "content": system}]
    for example in examples:
        messages.append({"role": "user", "content": example.question})
        messages.append({"role": "assistant", "content": example.reply})
    question, instruction = query.text.strip(), FORMAT_INSTRUCTIONS[query.kind]
    content = f"{question}\n{instruction}" if instruction else question
    messages.append({"role": "user", "content": content})
    return messages


def with_history(history: Sequence[Message], messages: Sequence[Message]) -> list[Message]:
    """The conversation so far followed by a strategy's messages, as one chat that every template accepts.

    All system turns are joined into one at the start; adjacent turns of the same role are joined.
    """
    system = [each["content"] for each in (*messages, *history) if each["role"] == "system"]
    joined: list[Message] = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    for message in (*history, *messages):
        if message["role"] == "system":
            continue
        if joined and joined[-1]["role"] == message["role"]:
            content = f"{joined[-1]['content']}\n\n{message['content']}"
            joined[-1] = {"role": message["role"], "content": content}
        else:
            joined.append({"role": message["role"], "content": message["content"]})
    return joined


def is_truncated(completion: Completion) -> bool:
    """Whether the text ended early: at the token limit, in a loop, or stopped from outside."""
    return completion.finish_reason != "stop"


def read_text(completion: Completion, query: Query) -> Reading:
    """The final answer of free text.

    In a truncated text only a marked answer ("The answer is ..." or the like) counts: its last number is an
    intermediate step.
    """
    value = read_answer(completion.text, query.kind, marked_only=is_truncated(completion))
    if value is not None:
        return Reading(value)
    if is_truncated(completion):
        return Reading(
            None, f"the text ended before a final answer (finish reason {completion.finish_reason})"
        )
    return Reading(None, "no answer in the text")
