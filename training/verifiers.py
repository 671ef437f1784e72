"""Does it matter that the small model would have written another token? Verifiers behind one contract.

`outcome` compares the final answers that both texts come to: exact where answers can be compared, and it needs no
known right answer, for the texts are compared with each other. `semantic` compares the sentences that hold the
difference: numbers equal and embeddings close. `llm` asks a model, as R2R does (arXiv 2505.21600); `llm:NAME` asks that
model of the catalogue. A verifier of your own is one method and one `register`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from viaticum.errors import UnknownName
from viaticum.models.base import Generation, Model
from viaticum.strategies import Strategy, equivalent
from viaticum.strategies.answers import find_number
from viaticum.training.sentences import DivergenceSpan
from viaticum.types import Completion, FinishReason, Message, Query, Usage

Verdict = tuple[int, bool | None]  # place in the list; True: divergent, False: neutral, None: not told
CLOSE = 0.9  # cosine of sentences that say the same (all-minilm-l6-v2)
CONTEXT = 600  # characters of what both texts say before that a model is shown


@dataclass(frozen=True, slots=True)
class Difference:
    """One place where the small model's token differs.

    parting: the sentences around it; original and other: the whole texts, other None where it was written to a
    sentence's end alone. The original ended by itself.
    """

    query: Query
    parting: DivergenceSpan
    original: str
    other: str | None
    other_finish: FinishReason = "stop"


class Verifier(ABC):
    """needs_ending: whether it looks at `other`, so that the other text has to be written to its end."""

    name: str
    needs_ending: bool = False

    @abstractmethod
    def judge(self, differences: Sequence[Difference]) -> Iterator[Verdict]:
        """A verdict for each difference, in any order, as soon as it is known."""


@dataclass(frozen=True)
class VerifierContext:
    """What verifiers are made from: the strategy of the texts, sentence embeddings, models by name, the pair's LLM."""

    strategy: Strategy
    embed: Callable[[Sequence[str]], Any]
    model: Callable[[str], Model]
    large: str


class OutcomeVerifier(Verifier):
    """Divergent: the texts come to different answers, or one of them to none."""

    name, needs_ending = "outcome", True

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def judge(self, differences: Sequence[Difference]) -> Iterator[Verdict]:
        for place, each in enumerate(differences):
            if each.other is None:
                yield place, None
                continue
            ours = self._answer(each.original, "stop", each.query)
            theirs = self._answer(each.other, each.other_finish, each.query)
            yield place, not equivalent(ours, theirs, each.query.kind)

    def _answer(self, text: str, finish: FinishReason, query: Query) -> str | None:
        return self.strategy.read(Completion(text, Usage(), finish), query).value


class SemanticVerifier(Verifier):
    """Divergent: the sentences have other numbers, or their embeddings are further apart than `close`.

    embed: texts to vectors of length 1, [N, D].
    """

    name = "semantic"

    def __init__(self, embed: Callable[[Sequence[str]], Any], close: float = CLOSE) -> None:
        self.embed, self.close = embed, close

    def judge(self, differences: Sequence[Difference]) -> Iterator[Verdict]:
        if not differences:
            return
        texts = [text.strip() for each in differences for text in (each.parting.original, each.parting.other)]
        vectors = self.embed(texts)
        for place in range(len(differences)):
            ours, theirs = texts[2 * place : 2 * place + 2]
            near = float(vectors[2 * place] @ vectors[2 * place + 1])
            yield place, numbers_in(ours) != numbers_in(theirs) or near < self.close


SYSTEM = (
    "You compare two continuations of a solution that differ first at one word. Say whether the difference matters: "
    "whether it changes the meaning, the reasoning, the logic or the conclusion, brings new information, or shifts "
    "the focus. Other words for the same thing, another order or another style do not matter. "
    "Reply with 1 if the difference matters and with 0 if it does not, and nothing else."
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
    """Divergent: a model says so. An answer that is neither 0 nor 1 is no verdict."""

    def __init__(self, model: Model, name: str = "llm") -> None:
        self.model, self.name = model, name

    def judge(self, differences: Sequence[Difference]) -> Iterator[Verdict]:
        generation = Generation(max_new_tokens=16)
        chats = [comparison(each) for each in differences]
        together = getattr(self.model, "generate_all", None)  # local models read many chats at once
        answers = (
            together(chats, generation)
            if together is not None
            else ((place, self.model.generate(chat, generation)) for place, chat in enumerate(chats))
        )
        for place, completion in answers:
            yield place, read_verdict(completion.text)


def comparison(difference: Difference) -> list[Message]:
    """The chat that asks a model about one difference."""
    messages: list[Message] = [{"role": "system", "content": SYSTEM}]
    for context, ours, theirs, verdict in EXAMPLES:
        messages.append({"role": "user", "content": _show("", context, ours, theirs)})
        messages.append({"role": "assistant", "content": verdict})
    parting = difference.parting
    shown = _show(difference.query.text, parting.context[-CONTEXT:], parting.original, parting.other)
    return [*messages, {"role": "user", "content": shown}]


def _show(question: str, context: str, original: str, other: str) -> str:
    """Both sentences, the words from the difference on between << and >>."""
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
    """1 is divergent, 0 neutral, both or neither no verdict."""
    found = set(re.findall(r"(?<![\d.])[01](?![\d.]*\d)", text))
    return found.pop() == "1" if len(found) == 1 else None


def numbers_in(text: str) -> list[Any]:
    """The numbers of a sentence in their order, as values: 1,000.50 is 1000.5."""
    found = re.findall(r"\d[\d,]*(?:\.\d+)?", text)
    return [find_number(each.rstrip(",")) for each in found]


Maker = Callable[[VerifierContext, str], Verifier]  # the second: what follows the colon in NAME:REST
_makers: dict[str, Maker] = {}


def register(name: str, maker: Maker) -> None:
    """Make a verifier known; one of the same name is replaced."""
    _makers[name] = maker


def names() -> tuple[str, ...]:
    return tuple(_makers)


def check_names(wanted: Sequence[str]) -> None:
    """Raises `UnknownName`."""
    for name in wanted:
        if name.partition(":")[0] not in _makers:
            raise UnknownName("verifier", name, names())


def make(name: str, bench: VerifierContext) -> Verifier:
    """The verifier of that name, or of `name:rest`. Raises `UnknownName`."""
    check_names([name])
    kind, _, rest = name.partition(":")
    verifier = _makers[kind](bench, rest)
    verifier.name = name
    return verifier


register("outcome", lambda bench, rest: OutcomeVerifier(bench.strategy))
register("semantic", lambda bench, rest: SemanticVerifier(bench.embed))
register("llm", lambda bench, rest: ModelVerifier(bench.model(rest or bench.large)))
