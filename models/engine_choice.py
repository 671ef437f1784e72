"""The engine that computes a local model fastest on this machine, as `viaticum models test` measured it.

Leaves out the measuring (`viaticum.models.engine_trial`) and which engine is taken without a measurement
(`viaticum.decoders.load.default_engine`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from viaticum.catalogue import ModelSpec
from viaticum.files import atomic_write
from viaticum.weights import cache_dir, fingerprint

ENGINES = ("torch", "llama")
PROMPT = 256  # tokens of the prompt that is timed
ANSWER = 256  # tokens of the answer that engines are compared for
MOST_STREAMS = 16


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """One engine's times with one model, in seconds, on this machine.

    Args:
        load: until the first call could be made.
        resident: bytes by which the process has grown after the calls; None where the system does not tell.
        prefill: a prompt of `PROMPT` tokens, up to the first token of the answer.
        steps: a step of so many rows, by their number; those beyond the slots are left out.
    """

    load: float
    resident: int | None
    prefill: float
    steps: dict[int, float]

    def tokens_per_second(self, rows: int) -> float:
        return rows / self.steps[rows]

    def answer_seconds(self, streams: int) -> float:
        """Seconds per answer of `ANSWER` tokens to a prompt of `PROMPT`, with so many written at once."""
        rows = max((count for count in self.steps if count <= streams), default=1)
        return self.prefill + ANSWER * self.steps[rows] / rows


def measured_engine(spec: ModelSpec, slots: int | Literal["auto"]) -> str | None:
    """The engine that was fastest with so many answers at once; None unless several engines were measured.

    Times of other weights, another machine or another number of threads do not count.
    """
    try:
        values = json.loads(_path(spec).read_text(encoding="utf-8"))
        if values["conditions"] != _conditions(spec):
            return None
        found: dict[str, Any] = values["engines"]
        figures = {engine: _figures(each) for engine, each in found.items() if engine in ENGINES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if len(figures) < 2:
        return None
    return fastest_engine(figures, MOST_STREAMS if slots == "auto" else slots)


def fastest_engine(figures: Mapping[str, EngineFigures], streams: int) -> str:
    """The engine that writes an answer in the least time with so many answers at once."""
    return min(figures, key=lambda engine: figures[engine].answer_seconds(streams))


def _path(spec: ModelSpec) -> Path:
    return cache_dir() / "engines" / f"{spec.file_name}.json"


def _conditions(spec: ModelSpec) -> dict[str, Any]:
    from viaticum.decoders.cost import conditions

    return conditions() | {"weights": fingerprint(spec)}


def save_figures(spec: ModelSpec, figures: Mapping[str, EngineFigures]) -> None:
    """Keep what was measured of a model, in place of what was measured before."""
    path = _path(spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    engines = {engine: asdict(each) for engine, each in figures.items()}
    atomic_write(path, json.dumps({"conditions": _conditions(spec), "engines": engines}, indent=1) + "\n")


def _figures(values: dict[str, Any]) -> EngineFigures:
    steps = {int(rows): float(seconds) for rows, seconds in values["steps"].items()}
    return EngineFigures(float(values["load"]), values["resident"], float(values["prefill"]), steps)
