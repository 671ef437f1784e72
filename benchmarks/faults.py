"""Jobs that are killed while they pay, and clients of the server that vanish: is a call free, or paid twice?

    python benchmarks/faults.py                 # 500 rows, 50 kills at random and one at each numbered point
    python benchmarks/faults.py --rows 100 --kills 10 --part batch

A stub provider on a loopback port counts the requests that reach it, by model and question. Each kill is a
SIGKILL of the whole process of the job, which then goes on as `--resume` does. In the end every request has
to be posted in the ledger or held there as unknown: a request beyond those was free, a post beyond the
requests was charged twice. A call that was dispatched and killed before its request left is unknown too;
those are told apart. The server's part is in benchmarks/_faults_server.py, that of providers' batches in
benchmarks/_faults_provider.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _faults_job import POINTS, Provider, name_of, provider, work, write_questions

from viaticum.agents.batch import job_folder
from viaticum.budgets import Ledger
from viaticum.jobs import Job, read_rows

MOST_TRIES = 400  # of kills that come while the job works


@dataclass(frozen=True)
class Found:
    """What a job left. unsent: unknown calls whose request never came; free, double: what must be 0."""

    kills: int
    requests: int
    posted: int
    unknown: int
    unsent: int
    free: int
    double: int
    rows: int
    missing_rows: int
    findings: int

    @property
    def is_right(self) -> bool:
        return not (self.free or self.double or self.missing_rows or self.findings)


class Campaign:
    """One job in a folder, in processes that are forked from one that has loaded everything."""

    def __init__(self, folder: Path, server: Provider, rows: int, concurrency: int) -> None:
        self.folder, self.server, self.concurrency = folder, server, concurrency
        self.numbers = write_questions(folder, rows)
        self.kills = 0

    def start(self, point: int | None = None, seed: int = 0) -> Any:
        arguments = (self.folder, self.server.url, self.concurrency, point, seed)
        process = multiprocessing.get_context("forkserver").Process(target=work, args=arguments)
        process.start()
        return process

    def kill_at_random(self, rng: random.Random, longest: float) -> bool:
        """Kill the job within `longest` seconds of its first request; False where it ended before."""
        before, process = self.server.calls.total(), self.start()
        while self.server.calls.total() == before and process.is_alive():
            time.sleep(0.002)
        time.sleep(rng.random() * longest)
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        self.kills += process.exitcode == -signal.SIGKILL
        return bool(process.exitcode == -signal.SIGKILL)

    def kill_at(self, point: int, seed: int) -> bool:
        process = self.start(point, seed)
        process.join()
        self.kills += process.exitcode == -signal.SIGKILL
        return bool(process.exitcode == -signal.SIGKILL)

    def end(self) -> Found:
        process = self.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"the job ended with {process.exitcode}")
        return self.found()

    def found(self) -> Found:
        """Compare the ledger with the provider's own count, call by call."""
        folder = job_folder(self.folder / "out.jsonl")
        scope = Job.load(folder).budget
        with Ledger(self.folder / "ledger.db") as ledger:
            findings = len(ledger.check())
            paid = {entry.key for entry in ledger.entries(scope) if entry.kind == "post" and entry.nanousd}
            holds = ledger.holds(scope)
        posted = Counter(self.call_of(each) for each in holds if each.key in paid)
        unknown = Counter(self.call_of(each) for each in holds if each.state in ("unknown", "dispatched"))
        made = Counter(
            {
                (model, int(text.partition("What is ")[2].split()[0])): count
                for (model, text), count in self.server.calls.items()
            }
        )
        charged = posted + unknown
        done = [row.number for row in read_rows(folder)]
        return Found(
            self.kills,
            made.total(),
            posted.total(),
            unknown.total(),
            unsent=(charged - made).total(),
            free=(made - charged).total(),
            double=(posted - made).total() + len(done) - len(set(done)),
            rows=len(done),
            missing_rows=len(set(range(len(self.numbers))) - set(done)),
            findings=findings,
        )

    def call_of(self, hold: Any) -> tuple[str, int]:
        """The model, and the number in the question, that a hold is for."""
        return hold.tags["model"], self.numbers[hold.key.split("/")[1]]


def random_kills(folder: Path, args: argparse.Namespace) -> Found:
    rng = random.Random(args.seed)
    with provider(args.pause) as server:
        job = Campaign(folder, server, args.rows, args.concurrency)
        # The job has to last for all of its kills.
        longest = 1.5 * args.rows * args.pause / args.concurrency / max(1, args.kills)
        for _ in range(MOST_TRIES):
            if job.kills >= args.kills or not job.kill_at_random(rng, longest):
                break
        return job.end()


def kills_at_points(folder: Path, args: argparse.Namespace) -> tuple[Found, list[str]]:
    """One kill at each point, and the points that the job did not pass."""
    missed: list[str] = []
    with provider(args.pause) as server:
        job = Campaign(folder, server, args.rows, args.concurrency)
        for point in range(2 * len(POINTS)):
            if not job.kill_at(point, args.seed + point):
                missed.append(name_of(point))
        return job.end(), missed


def show(name: str, found: Found, missed: Iterable[str] = ()) -> None:
    print(
        f"{name}: {found.kills} kills; {found.requests} requests reached the provider = "
        f"{found.posted} posted + {found.unknown} unknown - {found.unsent} never sent; free {found.free}, "
        f"double {found.double}; {found.rows} rows, {found.missing_rows} missing; "
        f"findings of the ledger {found.findings}"
    )
    for each in missed:
        print(f"  not passed any more: {each}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.15, help="seconds of an answer of the stub")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", choices=("batch", "server", "provider", "all"), default="all")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    right, figures = True, dict[str, Any]()
    if args.part in ("batch", "all"):
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)
        multiprocessing.get_context("forkserver").set_forkserver_preload(["_faults_job"])
        with tempfile.TemporaryDirectory() as folder:
            found = random_kills(Path(folder), args)
        show("random moments", found)
        with tempfile.TemporaryDirectory() as folder:
            at_points, missed = kills_at_points(Path(folder), args)
        show("numbered points", at_points, missed)
        right = found.is_right and at_points.is_right
        figures |= {"random": asdict(found), "points": asdict(at_points), "points_not_passed": missed}
    if args.part in ("provider", "all"):
        import _faults_provider

        for form in ("openai", "anthropic"):
            form_right, form_figures = _faults_provider.run(1_000, 10, args.seed, form)
            right, figures = right and form_right, figures | {f"provider_{form}": form_figures}
    if args.part in ("server", "all") and importlib.util.find_spec("_faults_server") is not None:
        import _faults_server

        server_right, server_figures = _faults_server.run(args.seed)
        right, figures = right and server_right, figures | {"server": server_figures}
    if args.json:
        print(json.dumps(figures))
    sys.exit(not right)


if __name__ == "__main__":
    main()
