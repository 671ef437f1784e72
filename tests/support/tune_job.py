"""Buys outcomes as `viaticum tune` does, in a process of its own that a test can kill: no encoder is loaded.

The folder has catalogue.toml and questions.csv, and after this the ledger and the run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from synthetic_outcomes import Words

from viaticum.agents.batch.tune import Tuning
from viaticum.agents.batch.tune_rounds import Bought, buy
from viaticum.questions import read_questions
from viaticum.signals import SignalHandler


def opened(folder: Path, **changed: Any) -> Tuning:
    """The run of a folder; calls are tried once."""
    settings: dict[str, Any] = {
        "budget": "1",
        "models": ["cheap", "dear"],
        "strategies": ["direct"],
        "catalogue": folder / "catalogue.toml",
        "ledger": folder / "ledger.db",
        "tries": 1,
    }
    settings |= changed
    questions = settings.pop("questions", None) or folder / "questions.csv"
    return Tuning.open(read_questions(questions), folder / "my-router", **settings)


def bought(job: Tuning) -> Bought:
    texts = [each.query.text for each in job.questions[: job.learning]]
    return buy(job, job.forecast(), Words()(texts).numpy())


def work(folder: Path) -> None:
    """Buy until a signal comes; ends the process with 0, or with 3 after a signal."""
    run = opened(folder, concurrency=4)
    with SignalHandler(lambda number: run.stop.set()):
        ended = bought(run)
    sys.exit(3 if ended.stopped else 0)
