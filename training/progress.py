"""The progress callback that every training run takes."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str, int, int], None]  # stage, done, total


def no_report(stage: str, done: int, total: int) -> None:
    """Ignore progress."""
