"""Workers that answer chunks of rows elsewhere, and the job's side of the exchange.

A worker opens its own models and ledger from a `WorkerConfig`; what these need is installed on its machine. A
chunk may be answered twice, where a worker dies: calls that were paid for are found by their keys in the
ledger. Leaves out how chunks travel (`agents.batch.ray_workers`) and which engine a job takes
(`agents.batch.engines`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from queue import Empty
from time import monotonic

from viaticum.agents.batch.cache import Cache
from viaticum.agents.batch.executor import process_rows
from viaticum.agents.batch.planned_rows import PlannedRow
from viaticum.agents.batch.steps import RowTools
from viaticum.agents.build import open_resources
from viaticum.agents.workflow.settings import WorkflowSettings
from viaticum.budgets import Ledger
from viaticum.errors import InputError, ProviderUnavailable, ViaticumError
from viaticum.jobs import JobRow

Rows = Iterator[tuple[PlannedRow, JobRow]]
Plans = Iterable[PlannedRow | None]
CHUNKS_AHEAD = 2  # chunks of each worker: one that it answers and one that waits


@dataclass(frozen=True, slots=True)
class Cluster:
    """Workers of a Ray cluster.

    Args:
        address: of a running cluster, or "auto" to find one; None starts one on this machine alone.
        workers: how many at most, each with its own models.
        cpus: CPUs reserved for each worker.
        gpus: GPUs reserved for each worker; with 0.5, two workers share one.

    Raises:
        InputError: a number is out of range.
    """

    address: str | None = None
    workers: int = 2
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.workers < 1 or not self.cpus >= 0 or not self.gpus >= 0:
            raise InputError(
                f"a cluster has 1 worker or more, with 0 or more CPUs and GPUs each, got "
                f"{self.workers}, {self.cpus:g} "
                f"and {self.gpus:g}"
            )


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker opens its resources from. settings: of its workflow; other fields as in `RowTools`."""

    ledger: str
    budget: str
    settings: WorkflowSettings
    concurrency: int
    keep_texts: bool


class Worker:
    """Answers chunks of rows, with models and a ledger of its own and a cache of its own calls."""

    def __init__(self, config: WorkerConfig) -> None:
        tools = open_resources(config.settings, Ledger(config.ledger))
        self._rows = RowTools(
            tools,
            config.budget,
            cache=Cache(":memory:", tools.catalogue),
            concurrency=config.concurrency,
            keep_texts=config.keep_texts,
        )

    def answer(self, chunk: bytes) -> bytes:
        """Answer a pickled list of `PlannedRow`s; returns pickled (rows in order, error or None)."""
        done: list[tuple[PlannedRow, JobRow]] = []
        failed = None
        try:
            done.extend(process_rows(pickle.loads(chunk), self._rows))
        except ViaticumError as error:
            failed = type(error), str(error)
        done.sort(key=lambda each: each[0].row.number)
        return pickle.dumps((done, failed))


def process_remotely(
    planned: Plans,
    tools: RowTools,
    meanwhile: Callable[[], None],
    chunk: int,
    send: Callable[[bytes], None],
    receive: Callable[[], bytes | Exception],
) -> Rows:
    """Answer rows as `process_rows` does, by workers.

    When the job is stopped, rows that were sent may end within `drain_seconds`.

    Args:
        planned: as of `process_rows`.
        tools: of all workers together.
        meanwhile: as of `process_rows`; as often as `receive` returns or raises.
        chunk: rows that are sent together.
        send: gives a chunk to a worker.
        receive: the answer of a worker, or the error that ended all of them; raises `queue.Empty` now and
            then while there is none.

    Raises:
        ProviderUnavailable: the workers ended.
        ViaticumError: an error that concerns all rows, as a worker raised it.
    """
    source, more, inside, stopped = iter(planned), True, 0, 0.0
    while inside or (more and not tools.stop.is_set()):
        meanwhile()
        while more and not tools.stop.is_set() and (room := CHUNKS_AHEAD * tools.concurrency - inside) > 0:
            block = list(islice(source, min(chunk, room)))
            more, rows = bool(block), [each for each in block if each is not None]
            if rows:
                send(pickle.dumps(rows))
                inside += len(rows)
            if None in block and inside:
                break
        if not inside:
            continue
        try:
            found = receive()
        except Empty:
            stopped = stopped or (monotonic() if tools.stop.is_set() else 0.0)
            if stopped and monotonic() - stopped > tools.drain_seconds:
                return
            continue
        if isinstance(found, Exception):
            raise ProviderUnavailable(f"the workers cannot go on: {found}") from found
        done, failed = pickle.loads(found)
        inside -= len(done)
        yield from done
        if failed is not None:
            raise _error(*failed)


def _error(kind: type[ViaticumError], message: str) -> ViaticumError:
    """The error of a worker. Made without its constructor, whose arguments differ by class."""
    error = kind.__new__(kind)
    error.args = (message,)
    return error
