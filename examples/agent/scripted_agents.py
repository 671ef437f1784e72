"""Scripted models with stated abilities, for the arithmetic of money: nothing about real models follows.

At each step of a task a model calls the right tool with the chance of its ability, or it makes an error that
the tool reports, or it answers wrong. Draws are seeded by model, task and step. A word is a token, and what
a model read in its last call is charged as cached, as providers do.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from task_set import Task
from text_tools import ANSWER, ERROR, RESULT

from viaticum import ScriptedModel
from viaticum.catalogue import ModelSpec
from viaticum.models.base import Generation, StreamPiece
from viaticum.types import Completion, Message, Usage

BROKEN = {"sql": "SELECT total FROM nowhere", "search": "xyzzy", "python": "print(1 / 0)"}


@dataclass(frozen=True)
class Ability:
    """What a scripted model can, and costs.

    Attributes:
        short: chance that a step is right in a task of one tool.
        long: the same in a task of several.
        errors: share of wrong steps that end in an error of the tool; the others end in a wrong answer.
        prices: dollars per million tokens read, read from the cache, and written.
    """

    short: float
    long: float
    errors: float
    prices: tuple[str, str, str]

    def __str__(self) -> str:
        read, cached, written = self.prices
        return (
            f"a step is right with {self.short:.0%} in tasks of one tool and {self.long:.0%} in others, "
            f"{self.errors:.0%} of wrong steps are errors of the tool; ${read} read, ${cached} cached, "
            f"${written} written, per million tokens"
        )


ABILITIES = {
    "small": Ability(0.90, 0.45, 0.90, ("0.25", "0.025", "2")),
    "large": Ability(0.97, 0.93, 0.90, ("3", "0.30", "15")),
}


class ScriptedAgent(ScriptedModel):
    """A model that solves the tasks as well as its ability says."""

    def __init__(self, name: str, ability: Ability, tasks: Sequence[Task], seed: int = 0) -> None:
        read, cached, written = map(Decimal, ability.prices)
        spec = ModelSpec(
            name=name,
            description=f"Scripted: {ability}.",
            kind="scripted",
            context_length=8192,
            input_price=read,
            cached_input_price=cached,
            output_price=written,
        )
        super().__init__(self._reply, spec=spec)
        self._ability, self._seed = ability, seed
        self._tasks: Mapping[str, Task] = {task.question: task for task in tasks}
        self._read: list[Message] = []

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[StreamPiece]:
        same = 0
        while same < min(len(messages), len(self._read)) and messages[same] == self._read[same]:
            same += 1
        self._read = list(messages)
        cached = sum(self.count(message["content"]) for message in messages[:same])
        for piece in super().stream(messages, generation):
            if isinstance(piece, Completion):
                count = replace(piece.usage.models[self.name], cached_input_tokens=cached)
                piece = replace(piece, usage=Usage({self.name: count}, piece.usage.seconds))
            yield piece

    def _reply(self, messages: Sequence[Message], generation: Generation) -> str:
        begun = max(n for n, each in enumerate(messages) if each["content"] in self._tasks)
        task = self._tasks[messages[begun]["content"]]
        said = [each["content"] for each in messages[begun:] if each["role"] == "user"]
        results = [text.removeprefix(f"{RESULT}: ") for text in said if text.startswith(f"{RESULT}: ")]
        taken = [_take(step.take, result) for step, result in zip(task.solution, results, strict=False)]
        if len(results) >= len(task.solution):
            return f"{ANSWER}: {taken[-1]}"
        errors = sum(text.startswith(f"{ERROR}: ") for text in said)
        rng = random.Random(f"{self._seed}/{self.name}/{task.id}/{len(results)}/{errors}")
        step = task.solution[len(results)]
        if rng.random() < (self._ability.short if len(task.solution) == 1 else self._ability.long):
            return f"{step.tool.upper()}: {step.input.format(*taken)}"
        if rng.random() < self._ability.errors:
            return f"{step.tool.upper()}: {BROKEN[step.tool]}"
        return f"{ANSWER}: 0"


def _take(pattern: str, result: str) -> str:
    found = re.search(pattern, result)
    return found[1].strip() if found else "0"
