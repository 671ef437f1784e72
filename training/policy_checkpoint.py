"""The folder of a run that learns R-Stitch+'s policy: its identity, its checkpoint and its learning curve.

A checkpoint is one file, written atomically after every step, and holds all that the next step depends on; a
run that was killed loses the step in progress. There is no random state to store: every draw is
seeded by the seed and the step. Leaves out models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from viaticum.errors import DataError, InputError
from viaticum.files import atomic_write, run_lock, write_jsonl
from viaticum.training.provenance import check_identity

IDENTITY, CHECKPOINT, CURVE = "run.json", "checkpoint.safetensors", "curve.jsonl"
FORMAT = 1


@dataclass
class Progress:
    """State of a run.

    Args:
        asked: questions taken so far.
        learned: steps that changed the policy.
        curve: a row of measurements for each step.
    """

    asked: int = 0
    learned: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.curve)


class PolicyRun:
    """A folder that one process writes to; a context manager that holds its lock.

    Args:
        folder: made where it does not exist.
        identity: what the policy depends on.

    Raises:
        InputError: the folder belongs to something else, or another process holds it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror or error}") from None
        self._exit = ExitStack()
        self.facts: dict[str, Any] = {"format": FORMAT, **identity}
        path = folder / IDENTITY
        if path.exists():
            stored = _read_json(path)
            check_identity(folder, stored, self.facts, origin="was begun", verb="learn")
            self.facts = stored

    def __enter__(self) -> Self:
        busy = f"another run is learning into {self.folder}; wait for it, or use another folder"
        self._exit.enter_context(run_lock(self.folder / ".lock", busy=busy))
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def add_facts(self, **facts: Any) -> None:
        """Store facts beside the identity, on the disk at once."""
        self.facts |= facts
        atomic_write(self.folder / IDENTITY, json.dumps(self.facts, indent=1, ensure_ascii=False) + "\n")

    def save(self, progress: Progress, state: Mapping[str, Any]) -> None:
        """Write the checkpoint, then the curve as a file of its own. state: tensors by name."""
        from safetensors.torch import save

        metadata = {"asked": progress.asked, "learned": progress.learned, "curve": progress.curve}
        atomic_write(self.folder / CHECKPOINT, save(dict(state), {"progress": json.dumps(metadata)}))
        write_jsonl(self.folder / CURVE, progress.curve)

    def load(self) -> tuple[Progress, dict[str, Any]] | None:
        """Return the progress and the tensors of the checkpoint; None without one.

        Raises:
            DataError: the checkpoint is damaged.
        """
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
    """Return the sha256 of plain data as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return dict(content)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); learn into a new folder") from None
