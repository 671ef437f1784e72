"""A job that a process of its own runs, on a Ray cluster that it begins, or here.

    python ray_jobs.py FOLDER BUDGET LEDGER PAUSE ENGINE

Each call that a model ends is a line of FOLDER/calls.txt, with the process that made it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batch_jobs import all_plans_router, models, number_of, says_nothing, says_odd, says_right

from viaticum.models.base import Generation
from viaticum.types import Message

WORKERS = 2


class RecordingScript:
    """A script that writes down every call that it ends, whichever process runs it."""

    def __init__(self, name: str, script: Any, path: Path, pause: float) -> None:
        self.name, self.script, self.path, self.pause = name, script, path, pause

    def __call__(self, messages: Sequence[Message], generation: Generation) -> str:
        text: str = self.script(messages, generation)
        time.sleep(self.pause)
        with self.path.open("a") as file:
            file.write(f"{os.getpid()} {self.name} {number_of(messages)} {generation.seed}\n")
        return text


def main(folder: Path, budget: str, ledger: str, pause: float, engine: Any) -> None:
    from viaticum.agents.batch import run_batch
    from viaticum.agents.batch.workers import Cluster

    scripts = {"cheap": says_odd, "expensive": says_right, "silent": says_nothing}
    told = {
        name: RecordingScript(name, script, folder / "calls.txt", pause) for name, script in scripts.items()
    }
    ended = run_batch(
        folder / "in.jsonl",
        folder / "out.jsonl",
        budget=budget,
        resume=True,
        ledger=ledger,
        engine=engine,
        cluster=Cluster(workers=WORKERS) if engine == "ray" else None,
        models=models(**told),
        router=all_plans_router(),
        concurrency=4,
    )
    sys.stdout.write(json.dumps({"ending": ended.job.ending, **ended.figures}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5])
