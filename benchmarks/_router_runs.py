"""`routers.py --data`: the parts of all tables one after the other, each kept as soon as it is done.

Two processes may share a folder: a part that one of them is at is left to it.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from _router_units import Half, Run, measure

from viaticum.routers.query.encoder import Encoder


def run_all(arguments: Namespace) -> list[Run]:
    """Compute what is missing of one half, and return all that there is."""
    folder: Path = arguments.work
    folder.mkdir(parents=True, exist_ok=True)
    ends = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    encoder = Encoder(cache=arguments.embeddings or "")
    for name in arguments.tables:
        half = Half(arguments.data, name, arguments.half, encoder)
        for unit in half.units(arguments.parts, arguments.seeds):
            if ends is not None and time.monotonic() > ends:
                break
            if (folder / unit.file).exists() or not _claim(folder / f"{unit.file}.lock"):
                continue
            began = time.perf_counter()
            try:
                run = measure(
                    half,
                    unit,
                    baselines=not arguments.no_baselines,
                    before=arguments.before,
                    llmrouter=arguments.llmrouter_python,
                    report=_progress,
                )
                run.save(folder)
            finally:
                (folder / f"{unit.file}.lock").unlink()
            _log(folder, f"{unit.file} {time.perf_counter() - began:.0f} s, load {os.getloadavg()[0]:.1f}")
    return list(read_runs(folder, arguments.half, arguments.tables))


def read_runs(folder: Path, half: str, tables: list[str]) -> Iterator[Run]:
    """The parts of a half that were computed."""
    for name in tables:
        for file in sorted(folder.glob(f"{name}.{half}.*.npz")):
            yield Run.load(file)


def _claim(lock: Path) -> bool:
    """Whether no other process that lives is at this part."""
    try:
        with lock.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        text = lock.read_text()
        if not text or Path(f"/proc/{text}").exists():
            return False
        lock.unlink()
        return _claim(lock)
    return True


def _progress(text: str) -> None:
    sys.stderr.write(f"  {text}\n")


def _log(folder: Path, line: str) -> None:
    with (folder / "log.txt").open("a") as file:
        file.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.write(f"{line}\n")
