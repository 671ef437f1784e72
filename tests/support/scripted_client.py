"""A client over one scripted model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from viaticum import (
    FakeRouter,
    ScriptedModel,
    Viaticum,
)
from viaticum.models.base import Generation, StreamPiece


def double(messages: Any, generation: Generation) -> str:
    return f"The answer is {2 * int(messages[-1]['content'].rstrip('?').split()[-1])}."


def client(folder: Path, script: Any = double, pause: float = 0.0, **settings: Any) -> Viaticum:
    settings = {"budget": "0.1", "router": FakeRouter("scripted+direct"), **settings}
    return Viaticum(folder=folder, models={"scripted": ScriptedModel(script, pause=pause)}, **settings)


def watch(viaticum: Viaticum) -> list[StreamPiece]:
    """The pieces that the model of such a client writes from now on, as they come."""
    model: Any = viaticum.model("scripted")
    written, stream = list[StreamPiece](), model.stream

    def noted(messages: Any, generation: Generation) -> Iterator[StreamPiece]:
        for piece in stream(messages, generation):
            written.append(piece)
            yield piece

    model.stream = noted
    return written


LONG = " ".join(["word"] * 100)
