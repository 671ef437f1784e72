"""A client over two models with fixed answers, for the tests of the workflow."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path

from viaticum import Pair, Viaticum
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.models.base import Generation, Model
from viaticum.routers.query import StaticRouter
from viaticum.types import Completion, Message, RoutingTable, Row, TokenCount, Usage

SMALL, LARGE = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"


class ScriptedModel(Model):
    """Generates the same text each time: 100 tokens read, 20 generated."""

    runs_here = True

    def __init__(self, name: str, text: str, pause: float = 0.0) -> None:
        self.name, self.members, self.text, self.pause, self.calls = name, (name,), text, pause, 0

    def worst_case(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, TokenCount]:
        return {self.name: TokenCount(100, max_new_tokens)}

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str | Completion]:
        self.calls += 1
        for word in self.text.split(" "):
            time.sleep(self.pause)
            yield word + " "
        yield Completion(self.text, Usage({self.name: TokenCount(100, 20)}, 0.1), "stop")


def scripted_catalogue(names: Iterable[str], output_price: str = "0.1") -> Catalogue:
    """Remote entries of these names, a tenth of a dollar for a million tokens of input."""
    return Catalogue(
        ModelSpec(
            name=name,
            description="scripted",
            kind="remote",
            litellm_model=f"openai/{name}",
            context_length=4096,
            input_price=Decimal("0.1"),
            output_price=Decimal(output_price),
        )
        for name in names
    )


def row(model: str, accuracy: float, cost: int) -> Row:
    return Row(Pair(model, "cot"), accuracy, 20, 30, cost, cost * 2)


TABLE = RoutingTable((row(SMALL, 0.4, 10_000), row(LARGE, 0.7, 20_000)))


def client(folder: Path, small: str, large: str, pause: float = 0.0, **settings: object) -> Viaticum:
    models: dict[str, Model] = {
        SMALL: ScriptedModel(SMALL, small, pause),
        LARGE: ScriptedModel(LARGE, large, pause),
    }
    return Viaticum(
        folder=folder, router=StaticRouter(TABLE), models=models, catalogue=Catalogue.load(), **settings
    )  # type: ignore[arg-type]
