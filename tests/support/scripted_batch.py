"""A batch job of scripted models in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from batch_jobs import (
    models,
    two_plans_router,
)

from viaticum.agents.batch import run_batch
from viaticum.agents.batch.run import BatchEnd
from viaticum.budgets import Ledger
from viaticum.jobs import JobRow, read_rows


def run(folder: Path, **settings: Any) -> BatchEnd:
    """The job of FOLDER/in.jsonl; on two ways and ten cents where nothing else is said."""
    source = settings.pop("source", folder / "in.jsonl")
    out = settings.pop("out", folder / "out.jsonl")
    wanted: dict[str, Any] = {
        "budget": "0.1",
        "models": models(),
        "router": two_plans_router(),
        "ledger": folder / "ledger.db",
        "concurrency": 4,
    }
    return run_batch(source, out, **{**wanted, **settings})


def rows_of(ended: BatchEnd) -> list[JobRow]:
    """In the order of the input, the ledger found in order, the results found complete."""
    rows = sorted(read_rows(ended.folder), key=lambda row: row.number)
    with Ledger(ended.job.ledger) as ledger:
        assert ledger.check() == []
        budget = ledger.budget(ended.job.budget)
        posted = {
            entry.key: entry.nanousd for entry in ledger.entries(ended.job.budget) if entry.kind == "post"
        }
    assert budget.held_nanousd == 0
    assert budget.posted_nanousd <= (budget.limit_nanousd or 0)
    assert sum(row.cost_nanousd for row in rows) == budget.posted_nanousd
    for row in rows:
        for call in row.calls:
            if not call.cached:
                assert posted[call.key] == call.cost_nanousd
    return rows
