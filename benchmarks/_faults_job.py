"""The batch job of benchmarks/faults.py: a stub provider that counts its calls, processes that are killed.

Leaves out the campaign and what is checked (`faults`).
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from viaticum.agents.batch import run_batch
from viaticum.agents.batch.cache import Cache
from viaticum.agents.batch.output import RowJournal
from viaticum.agents.batch.run import BatchEnd
from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue, ModelSpec
from viaticum.jobs import Job
from viaticum.models.remote.connection import RemoteCall
from viaticum.models.remote.request import load_litellm
from viaticum.routers.query import StaticRouter
from viaticum.types import Pair, RoutingTable, Row

load_litellm()  # once, in the process that all others are forked from

CHEAP, DEAR = "cheap", "dear"
BUDGET = "5"
# Moments of a job that a kill may come before or after: at one of so many first occurrences.
POINTS: tuple[tuple[type, str, int], ...] = (
    (Ledger, "reserve_many", 6),
    (Ledger, "reserve", 3),
    (Ledger, "dispatch", 20),
    (Ledger, "abandon", 3),
    (Ledger, "settle_many", 6),
    (Ledger, "settle", 3),
    (Cache, "find", 6),
    (Cache, "put", 6),
    (RemoteCall, "close", 20),
    (RowJournal, "write", 20),
    (RowJournal, "sync", 1),
    (Job, "save", 1),
)


class Provider(ThreadingHTTPServer):
    """Speaks OpenAI's chat API. calls: by model and question, of every request that came.

    pause: seconds before an answer, a third of them before each piece of its stream.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, pause: float) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.pause, self.calls, self.lock = pause, Counter[tuple[str, str]](), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A process that was killed hung up."""


class _Answer(BaseHTTPRequestHandler):
    server: Provider

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        model, question = body["model"], body["messages"][-1]["content"]
        with self.server.lock:
            self.server.calls[model, question] += 1
        words = answer_of(model, question).split(" ")
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for delta in ({"role": "assistant"}, {"content": " ".join(words[:2])}, {"content": " " + words[-1]}):
            time.sleep(self.server.pause / 3)
            self._event([{"index": 0, "delta": delta, "finish_reason": None}])
        self._event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
        usage = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}
        self._event([], usage)
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, choices: list[Any], usage: Any = None) -> None:
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        text = json.dumps({**chunk, "choices": choices, "usage": usage})
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def number_of(question: str) -> int:
    """n of "What is n + 2?", wherever it stands."""
    return int(question.partition("What is ")[2].split()[0])


def answer_of(model: str, question: str) -> str:
    """Of every fifth question the cheap model gives no answer, so that the dear one is asked too."""
    number = number_of(question)
    return "I cannot tell" if model == CHEAP and number % 5 == 0 else f"It is {number + 2}"


@contextmanager
def provider(pause: float) -> Iterator[Provider]:
    with Provider(pause) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def write_questions(folder: Path, rows: int) -> dict[str, int]:
    """Every tenth question is one that was asked before; returns the number in the question by row."""
    numbers = {f"q{row}": row - 9 if row % 10 == 9 else row for row in range(rows)}
    lines = [
        json.dumps({"id": name, "question": f"What is {number} + 2?", "kind": "number"})
        for name, number in numbers.items()
    ]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    return numbers


def run(folder: Path, url: str, concurrency: int) -> BatchEnd:
    """Begin the job of a folder, or go on with it."""
    models = [
        ModelSpec.model_validate(
            {
                "name": name,
                "description": "Counts its calls.",
                "kind": "remote",
                "litellm_model": f"openai/{name}",
                "api_base": url,
                "context_length": 4096,
                "input_price": price,
                "output_price": price,
                "max_retries": 0,
            }
        )
        for name, price in ((CHEAP, 0.1), (DEAR, 1))
    ]
    table = RoutingTable(
        (
            Row(Pair(CHEAP, "direct"), 0.9, 5, 9, 3_000, 5_000),
            Row(Pair(DEAR, "direct"), 0.8, 5, 9, 30_000, 50_000),
        )
    )
    return run_batch(
        folder / "in.jsonl",
        folder / "out.jsonl",
        budget=BUDGET,
        resume=True,
        ledger=folder / "ledger.db",
        catalogue=Catalogue(models),
        router=StaticRouter(table),
        policy="best",
        concurrency=concurrency,
    )


def work(folder: Path, url: str, concurrency: int, point: int | None, seed: int) -> None:
    """Run the job in a process of its own; with a point, die at one of its first occurrences."""
    if point is not None:
        die_at(point, random.Random(seed).randrange(POINTS[point // 2][2]))
    run(folder, url, concurrency)


def die_at(point: int, occurrence: int) -> None:
    """Kill this process before (even) or after (odd) a step of a job."""
    kind, name, _ = POINTS[point // 2]
    passed, lock = [0], threading.Lock()

    def pass_by() -> None:
        with lock:
            passed[0] += 1
            if passed[0] > occurrence:
                os.kill(os.getpid(), signal.SIGKILL)

    method: Callable[..., Any] = getattr(kind, name)

    @functools.wraps(method)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if point % 2 == 0:
            pass_by()
        result = method(*args, **kwargs)
        if point % 2:
            pass_by()
        return result

    setattr(kind, name, counted)


def name_of(point: int) -> str:
    kind, name, _ = POINTS[point // 2]
    return f"{'after' if point % 2 else 'before'} {kind.__name__}.{name}"
