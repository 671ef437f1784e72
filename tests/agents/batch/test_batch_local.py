"""A batch on local models, tiny ones: texts of many rows are written together, by one model or a pair of
them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from viaticum import FakeRouter
from viaticum.agents.batch import run_batch
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue
from viaticum.jobs import read_rows
from viaticum.models.batching import BatchScheduler


def line(name: str, model: str, question: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 12}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body})


def test_rows_of_local_models_are_written_together(
    tmp_path: Path, tiny_catalogue: Catalogue, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = 0
    step = BatchScheduler._step_all

    def counted(scheduler: BatchScheduler) -> None:
        nonlocal together
        together = max(together, sum(len(queue.running) for queue in scheduler._engines.values()))
        step(scheduler)

    monkeypatch.setattr(BatchScheduler, "_step_all", counted)
    rows = [line(f"s{n}", "tiny-small", f"Say {n}.") for n in range(8)]
    rows += [line(f"p{n}", "tiny-pair", f"Say {n}.") for n in range(8)]
    rows.append(line("again", "tiny-small", "Say 3."))
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    ended = run_batch(
        tmp_path / "in.jsonl",
        tmp_path / "out.jsonl",
        budget="0.01",
        catalogue=tiny_catalogue,
        router=FakeRouter("tiny-small+chat"),  # every row names its model; the packaged router wants weights
        ledger=tmp_path / "ledger.db",
        concurrency=4,
        keep_texts=True,
    )
    assert together > 1
    done: dict[str, Any] = {row.id: row for row in read_rows(ended.folder)}
    assert len(done) == 17
    assert {row.state for row in done.values()} <= {"answered", "failed"}, "random models may write nothing"
    assert all(row.calls[0].usage for row in done.values())
    assert done["again"].text == done["s3"].text
    assert done["again"].calls[0].cached
    assert done["again"].cost_nanousd == 0
    pieces = [row.pieces for row in done.values() if row.pieces]
    assert pieces, "the pair wrote some of them in turns"
    assert {name for each in pieces for name, _ in each} == {"tiny-small", "tiny-large"}
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.check() == []
        budget = ledger.budget(ended.job.budget)
        assert (budget.held_nanousd, budget.posted_nanousd) == (
            0,
            sum(row.cost_nanousd for row in done.values()),
        )
