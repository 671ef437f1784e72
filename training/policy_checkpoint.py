"""The folder of a run that learns R-Stitch+'s policy: what it belongs to, its checkpoint, its learning curve.

A checkpoint is one file, written whole after every step, and holds all that the next step depends on; a run that was killed loses the
step at hand. There is no state of random numbers to keep: every draw is derived from the seed and the step. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from viaticum.errors import DataError, InputError

IDENTITY, CHECKPOINT, CURVE = "run.json", "checkpoint.safetensors", "curve.jsonl"
FORMAT = 1


@dataclass
class Progress:
    """What a run has done. asked: questions taken so far; learned: steps that changed the policy; curve: a row a step."""

    asked: int = 0
    learned: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.curve)


class PolicyRun:
    """A folder that one process writes to. identity: what its policy depends on; another one is refused.

    Raises `InputError` where the folder belongs to something else, or another process is at it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror or error}") from None
        self._lock = FileLock(folder / ".lock")  # the system frees that of a killed process
        self.facts: dict[str, Any] = {"format": FORMAT, **identity}
        path = folder / IDENTITY
        if path.exists():
            kept = _read_json(path)
            for name, value in self.facts.items():
                if kept.get(name) != value:
                    raise InputError(
                        f"{folder} was begun with another {name}: {_short(kept.get(name))}, now {_short(value)}; "
                        "learn into a new folder"
                    )
            self.facts = kept

    def __enter__(self) -> Self:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another run is learning into {self.folder}; wait for it, or use another folder"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def know(self, **facts: Any) -> None:
        """Keep a fact beside the identity, on the disk at once."""
        from viaticum.routers.token.labels import write_whole

        self.facts |= facts
        write_whole(self.folder / IDENTITY, json.dumps(self.facts, indent=1, ensure_ascii=False) + "\n")

    def save(self, progress: Progress, state: Mapping[str, Any]) -> None:
        """The checkpoint, and the curve as a file of its own."""
        from safetensors.torch import save

        from viaticum.routers.token.labels import write_bytes, write_whole

        told = {"asked": progress.asked, "learned": progress.learned, "curve": progress.curve}
        write_bytes(self.folder / CHECKPOINT, save(dict(state), {"progress": json.dumps(told)}))
        write_whole(self.folder / CURVE, "".join(json.dumps(row) + "\n" for row in progress.curve))

    def load(self) -> tuple[Progress, dict[str, Any]] | None:
        """None where nothing was saved yet. Raises `DataError` for a damaged checkpoint."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                progress = Progress(**json.loads(file.metadata()["progress"]))
                return progress, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} is damaged ({str(error).splitlines()[0]}); learn into a new folder"
            ) from None


def digest(value: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); learn into a new folder") from None


def _short(value: Any) -> str:
    """A value as a message shows it: hashes by their beginning."""
    if isinstance(value, dict) and "sha256" in value:
        return f"{value['name']} with sha256 {value['sha256'][:12]}"
    return repr(value)[:200]
