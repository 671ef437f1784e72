"""Scripted models and questions for tests of `tune`: each model is right on its own kinds of question."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from synthetic_outcomes import NAMES, WORDS

from viaticum.agents.batch.tune import Tuning
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.models.base import Generation
from viaticum.models.scripted import ScriptedModel
from viaticum.questions import Question
from viaticum.types import Message, Query


def questions(count: int = 48, known: int | None = None) -> list[Question]:
    """Of three kinds in turn; the answer, known for the first of them, is the number of the name."""
    kinds, made = list(WORDS), []
    for number in range(count):
        words = WORDS[kinds[number % 3]]
        picked = [words[(number * 7 + step * (1 + number // 10)) % len(words)] for step in range(4)]
        gold = str(number + 1) if known is None or number < known else None
        text = " ".join([*picked, NAMES[1 + number]])
        made.append(Question(f"q{number}", Query(text, "number"), gold))
    return made


def right(text: str) -> str:
    found = re.search(r"name(\d+)", text)
    assert found is not None
    return found[1]


def says(*kinds: str) -> Callable[[Sequence[Message], Generation], str]:
    """Right on questions of these kinds."""

    def script(messages: Sequence[Message], generation: Generation) -> str:
        text = str(messages[-1]["content"])
        known = any(word in text.split() for kind in kinds for word in WORDS[kind])
        return f"The answer is {right(text) if known else 0}."

    return script


def model(name: str, script: Any, price: str, pause: float = 0.0) -> ScriptedModel:
    spec = ModelSpec(
        name=name,
        description="says",
        kind="scripted",
        context_length=8000,
        input_price=price,
        output_price=price,
    )
    return ScriptedModel(script, spec=spec, pause=pause)


def tuning(folder: Path, asked: Sequence[Question], **changed: Any) -> Tuning:
    """A run of two scripted models, `some` and `all`, with one strategy and a dollar."""
    settings: dict[str, Any] = {"budget": "1", "models": ["some", "all"], "strategies": ["direct"]}
    settings |= {"catalogue": Catalogue(()), "ledger": folder / "ledger.db"} | changed
    return Tuning.open(asked, folder / "my-router", **settings)
