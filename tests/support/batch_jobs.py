"""Shared by the tests of batches: scripted models, routers over them, and a server that runs jobs to be
killed.

    python batch_jobs.py

reads one job a line from stdin, as a JSON list of the arguments of `main`, and runs each in a fork of its
own, which starts at once because everything is imported already. It prints the fork's pid, then what the job
prints, then the fork's exit code.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from viaticum.agents.batch import job_folder
from viaticum.budgets import Entry, Ledger
from viaticum.catalogue import ModelSpec
from viaticum.jobs import CACHE, JOB, ROWS, Job, JobRow, read_rows
from viaticum.models.base import Generation
from viaticum.models.scripted import ScriptedModel
from viaticum.routers.query import Plan, PlanRow, QueryRouter
from viaticum.types import Message, Pair, Query, RoutingTable, Row

JUDGE = Pair("judge", "verify")
CHEAP, EXPENSIVE, SILENT = Pair("cheap", "cot"), Pair("expensive", "cot"), Pair("silent", "cot")
CHECKED = Plan((CHEAP, JUDGE, EXPENSIVE), 1)
OLD_JOB, OLD_ROWS = Path(__file__).resolve().parents[1] / "data" / "batch_job_v1", 20


def spec(name: str, price: float, context: int = 8192) -> ModelSpec:
    return ModelSpec(
        name=name,
        description=f"says what {name} says",
        kind="scripted",
        context_length=context,
        input_price=price,
        output_price=price,
    )  # type: ignore[arg-type]


def number_of(messages: Sequence[Message]) -> int:
    """n of "What is n + 2?"."""
    return int(re.findall(r"What is (\d+) \+ 2", messages[-1]["content"])[-1])


def says_right(messages: Sequence[Message], generation: Generation) -> str:
    return f"The answer is {number_of(messages) + 2}."


def says_odd(messages: Sequence[Message], generation: Generation) -> str:
    """Right for odd numbers."""
    number = number_of(messages)
    return f"The answer is {number + 2 if number % 2 else 0}."


def says_whether_right(messages: Sequence[Message], generation: Generation) -> str:
    """A verdict on an answer."""
    answer = re.findall(r'Answer: "(\d+)"', messages[-1]["content"])[-1]
    return (
        f"It is {number_of(messages) + 2}.\n{'RIGHT' if int(answer) == number_of(messages) + 2 else 'WRONG'}"
    )


def says_nothing(messages: Sequence[Message], generation: Generation) -> str:
    return "Who knows"


def models(**changed: Any) -> dict[str, ScriptedModel]:
    return {
        "cheap": ScriptedModel(changed.get("cheap", says_odd), spec=spec("cheap", 0.1)),
        "expensive": ScriptedModel(changed.get("expensive", says_right), spec=spec("expensive", 1.0)),
        "silent": ScriptedModel(changed.get("silent", says_nothing), spec=spec("silent", 0.05)),
        **({"judge": ScriptedModel(changed["judge"], spec=spec("judge", 0.1))} if "judge" in changed else {}),
    }


class FixedPlansRouter(QueryRouter):
    """Offers the same plans for every question, with their (accuracy, median cost); p90 is a tenth above
    that.
    """

    def __init__(self, plans: dict[Plan | Pair, tuple[float, int]]) -> None:
        self.plans = {
            each if isinstance(each, Plan) else Plan((each,)): estimate for each, estimate in plans.items()
        }
        self._table = RoutingTable(
            tuple(
                Row(plan.pairs[0], accuracy, 4, 5, cost, cost * 11 // 10)
                for plan, (accuracy, cost) in self.plans.items()
                if len(plan.pairs) == 1
            )
        )

    def table(self, query: Query) -> RoutingTable:
        return self._table

    def plans_for(self, query: Query) -> list[PlanRow]:
        return [
            PlanRow(plan, accuracy, cost, cost * 11 // 10) for plan, (accuracy, cost) in self.plans.items()
        ]


def two_plans_router() -> FixedPlansRouter:
    return FixedPlansRouter({CHEAP: (0.5, 39_000), EXPENSIVE: (0.9, 390_000)})


def all_plans_router() -> FixedPlansRouter:
    """A plan of two pairs among them, and a pair that never answers, which looks best at its price."""
    return FixedPlansRouter(
        {
            CHEAP: (0.5, 39_000),
            EXPENSIVE: (0.8, 390_000),
            SILENT: (0.4, 20_000),
            Plan((CHEAP, SILENT, EXPENSIVE), 2): (0.95, 450_000),
        }
    )


def check_router() -> FixedPlansRouter:
    """Ask the cheap pair, check, ask the expensive one."""
    return FixedPlansRouter({CHECKED: (0.95, 300_000), CHEAP: (0.5, 39_000), EXPENSIVE: (0.8, 390_000)})


def write_questions(path: Path, count: int, *, first: int = 0, gold: bool = True) -> Path:
    rows: Iterable[dict[str, Any]] = (
        {"id": f"q{number}", "question": f"What is {number} + 2?", "kind": "number"}
        | ({"answer": str(number + 2)} if gold else {})
        for number in range(first, first + count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def old_job(folder: Path) -> Path:
    """A killed job of the first version, put into a folder; its job folder.

    `tests/data/batch_job_v1` holds it, its ledger and cache as SQL dumps, and the calls that its scripted
    models ended, one a line: model, row, seed. Paths inside read @FOLDER@.
    """
    inside = job_folder(folder / "out.jsonl")
    inside.mkdir()
    for dump, path in (("ledger.sql", folder / "ledger.db"), ("cache.sql", inside / CACHE)):
        with closing(sqlite3.connect(path)) as database:
            database.executescript((OLD_JOB / dump).read_text(encoding="utf-8"))
    for name, to in (("in.jsonl", folder), ("calls.txt", folder), (JOB, inside), (ROWS, inside)):
        text = (OLD_JOB / name).read_text(encoding="utf-8")
        (to / name).write_text(text.replace("@FOLDER@", str(folder)), encoding="utf-8", newline="")
    return inside


class RecordingScript:
    """Wraps a script and writes down every call that it ends, so that a kill does not lose it."""

    def __init__(self, name: str, script: Any, file: int, pause: float) -> None:
        self.name, self.script, self.file, self.pause = name, script, file, pause

    def __call__(self, messages: Sequence[Message], generation: Generation) -> str:
        text: str = self.script(messages, generation)
        time.sleep(self.pause)
        os.write(self.file, f"{self.name} {number_of(messages)} {generation.seed}\n".encode())
        return text


def check_ledger(folder: Path, ledger: str, count: int) -> tuple[list[JobRow], list[Entry]]:
    """Check that each of `count` rows is done once and each call charged once; return rows and posts."""
    job = Job.load(job_folder(folder / "out.jsonl"))
    rows = list(read_rows(job_folder(folder / "out.jsonl")))
    assert sorted(row.number for row in rows) == list(range(count)), "a row was lost or written twice"
    with Ledger(ledger) as opened:
        assert opened.check() == []
        budget = opened.budget(job.budget)
        posts = [entry for entry in opened.entries(job.budget) if entry.kind == "post"]
        holds = {hold.key: hold for hold in opened.holds(job.budget)}
    assert budget.held_nanousd == 0
    assert budget.posted_nanousd <= (budget.limit_nanousd or 0)
    assert Counter(entry.key for entry in posts).most_common(1)[0][1] == 1, "charged twice"
    calls = Counter((str(entry.key).split("/")[1], holds[str(entry.key)].parameters) for entry in posts)
    assert calls.most_common(1)[0][1] == 1, "a call was paid for twice"  # of a row, the same call
    assert sum(row.cost_nanousd for row in rows) == budget.posted_nanousd, "every charge is some row's"
    assert {call.key for row in rows for call in row.calls} == {entry.key for entry in posts}
    return rows, posts


def main(folder: Path, budget: str, ledger: str, pause: float, plan: str = "votes") -> None:
    """Run, or go on with, the job of FOLDER/in.jsonl; each call that a model ends is a line of
    FOLDER/calls.txt. plan: votes or check.
    """
    from viaticum.agents.batch import run_batch

    file = os.open(folder / "calls.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    scripts = {"cheap": says_odd, "expensive": says_right, "silent": says_nothing}
    if plan == "check":
        scripts["judge"] = says_whether_right
    recorded = {name: RecordingScript(name, script, file, pause) for name, script in scripts.items()}
    stop = threading.Event()
    ended = run_batch(
        folder / "in.jsonl",
        folder / "out.jsonl",
        budget=budget,
        resume=True,
        ledger=ledger,
        models=models(**recorded),
        router=check_router() if plan == "check" else all_plans_router(),
        concurrency=8,
        stop=stop,
    )
    sys.stdout.write(json.dumps({"ending": ended.job.ending, **ended.figures}) + "\n")


def serve() -> None:
    """Run one job a line of stdin, each in a fork."""
    import viaticum.agents.batch.run  # noqa: F401  the forks have it

    for line in sys.stdin:
        folder, *others = json.loads(line)
        child = os.fork()
        if not child:
            code = 1
            try:
                sys.stdout.write(f"{os.getpid()}\n")
                sys.stdout.flush()
                main(Path(folder), *others)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
