"""Worker of `_router_units.py`: the learned router of another checkout, which PYTHONPATH names.

Reads a task (JSON): the table, ids of training and test questions, budgets, where embeddings are kept and
where results go. Uses only what the router has had since its first commit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from viaticum.outcomes import outcome_rows, parse_outcome
from viaticum.routers.query.encoder import Encoder
from viaticum.routers.query.evaluate import column_outcomes
from viaticum.routers.query.fit import fit
from viaticum.routers.query.outcome_matrix import OutcomeMatrix, read_prices
from viaticum.routers.query.parameters import RTRSettings


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    prices = None if task["prices"] is None else read_prices(task["prices"])
    outcomes = [parse_outcome(row, source) for source, row in outcome_rows(Path(task["outcomes"]))]
    matrix = OutcomeMatrix.from_outcomes(outcomes, prices)
    numbers = {each: number for number, each in enumerate(matrix.ids)}
    train, test = (
        matrix.select(np.array([numbers[tuple(each)] for each in task[name]])) for name in ("train", "test")
    )
    router = fit(train, Encoder(cache=task["embeddings"]), settings=RTRSettings(seed=task["seed"]))
    prediction = router.predict_texts(test.texts)
    correct, cost, _ = column_outcomes(router, test)
    rows, found = np.arange(len(test)), []
    for dollars in task["budgets"]:
        chosen = router.choose_within(prediction, dollars).numpy()
        found.append((correct[rows, chosen], cost[rows, chosen]))
    right, spent = (np.stack(each).astype(np.float64) for each in zip(*found, strict=True))
    np.savez_compressed(task["out"], correct=right, cost=spent)


if __name__ == "__main__":
    main()
