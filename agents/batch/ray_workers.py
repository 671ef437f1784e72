"""Workers on a Ray cluster: chunks of rows flow through Ray Data to actors that hold the models.

Rows are planned when there is capacity for them, and wait in a queue that the read task of a data set
empties. Ray restarts an actor that died and gives its chunk to another one. The job keeps which rows are
done. Leaves out answering (`agents.batch.workers`).
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX", "."
)  # it writes messages to stdout, where a job's events go

import pyarrow as pa
import ray.data
from ray import cloudpickle as cloudpickle
from ray.data.block import BlockMetadata
from ray.util.queue import Queue

from viaticum.agents.batch.steps import RowTools
from viaticum.agents.batch.workers import (
    CHUNKS_AHEAD,
    Cluster,
    Plans,
    Rows,
    Worker,
    WorkerConfig,
    process_remotely,
)

POLL_SECONDS = 0.2  # after which a wait for rows checks whether the job is stopped
Done = SimpleQueue[bytes | Exception]
SHUTDOWN_SECONDS = 10.0  # in which actors may end by themselves


class Source(ray.data.Datasource):
    """Ray data source: the items of a queue, a block each, until a None."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
        return [ray.data.ReadTask(partial(_read, self._queue), BlockMetadata(None, None, None, None))]

    def estimate_inmemory_data_size(self) -> None:
        return None


def _read(queue: Queue) -> Iterator[pa.Table]:
    while (chunk := queue.get()) is not None:
        yield pa.table({"chunk": [chunk]})


class Actor(Worker):
    """Returns the same rows in the same order for the same chunk, because Ray may repeat it."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"chunk": [self.answer(chunk) for chunk in batch["chunk"]]}


def process_rows(
    config: WorkerConfig, cluster: Cluster, planned: Plans, tools: RowTools, meanwhile: Callable[[], None]
) -> Rows:
    """Answer rows on the cluster that this process is connected to; else connect to one, or start one."""
    _connect(cluster)
    queue, done = Queue(actor_options={"num_cpus": 0}), Done()
    reader = threading.Thread(target=_collect, args=(queue, config, cluster, done), daemon=True)
    reader.start()
    receive = partial(done.get, timeout=POLL_SECONDS)
    try:
        yield from process_remotely(planned, tools, meanwhile, config.concurrency, queue.put, receive)
        queue.put(None)
        reader.join(SHUTDOWN_SECONDS)
    finally:
        queue.shutdown(force=True)


def _connect(cluster: Cluster) -> None:
    """Connect to a running cluster, or start one for this process on this machine alone."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if cluster.address or "RAY_ADDRESS" in os.environ or ray.is_initialized():
        ray.init(cluster.address, ignore_reinit_error=True, log_to_driver=False)
    else:
        cpus = max(os.cpu_count() or 1, math.ceil(cluster.cpus * cluster.workers))
        ray.init(num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)


def _collect(queue: Queue, config: WorkerConfig, cluster: Cluster, found: Done) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # byte: every chunk is passed on at once
    size = {"min_size": 1, "max_size": cluster.workers, "max_tasks_in_flight_per_actor": CHUNKS_AHEAD}
    try:
        chunks = ray.data.read_datasource(Source(queue), num_cpus=0, override_num_blocks=1)
        done = chunks.map_batches(
            Actor,
            fn_constructor_args=(config,),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(**size),
            num_cpus=cluster.cpus,
            num_gpus=cluster.gpus,
        )
        for batch in done.iter_batches(batch_size=None, prefetch_batches=0):
            found.put(batch["chunk"][0])
    except Exception as error:
        found.put(error)
