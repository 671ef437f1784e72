"""The contract of a strategy: how it asks, and how it reads the reply.

A strategy turns a query into chat messages and a completion into a reading. It calls no model and knows no
prices. Messages are a system turn, then alternating user and assistant turns that end with the user's, which
every chat template accepts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, NamedTuple

from viaticum.errors import InputError
from viaticum.generation import GenerationSettings
from viaticum.messages import fold_system, with_history
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
        max_new_tokens: most tokens of a completion, on a model that thinks of the answer after the thought;
            None for the limit of the catalogue entry.
        temperature: sampling temperature, 0 for greedy; None for that of the entry. The settings after it
            likewise; see `viaticum.generation.GenerationSettings`.
        stop: texts that end a completion.
        samples: most completions to ask for; `vote` says after each whether they suffice.
        graded: whether its answers can be compared with a right answer; profiles skip other strategies.
    """

    name: str
    description: str
    needs: frozenset[str] = frozenset()
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = {}
    seed: int | None = None
    thinking_budget: int | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Mapping[str, Any] = {}
    extra_body: Mapping[str, Any] = {}
    stop: tuple[str, ...] = ()
    samples: int = 1
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

    @property
    def settings(self) -> GenerationSettings:
        """How its completions are generated, without the system turn, which is in `messages`.

        Raises:
            InputError: a setting is out of range.
        """
        try:
            return GenerationSettings.of(**{name: getattr(self, name) for name in SETTINGS})
        except InputError as error:
            name = getattr(self, "name", "") or type(self).__name__
            raise InputError(f"strategy {name!r}: {error}") from None

    @property
    def changed_settings(self) -> dict[str, Any]:
        """The settings, by name, that were set for this object and not by its class."""
        return {
            name: getattr(self, name) for name in SETTINGS if getattr(self, name) != getattr(type(self), name)
        }

    @property
    def has_own_system(self) -> bool:
        """Whether the system turn was set for this object, not by its class: entries then add nothing."""
        return getattr(self, "system", None) != getattr(type(self), "system", None)


# Every setting but the system turn, by its name in `Strategy` and in `GenerationSettings`.
SETTINGS = tuple(name for name in GenerationSettings.model_fields if name != "system")
INHERITED: Any = object()  # default of a field whose value is the attribute of the class


@dataclass(frozen=True)
class ConfiguredStrategy(Strategy):
    """A strategy with fields to change: `replace(Cot(), name="cot-8k", max_new_tokens=8192)`.

    A subclass gives its own values as attributes of the class. Attributes: see `Strategy`.

    Raises:
        InputError: a setting is out of range.
    """

    _: KW_ONLY
    name: str = INHERITED
    description: str = INHERITED
    max_new_tokens: int | None = INHERITED
    temperature: float | None = INHERITED
    top_p: float | None = INHERITED
    top_k: int | None = INHERITED
    min_p: float | None = INHERITED
    frequency_penalty: float | None = INHERITED
    presence_penalty: float | None = INHERITED
    repetition_penalty: float | None = INHERITED
    logit_bias: Mapping[int, float] = field(default=INHERITED, hash=False)
    seed: int | None = INHERITED
    thinking_budget: int | None = INHERITED
    reasoning_effort: str | None = INHERITED
    chat_template_kwargs: Mapping[str, Any] = field(default=INHERITED, hash=False)
    extra_body: Mapping[str, Any] = field(default=INHERITED, hash=False)
    stop: tuple[str, ...] = INHERITED

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) is INHERITED:
                object.__setattr__(self, each.name, getattr(type(self), each.name, ""))
        self.settings  # noqa: B018  validates them


for _field in fields(ConfiguredStrategy):  # so that the attributes of the classes are found
    delattr(ConfiguredStrategy, _field.name)


@dataclass(frozen=True)
class PromptStrategy(ConfiguredStrategy):
    """A strategy that is a prompt: a system turn, worked examples and the question; the reply is free text.

    A subclass sets `system` and `examples`, and overrides `read` if the reply is not free text.

    Attributes:
        system: the instructions; None for no system turn.
        examples: question and reply of each, sent as a user and an assistant turn before the question.
    """

    system: str | None
    examples: tuple[Example, ...]

    def messages(self, query: Query) -> list[Message]:
        return chat(self.system, self.examples, query)

    def read(self, completion: Completion, query: Query) -> Reading:
        return read_text(completion, query)


def messages_for(strategy: Strategy, query: Query, *, entry: str | None, call: str | None) -> list[Message]:
    """The chat that asks `query` of a model, after the conversation before the query.

    Args:
        entry: system turn of the model's catalogue entry: None, "" for a model that is to have none, or a
            text that stands before the strategy's instructions, unless these were set for this object.
        call: system turn of the call in place of the strategy's; "" for none.
    """
    messages = strategy.messages(query)
    if call is not None:
        messages = [each for each in messages if each["role"] != "system"]
        return with_history(query.messages, [*system_turn(call), *messages])
    if strategy.has_own_system or not entry:
        joined = with_history(query.messages, messages)
        return fold_system(joined) if entry == "" and not strategy.has_own_system else joined
    return with_history(query.messages, [*system_turn(entry), *messages])


def system_turn(text: str | None) -> list[Message]:
    """The system turn of a text; none for None and ""."""
    return [{"role": "system", "content": text}] if text else []


def chat(system: str | None, examples: Sequence[Example], query: Query) -> list[Message]:
    """A system turn, if any, each worked example as a user and an assistant turn, and the question."""
    messages = system_turn(system)
    for example in examples:
        messages.append({"role": "user", "content": example.question})
        messages.append({"role": "assistant", "content": example.reply})
    question, instruction = query.text.strip(), FORMAT_INSTRUCTIONS[query.kind]
    content = f"{question}\n{instruction}" if instruction else question
    messages.append({"role": "user", "content": content})
    return messages


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
    if completion.thinking and not completion.text.strip():
        return Reading(
            None, f"nothing follows the thought (finish reason {completion.finish_reason}); allow more tokens"
        )
    if is_truncated(completion):
        return Reading(
            None, f"the text ended before a final answer (finish reason {completion.finish_reason})"
        )
    return Reading(None, "no answer in the text")
