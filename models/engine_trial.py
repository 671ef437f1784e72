"""Tries a local model with one engine after the other: time to load, memory, first token, time of a step.

Which engine follows is in `viaticum.models.engine_choice`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.errors import InputError
from viaticum.local_settings import LocalSettings
from viaticum.models.engine_choice import PROMPT, EngineFigures, save_figures
from viaticum.models.local import LocalModels
from viaticum.weights import locate

if TYPE_CHECKING:
    from viaticum.decoders import Runner

ROWS = (1, 4, 16)
STEPS = 5  # of which the median is taken


def engines_of(spec: ModelSpec) -> list[str]:
    """The engine that an entry names, else torch, and llama.cpp if its wheel and a GGUF file are here.

    Raises:
        WeightsError: weights are missing.
    """
    from viaticum.decoders.llama_library import is_installed
    from viaticum.decoders.load import gguf_file

    if spec.engine not in (None, "auto"):
        return [str(spec.engine)]
    return ["torch", *(["llama"] if is_installed() and gguf_file(locate(spec)) else [])]


def try_engines(
    catalogue: Catalogue, spec: ModelSpec, engines: Sequence[str], slots: int, report: Callable[[str], None]
) -> dict[str, EngineFigures]:
    """Load a model with each engine in turn and time it; what was measured is kept for `measured_engine`.

    Args:
        slots: most rows of a step.
        report: called with a line before each stage.

    Raises:
        WeightsError, MissingExtra, InputError: the model cannot be loaded with an engine.
    """
    figures: dict[str, EngineFigures] = {}
    for engine in engines:
        report(f"{spec.name}: {engine}")
        chosen = catalogue.with_local(LocalSettings.of(engine=engine))
        figures[engine] = _try(chosen, spec.name, slots)
        gc.collect()  # the next one is weighed without it
    save_figures(spec, figures)
    return figures


def _try(catalogue: Catalogue, name: str, slots: int) -> EngineFigures:
    before, began = resident_bytes(), time.perf_counter()
    runner = LocalModels(catalogue, slots=slots).runner(name)
    load = time.perf_counter() - began
    try:
        prefill, steps = time_calls(runner)
        after = resident_bytes()
    finally:
        getattr(runner, "close", lambda: None)()
    return EngineFigures(load, None if after is None or before is None else after - before, prefill, steps)


def time_calls(runner: Runner) -> tuple[float, dict[int, float]]:
    """Seconds of a prompt of `PROMPT` tokens, and of a step of so many rows, by their number.

    Args:
        runner: none of its slots may be in use.

    Raises:
        InputError: its context is too short, or slots are in use.
    """
    from viaticum.decoders.call_times import measure

    if runner.context <= PROMPT:
        raise InputError(f"a context of {runner.context} is too short to time a prompt of {PROMPT} tokens")
    prefill = min(_prefill(runner, turn) for turn in range(3))
    times = measure(runner, rows=ROWS, tokens=(1,), context=PROMPT, repeats=STEPS)
    return prefill, dict(zip(times.rows, (seconds for (seconds,) in times.seconds), strict=True))


def _prefill(runner: Runner, turn: int) -> float:
    runner.reset(0)
    prompt = [1 + (i * (turn + 7)) % (runner.vocabulary - 1) for i in range(PROMPT)]
    began = time.perf_counter()
    runner.extend([0], [prompt]).argmax(-1).tolist()
    return time.perf_counter() - began


def resident_bytes() -> int | None:
    """Memory that this process holds, mapped files included; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)
