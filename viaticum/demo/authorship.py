"""One answer that two models write together, and which of them wrote which part.

Leaves out how a token router decides (`viaticum.routers.token`) and colours (`screen`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from viaticum.errors import ModelError
from viaticum.models.base import Generation, Model, StreamPiece
from viaticum.questions import Question
from viaticum.routers.query.single_pair import SinglePairRouter
from viaticum.strategies.answers import is_right
from viaticum.types import Answer, Completion, Message, Pair, TokenCount, Trace

if TYPE_CHECKING:
    from viaticum.agents.client import Viaticum

STRATEGY = "cot"
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # the end of a text whose last character has further tokens


@dataclass(frozen=True)
class AuthoredAnswer:
    """An answer with its authors.

    Args:
        parts: (text, index in `models`), in their order; neighbours have different authors.
        models: the small one, then the large one.
        tokens: that each of them wrote.
    """

    question: Question
    answer: Answer
    right: bool
    parts: tuple[tuple[str, int], ...]
    models: tuple[str, ...]
    tokens: tuple[int, ...]


class TracedModel(Model):
    """A model that keeps its last completion: an `Answer` does not hold which model wrote which token."""

    def __init__(self, model: Model) -> None:
        self.model, self.completion = model, None
        self.name, self.members, self.runs_here = model.name, model.members, model.runs_here

    completion: Completion | None

    def worst_case(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, TokenCount]:
        return self.model.worst_case(messages, max_new_tokens)

    def worst_case_of(self, messages: Sequence[Message], generation: Generation) -> dict[str, TokenCount]:
        return self.model.worst_case_of(messages, generation)

    def count(self, text: str) -> int:
        return self.model.count(text)

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[StreamPiece]:
        for piece in self.model.stream(messages, generation):
            if isinstance(piece, Completion):
                self.completion = piece
            yield piece


def write_together(client: Viaticum, pair: str, question: Question) -> AuthoredAnswer:
    """Let both models of a pair answer a question, paid like any other.

    Raises:
        ViaticumError: there is no money or no answer.
    """
    traced = TracedModel(client.model(pair))
    asking = client.derive(
        router=SinglePairRouter(Pair(pair, STRATEGY), client.router), model=lambda name: traced
    )
    answer = asking.solve(question.query)
    if traced.completion is None or traced.completion.trace is None:
        raise ModelError(f"{pair} does not say which model wrote which token")
    trace = traced.completion.trace
    decode = client.model(pair).tokenizer.decode  # type: ignore[attr-defined]
    return AuthoredAnswer(
        question,
        answer,
        is_right(answer.value, question.accepted, question.query.kind),
        parts_of(trace, lambda tokens: str(decode(tokens, skip_special_tokens=True))),
        trace.models,
        tuple(trace.made_by.count(index) for index in range(len(trace.models))),
    )


def parts_of(trace: Trace, decode: Callable[[list[int]], str]) -> tuple[tuple[str, int], ...]:
    """The text of a trace by author. A character of several tokens is of the model that ended it."""
    pieces, before = list[tuple[str, int]](), ""
    for number, author in enumerate(trace.made_by, 1):
        text = decode(list(trace.tokens[:number]))
        if text.endswith(INCOMPLETE) and number < len(trace.tokens):
            continue
        pieces.append((text[len(before) :], author))
        before = text
    return tuple(
        ("".join(text for text, _ in group), author)
        for author, group in groupby(pieces, lambda each: each[1])
    )
