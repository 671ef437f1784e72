"""`viaticum batch`: many questions under one budget and deadline, resumable.

    from viaticum.agents.batch import run_batch

The names below load on first use, so that importing one module of this package does not load all of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from viaticum.agents.batch.folder import job_folder
    from viaticum.agents.batch.preview import preview_batch
    from viaticum.agents.batch.run import run_batch

_HOME = {
    "job_folder": "viaticum.agents.batch.folder",
    "preview_batch": "viaticum.agents.batch.preview",
    "run_batch": "viaticum.agents.batch.run",
}

__all__ = ["job_folder", "preview_batch", "run_batch"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
