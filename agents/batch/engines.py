"""Engines of a batch: the local one answers rows in this process, Ray on other workers.

Leaves out answering rows (`agents.batch.executor`) and the workers (`agents.batch.workers`,
`agents.batch.ray_workers`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Literal, get_args

from viaticum.agents.batch.executor import process_rows
from viaticum.agents.batch.steps import RowTools
from viaticum.agents.batch.workers import Cluster, Plans, Rows, WorkerConfig
from viaticum.errors import InputError, MissingExtra, UnknownName

Engine = Literal["local", "ray"]
Process = Callable[[Plans, RowTools, Callable[[], None]], Rows]


def engine_for(engine: str, cluster: Cluster | None, ledger: str) -> Callable[[WorkerConfig], Process]:
    """Return the engine: a function from the workers' configuration to one that answers rows.

    Args:
        engine: "local" or "ray".
        cluster: of Ray; None for the defaults of `Cluster`.
        ledger: path or address; Ray needs one in Postgres, which its workers can reach.

    Raises:
        InputError: the settings do not go together, or, once configured, a model cannot be sent to a worker.
        MissingExtra: Ray is not installed.
    """
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
    return _ray_engine(cluster or Cluster())


def _ray_engine(cluster: Cluster) -> Callable[[WorkerConfig], Process]:
    try:
        distributed = import_module("viaticum.agents.batch.ray_workers")
    except ImportError as error:
        raise MissingExtra(error.name or "ray", "ray") from None

    def configure(config: WorkerConfig) -> Process:
        try:
            distributed.cloudpickle.dumps(config)
        except Exception as error:
            raise InputError(
                f"a model or a router cannot be sent to other machines ({error}); "
                f"name models in the catalogue, and "
                "give the folder of a router"
            ) from None
        return partial(distributed.process_rows, config, cluster)

    return configure
