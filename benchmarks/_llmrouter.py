"""The kNN, SVM, MLP and matrix-factorisation routers of llmrouter-lib, in a virtual environment.

They choose models only, so each model gets the strategy that was correct most often on the training outcomes.
They learn which model is best on each question (performance 1 or 0); among equals they take the first in the
table, here the cheapest. Settings are those of the package's training configurations; embeddings are ours,
since theirs would load Longformer from a hub. They have no budget and one operating point.
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
from _baselines import Results, Split, results_of

from viaticum.routers.query.outcome_matrix import Array

PACKAGE = "llmrouter-lib==0.4.0"
HERE = Path(__file__).parent
WORKER = HERE / "_llmrouter_worker.py"
CONSTRAINTS = HERE.parent / "constraints.txt"


def install(folder: Path, report: Callable[[str], None]) -> Path:
    """Make a virtual environment with the package; return its Python. `RuntimeError` where pip fails."""
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
) -> dict[str, tuple[Results, float]]:
    """Results of each of its routers on the test questions, and its expected cost.

    The expected cost is the mean training cost of the pairs that it chose.
    """
    report("llmrouter-lib: training and routing")
    train, columns = split.train, best_strategies(split)
    folder.mkdir(parents=True)
    names = {str(number): column for number, column in enumerate(columns)}
    with (folder / "routing.jsonl").open("w", encoding="utf-8") as file:
        for row, text in enumerate(train.texts):
            for name, column in names.items():
                row_data = {"query": text, "embedding_id": row, "model_name": f"model-{name}"}
                file.write(json.dumps(row_data | {"performance": float(train.correct[row, column])}) + "\n")
    torch.save(torch.from_numpy(split.x_train), folder / "train.pt")
    torch.save(torch.from_numpy(split.x_test), folder / "test.pt")
    _run([str(python), str(WORKER), str(folder), str(split.seed)])
    routed = json.loads((folder / "routes.json").read_text(encoding="utf-8"))
    results = {}
    for router, chosen in routed.items():
        pairs = np.array([names[name.removeprefix("model-")] for name in chosen])
        results[f"llmrouter-lib {router}"] = (
            results_of(split.test, pairs),
            float(train.cost.mean(0)[pairs].mean()),
        )
    return results


def best_strategies(split: Split) -> Array:
    """For each model the column of its best strategy on the training outcomes, the cheapest first."""
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
