"""Where the rows of a batch are answered: in this process, or by workers on other machines, which are sent chunks of them.

Both take the same `process_rows`. A worker makes its own tools, of what is described here; what these need is installed on
its machine. A chunk may be answered twice, where a worker dies: what was paid for is found by its key in the ledger.
Leaves out how chunks travel (`agents.batch.ray_workers`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from queue import Empty
from time import monotonic
from typing import Literal, get_args

from viaticum.agents.batch.cache import Cache
from viaticum.agents.batch.executor import process_rows
from viaticum.agents.batch.planning import PlannedRow
from viaticum.agents.batch.steps import RowTools
from viaticum.agents.build import open_resources
from viaticum.agents.workflow.settings import WorkflowSettings
from viaticum.budgets import Ledger
from viaticum.errors import InputError, MissingExtra, ProviderUnavailable, UnknownName, ViaticumError
from viaticum.jobs import JobRow

Engine = Literal["local", "ray"]
Rows = Iterator[tuple[PlannedRow, JobRow]]
Plans = Iterable[PlannedRow | None]
Process = Callable[[Plans, RowTools], Rows]
CHUNKS_AHEAD = 2  # chunks a worker: one at hand, and one that waits for it


@dataclass(frozen=True, slots=True)
class Cluster:
    """Workers of a Ray cluster. address: of one that runs ("auto": found here); None begins one on this machine alone.

    workers: at most, each with models of its own; cpus, gpus: that each is given. With gpus=0.5 two share a GPU.
    """

    address: str | None = None
    workers: int = 2
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.workers < 1 or not self.cpus >= 0 or not self.gpus >= 0:
            raise InputError(
                f"a cluster has 1 worker or more, with 0 or more CPUs and GPUs each, got {self.workers}, {self.cpus:g} "
                f"and {self.gpus:g}"
            )


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker makes its tools of. settings: of its workflow; other fields as of `RowTools`."""

    ledger: str
    budget: str
    settings: WorkflowSettings
    concurrency: int
    keep_texts: bool


class Worker:
    """Answers chunks: has models and a ledger of its own, and knows again the calls that it made itself."""

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
        """The rows of a chunk in their order, and the error that ended it, if one did."""
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
    chunk: int,
    send: Callable[[bytes], None],
    receive: Callable[[], bytes | Exception],
) -> Rows:
    """`process_rows` by workers. tools: of all workers together; chunk: rows that are sent at once.

    receive: what a worker gave back, or why no more will come; raises `queue.Empty` now and then while there is none.
    Where the job is to end, rows that were sent may end too, for as long as `drain_seconds`.
    """
    source, more, inside, stopped = iter(planned), True, 0, 0.0
    while inside or (more and not tools.stop.is_set()):
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


def engine_for(engine: str, cluster: Cluster | None, ledger: str) -> Callable[[WorkerConfig], Process]:
    """What answers the rows, once it knows its tools. Raises `InputError` for settings that do not go together,
    `MissingExtra` without Ray."""
    if engine not in get_args(Engine):
        raise UnknownName("engine", engine, get_args(Engine))
    if engine == "local":
        if cluster is not None:
            raise InputError("a cluster is for the engine ray; give that too, or leave the cluster out")
        return lambda config: process_rows
    if not ledger.startswith(("postgresql://", "postgres://")):
        raise InputError(
            f"workers on other machines do not reach the ledger {ledger}; give one in Postgres "
            "(--ledger postgresql://user@host/name)"
        )
    try:
        distributed = import_module("viaticum.agents.batch.ray_workers")
    except ImportError as error:
        raise MissingExtra(error.name or "ray", "ray") from None

    def made(config: WorkerConfig) -> Process:
        try:
            distributed.cloudpickle.dumps(config)
        except Exception as error:
            raise InputError(
                f"a model or a router cannot be sent to other machines ({error}); name models in the catalogue, and "
                "give the folder of a router"
            ) from None
        return partial(distributed.process_rows, config, cluster or Cluster())

    return made


def _error(kind: type[ViaticumError], message: str) -> ViaticumError:
    """As a worker raised it: errors are made of different things, and all of them print a message."""
    error = kind.__new__(kind)
    error.args = (message,)
    return error
