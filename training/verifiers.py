"""Verifiers: does it matter that the small model would have written another token?

`outcome` compares the final answers of both texts: exact where answers can be compared, and without a known
right answer, because the texts are compared with each other. `semantic` compares the sentences that hold the
difference: equal numbers and similar embeddings. `llm` asks a model, as R2R does (arXiv 2505.21600);
`llm:NAME` asks that model of the catalogue. A new verifier is one method and one call of `register`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from viaticum.catalogue import Catalogue
from viaticum.errors import UnknownName
from viaticum.models.base import Generation, Model
from viaticum.strategies import Strategy, equivalent
from viaticum.strategies.answers import find_number
from viaticum.training.sentences import DivergenceSpan
from viaticum.types import Completion, FinishReason, Message, Query, Usage

Verdict = tuple[int, bool | None]  # index in the list; True: divergent, False: neutral, None: unknown
MIN_COSINE = 0.9  # of sentences with the same meaning (all-minilm-l6-v2)
CONTEXT_CHARACTERS = 600  # of the common text before the difference, in a model's prompt


@dataclass(frozen=True, slots=True)
class Difference:
    """One token of the small model that differs from the large one's.

    Args:
        query: the question.
        span: the sentences around the difference.
        original: the large model's whole text, which ended by itself.
        other: its text with the small model's token in it; None where it was cut at the end of a sentence.
        other_finish: finish reason of `other`.
    """

    query: Query
    span: DivergenceSpan
    original: str
    other: str | None
    other_finish: FinishReason = "stop"


class Verifier(ABC):
    """Judges differences. needs_ending: it reads `Difference.other`, which has to be complete."""

    name: str
    needs_ending: bool = False

    @abstractmethod
    def judge(self, differences: Sequence[Difference]) -> Iterator[Verdict]:
        """Yield a verdict for each difference, in any order, as soon as it is known."""


@dataclass(frozen=True)
class VerifierContext:
    """What a verifier is made from.

    Args:
        strategy: of the texts.
        embed: returns sentence embeddings of length 1, [N, D].
        model: returns a model by its name.
        large: name of the pair's large model.
    """

    strategy: Strategy
    embed: Callable[[Sequence[str]], Any]
    model: Callable[[str], Model]
    large: str


class CatalogueEmbedding:
    """Sentence embeddings by the catalogue's encoder, loaded at the first call."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._encoder: Any = None

    def __call__(self, texts: Sequence[str]) -> Any:
        from viaticum.routers.query.encoder import Encoder

        self._encoder = self._encoder or Encoder(catalogue=self._catalogue)
        return self._encoder(texts)


class OutcomeVerifier(Verifier):
    """Divergent: the texts have different answers, or one has none."""

    name, needs_ending = "outcome", True

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def judge(self, differences: Sequence[Difference]) -> Iterator[Verdict]:
        for index, each in enumerate(differences):
            if each.other is None:
                yield index, None
                continue
            ours = self._answer(each.original, "stop", each.query)
            theirs = self._answer(each.other, each.other_finish, each.query)
            yield index, not equivalent(ours, theirs, each.query.kind)

    def _answer(self, text: str, finish: FinishReason, query: Query) -> str | None:
        return self.strategy.read(Completion(text, Usage(), finish), query).value


class SemanticVerifier(Verifier):
    """Divergent: the sentences have different numbers, or a cosine similarity below `min_cosine`.

    embed: returns vectors of length 1 of texts, [N, D].
    """

    name = "semantic"

    def __init__(self, embed: Callable[[Sequence[str]], Any], min_cosine: float = MIN_COSINE) -> None:
        self.embed, self.min_cosine = embed, min_cosine

    def judge(self, differences: Sequence[Difference]) -> Iterator[Verdict]:
        if not differences:
            return
        texts = [text.strip() for each in differences for text in (each.span.original, each.span.other)]
        vectors = self.embed(texts)
        for index in range(len(differences)):
            ours, theirs = texts[2 * index : 2 * index + 2]
            cosine = float(vectors[2 * index] @ vectors[2 * index + 1])
            yield index, numbers_in(ours) != numbers_in(theirs) or cosine < self.min_cosine


SYSTEM = (
    "You compare two continuations of a solution that differ first at one word. Say whether the "
    "difference matters: whether it changes the meaning, the reasoning, the logic or the conclusion, "
    "brings new information, or shifts the focus. Other words for the same thing, another order or "
    "another style do not matter. Reply with 1 if the difference matters and with 0 if it does not, and "
    "nothing else."
)
EXAMPLES = (
    ("", "She sells the remaining 9 eggs.", "She sells the other 9 eggs.", "0"),
    (
        "There are 16 eggs.",
        "She eats 3, so 16 - 3 = 13 are left.",
        "She eats 3, so 16 + 3 = 19 are left.",
        "1",
    ),
)


class ModelVerifier(Verifier):
    """Divergent: a model answers 1. An answer that is neither 0 nor 1 is no verdict."""

    def __init__(self, model: Model, name: str = "llm") -> None:
        self.model, self.name = model, name

    def judge(self, differences: Sequence[Difference]) -> Iterator[Verdict]:
        generation = Generation(max_new_tokens=16)
        chats = [comparison(each) for each in differences]
        generate_all = getattr(self.model, "generate_all", None)  # local models answer many chats at once
        answers = (
            generate_all(chats, generation)
            if generate_all is not None
            else ((index, self.model.generate(chat, generation)) for index, chat in enumerate(chats))
        )
        for index, completion in answers:
            yield index, read_verdict(completion.text)


def comparison(difference: Difference) -> list[Message]:
    """Return the chat that asks a model about one difference."""
    messages: list[Message] = [{"role": "system", "content": SYSTEM}]
    for context, ours, theirs, verdict in EXAMPLES:
        messages.append({"role": "user", "content": _describe("", context, ours, theirs)})
        messages.append({"role": "assistant", "content": verdict})
    span = difference.span
    context = span.context[-CONTEXT_CHARACTERS:]
    content = _describe(difference.query.text, context, span.original, span.other)
    return [*messages, {"role": "user", "content": content}]


def _describe(question: str, context: str, original: str, other: str) -> str:
    """Both sentences, with the words from the difference on between << and >>."""
    same = 0
    while same < min(len(original), len(other)) and original[same] == other[same]:
        same += 1
    same = original.rfind(" ", 0, same) + 1
    lines = [f"Question: {question.strip()}"] if question else []
    lines += [f"Both say: {context.strip()}"] if context.strip() else []
    for label, text in (("A", original), ("B", other)):
        lines.append(f"{label}: {text[:same].lstrip()}<<{text[same:].rstrip()}>>")
    return "\n".join(lines)


def read_verdict(text: str) -> bool | None:
    """Return True for 1 (divergent), False for 0 (neutral), None for both or neither."""
    found = set(re.findall(r"(?<![\d.])[01](?![\d.]*\d)", text))
    return found.pop() == "1" if len(found) == 1 else None


def numbers_in(text: str) -> list[Any]:
    """Return the numbers of a sentence in their order, as values: 1,000.50 is 1000.5."""
    found = re.findall(r"\d[\d,]*(?:\.\d+)?", text)
    return [find_number(each.rstrip(",")) for each in found]


Factory = Callable[[VerifierContext, str], Verifier]  # the second: what follows the colon in NAME:REST
_factories: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> None:
    """Register a verifier; one of the same name is replaced."""
    _factories[name] = factory


def names() -> tuple[str, ...]:
    return tuple(_factories)


def check_names(wanted: Sequence[str]) -> None:
    """Raise `UnknownName` for a name without a verifier."""
    for name in wanted:
        if name.partition(":")[0] not in _factories:
            raise UnknownName("verifier", name, names())


def make(name: str, context: VerifierContext) -> Verifier:
    """Return the verifier of a name, or of `name:rest`. Raises `UnknownName`."""
    check_names([name])
    kind, _, rest = name.partition(":")
    verifier = _factories[kind](context, rest)
    verifier.name = name
    return verifier


register("outcome", lambda context, rest: OutcomeVerifier(context.strategy))
register("semantic", lambda context, rest: SemanticVerifier(context.embed))
register("llm", lambda context, rest: ModelVerifier(context.model(rest or context.large)))
