"""llmrouter-lib beside us: its kNN, SVM, MLP and matrix-factorisation routers, from PyPI, in a virtual environment of
their own.

They choose a model and nothing else, so each model comes with the strategy that was right most often on the training
outcomes. They learn which model does best on each question (performance 1 or 0); of equals they take the first in
the table, which here is the cheapest. Their settings are those of the package's own training configurations, their
embeddings are ours (they would load Longformer from a hub). They know no budget and have one operating point.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _baselines import Played, Split, take

from viaticum.routers.query.outcome_matrix import Array

PACKAGE = "llmrouter-lib==0.4.0"
HERE = Path(__file__).parent
WORKER = HERE / "_llmrouter_worker.py"
CONSTRAINTS = HERE.parent / "constraints.txt"


def install(folder: Path, report: Callable[[str], None]) -> Path:
    """A virtual environment with the package and all that it asks for; returns its Python. Raises `RuntimeError`."""
    report(f"installing {PACKAGE} into a virtual environment, minutes")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    _run(
        [
            str(python),
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "-c",
            str(CONSTRAINTS),
            PACKAGE,
        ]
    )
    return python


def routes(
    python: Path, folder: Path, split: Split, report: Callable[[str], None]
) -> dict[str, tuple[Played, float]]:
    """What each of its routers came to on the test questions, and what it was expected to cost: the mean training
    cost of the pairs it chose."""
    report("llmrouter-lib: training and routing")
    train, columns = split.train, best_strategies(split)
    folder.mkdir(parents=True)
    names = {str(number): column for number, column in enumerate(columns)}
    with (folder / "routing.jsonl").open("w", encoding="utf-8") as file:
        for row, text in enumerate(train.texts):
            for name, column in names.items():
                told = {"query": text, "embedding_id": row, "model_name": f"model-{name}"}
                file.write(json.dumps(told | {"performance": float(train.correct[row, column])}) + "\n")
    torch.save(torch.from_numpy(split.x), folder / "train.pt")
    torch.save(torch.from_numpy(split.asked), folder / "test.pt")
    _run([str(python), str(WORKER), str(folder), str(split.seed)])
    told = json.loads((folder / "routes.json").read_text(encoding="utf-8"))
    found = {}
    for router, chosen in told.items():
        pairs = np.array([names[name.removeprefix("model-")] for name in chosen])
        found[f"llmrouter-lib {router}"] = (
            take(split.test, pairs),
            float(train.cost.mean(0)[pairs].mean()),
        )
    return found


def best_strategies(split: Split) -> Array:
    """For each model the column of its best strategy on the training outcomes, cheapest first."""
    accuracy, cost = split.train.correct.mean(0), split.train.cost.mean(0)
    best: dict[str, int] = {}
    for column, pair in enumerate(split.train.pairs):
        if pair.model not in best or accuracy[column] > accuracy[best[pair.model]]:
            best[pair.model] = column
    return np.array(sorted(best.values(), key=lambda column: cost[column]))


def _run(command: list[str]) -> None:
    environment = os.environ | {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True"
    }  # its dependency would ask the network
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.stderr.write(done.stderr[-2000:])
        raise RuntimeError(f"{' '.join(command[:4])} ... ended with {done.returncode}")
