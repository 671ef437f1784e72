"""A server that runs batch jobs on Ray or in their own process, each in a fork that starts at once because
everything is imported already.

    python ray_jobs.py

reads one request a line from stdin, and answers each with a line of JSON:

    ["cluster"]                                     starts a Ray cluster; its address
    ["run", FOLDER, BUDGET, LEDGER, PAUSE, ENGINE, ADDRESS]     starts a job; the pid of its fork
    ["poll", PID]                                   the exit code of a job, or null while it runs

ADDRESS is that of a Ray cluster, or null for a job that starts its own. Output and errors of a job are
FOLDER/stdout.txt and FOLDER/stderr.txt. Each call that a model ends is a line of FOLDER/calls.txt, with the
process that made it. The cluster ends with the server.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
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


def run(folder: Path, budget: str, ledger: str, pause: float, engine: Any, address: str | None) -> None:
    from viaticum.agents.batch import run_batch
    from viaticum.agents.batch.workers import Cluster

    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    scripts = {"cheap": says_odd, "expensive": says_right, "silent": says_nothing}
    recorded = {
        name: RecordingScript(name, script, folder / "calls.txt", pause) for name, script in scripts.items()
    }
    ended = run_batch(
        folder / "in.jsonl",
        folder / "out.jsonl",
        budget=budget,
        resume=True,
        ledger=ledger,
        engine=engine,
        cluster=Cluster(address, workers=WORKERS) if engine == "ray" else None,
        models=models(**recorded),
        router=all_plans_router(),
        concurrency=4,
    )
    sys.stdout.write(json.dumps({"ending": ended.job.ending, **ended.figures}) + "\n")


def hold_cluster(ready: int, parent: int) -> None:
    """Start a cluster on this machine, write its address to the pipe `ready`, and stop with `parent`."""
    import ray

    context = ray.init(
        num_cpus=WORKERS,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
    )
    os.write(ready, f"{context.address_info['address']}\n".encode())
    os.close(ready)
    while os.getppid() == parent:
        time.sleep(0.1)
    ray.shutdown()


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a fork; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_cluster() -> str:
    server, (read, write) = os.getpid(), os.pipe()
    forked(lambda: hold_cluster(write, server))
    os.close(write)
    with os.fdopen(read) as pipe:
        return pipe.readline().strip()


def start_job(folder: str, *others: Any) -> int:
    return forked(lambda: run(Path(folder), *others))


def poll(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def serve() -> None:
    import viaticum.agents.batch.ray_workers
    import viaticum.agents.batch.run  # noqa: F401  the forks have it

    actions: dict[str, Callable[..., Any]] = {"cluster": start_cluster, "run": start_job, "poll": poll}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        sys.stdout.write(json.dumps(actions[name](*arguments)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    import ray_jobs  # so that workers, which do not run this file, find the scripts by this name

    ray_jobs.serve()
