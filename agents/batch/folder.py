"""Prepares the folder of a job: its lock, the fingerprint of its inputs, start and resume.

Leaves out running the job (`agents.batch.run`) and what the folder holds (`viaticum.jobs`).
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

from viaticum.agents.batch.input import BatchRow, Input
from viaticum.agents.batch.planned_rows import NO_FALLBACK, PlannedRow
from viaticum.agents.batch.resume import differences
from viaticum.agents.workflow.resources import WorkflowResources
from viaticum.agents.workflow.settings import Dollars
from viaticum.budgets.records import digest
from viaticum.errors import InputError, reason
from viaticum.files import check_is_no_input, private_folder, run_lock
from viaticum.jobs import CACHE, JOB, PROVIDER_BATCHES, ROWS, Job
from viaticum.money import budget_nanousd
from viaticum.routers.query import QueryRouter, StaticRouter
from viaticum.routers.query.covering import CoveringRouter
from viaticum.routers.query.restricted import RestrictedRouter
from viaticum.shadow_samples import SHADOWS
from viaticum.types import Row

LOCK = ".lock"
OWN = (JOB, ROWS, CACHE, SHADOWS, PROVIDER_BATCHES)  # and what SQLite and atomic writes put beside them


def job_folder(out: str | Path) -> Path:
    """The folder of the job that writes these results."""
    return Path(f"{out}.job")


def no_job(out: str | Path) -> InputError:
    """Of a job that is to go on and is not there."""
    return InputError(
        f"no job to go on with: there is no {job_folder(out) / JOB}; name the results of one, or begin: "
        "viaticum batch QUESTIONS --budget USD --out RESULTS"
    )


def prepare_folder(out: Path, source: Path, *, resume: bool, force: bool) -> Path:
    """The job's folder, made where it is missing. Raises `InputError` where results or a job are in the way.

    The results never take the place of their questions, `source`.

    With force what it holds stays until the new job may begin (`clear_folder`). A folder that no job made is
    in the way, whatever is asked.
    """
    folder = job_folder(out)
    if resume and force:
        raise InputError("resume goes on and force starts over; give one of them")
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {out.parent}; make it first")
    check_is_no_input(out, [source])
    if out.exists() and not out.is_file():  # a folder, /dev/stdout
        raise InputError(f"cannot write {out}: it is no regular file; give another --out")
    if not resume and not force:
        for path in (out, folder / JOB):
            if path.exists():
                raise InputError(
                    f"{path} exists; go on with it (--resume), start over (--force), or give another --out"
                )
    if resume and out.exists() and not (folder / JOB).exists():
        raise InputError(f"{out} exists and no job made it; start over (--force), or give another --out")
    if folder.is_dir() and not (folder / JOB).exists() and (others := _foreign_files(folder)):
        raise InputError(
            f"{folder} holds {others[0].name}, which no job made; move it away, or give another --out"
        )
    try:
        private_folder(folder)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror or error}") from None
    for path in (folder, out.parent):
        if not os.access(path, os.W_OK):
            raise InputError(f"cannot write in {path}: it is read-only; give another --out")
    return folder


def clear_folder(folder: Path) -> None:
    """Remove the files of a former job, except the lock; others stay.

    Raises `InputError` where the system refuses.
    """
    try:
        foreign = set(_foreign_files(folder))
        for path in folder.iterdir():
            if path.name != LOCK and path not in foreign:
                path.unlink()
    except OSError as error:
        raise InputError(f"cannot start over in {folder}: {reason(error)}") from None


def _foreign_files(folder: Path) -> list[Path]:
    """What lies in a folder and is none of a job's files."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.name != LOCK and not path.name.removeprefix(".").startswith(OWN)
    )


def acquire_job_lock(folder: Path) -> AbstractContextManager[None]:
    """Lock of a job, for one process at a time.

    Entering it raises `InputError` where another process holds it.
    """
    return run_lock(
        folder / LOCK, busy=f"another process works on the job in {folder}; wait for it, or end it"
    )


def resolve_limit(budget: Dollars | None, before: Job | None) -> int:
    if budget is not None:
        return budget_nanousd(budget)
    if before is None or before.limit_nanousd is None:
        raise InputError("a new job needs a budget: give the dollars that it may cost at most (--budget 20)")
    return before.limit_nanousd


def fingerprint(
    given: Input,
    tools: WorkflowResources,
    router: QueryRouter | str | Path | None,
    policy: str,
    catalogue: str,
) -> dict[str, str]:
    """Hashes, by name, that a run which goes on must share with the job's first run.

    catalogue: of the entries that the job uses (`agents.batch.entries`).
    """
    rows = f"skip {given.skip}, limit {given.limit}"
    inner = tools.router.router if isinstance(tools.router, RestrictedRouter) else tools.router
    hashes = {
        "input": given.digest(),
        "rows": rows,
        "catalogue": catalogue,
        "router": _router_digest(inner, router),
        "policy": policy,
    }
    if tools.settings.given:  # left out where none are given, as in the jobs of earlier versions
        hashes["generation"] = digest(tools.settings.model_dump(mode="json"))
    if isinstance(tools.router, RestrictedRouter):
        hashes["pairs"] = f"{tools.router.model or 'any'}+{tools.router.strategy or 'any'}"
    return hashes


def _router_digest(router: QueryRouter, given: QueryRouter | str | Path | None) -> str:
    if isinstance(given, str | Path):
        files = sorted(path for path in Path(given).iterdir() if path.is_file())
        return digest({path.name: Input(path, "jsonl").digest() for path in files})
    if isinstance(router, CoveringRouter):  # prices and benchmarks are part of the catalogue
        names = [model.name for model in router.models]
        return digest([_router_digest(router.router, None), names, [*router.strategies]])
    table = router.rows if isinstance(router, StaticRouter) else getattr(router, "_table", ())
    return digest([type(router).__name__, [_row_text(row) for row in table]])


def _row_text(row: Row) -> str:
    """A row as text, without optional fields that are not set, as earlier versions wrote it."""
    values = ((each.name, getattr(row, each.name)) for each in fields(row))
    return f"Row({', '.join(f'{name}={value!r}' for name, value in values if value not in (None, ''))})"


def check_fingerprint(before: Job, now: Job, folder: Path) -> None:
    """Raises `InputError`, in words, where a job that goes on is not the one that began."""
    if found := differences(before, now):
        raise InputError(
            f"the job in {folder} began otherwise: {'; '.join(found)}. Leave the options out to go on as it "
            "began, or start over with --force"
        )


def without_plan(row: BatchRow) -> PlannedRow:
    return PlannedRow(row, None, NO_FALLBACK)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def version() -> str:
    from viaticum import __version__

    return __version__


def without_password(address: str) -> str:
    if "://" not in address:
        return str(Path(address).absolute())
    kind, _, rest = address.partition("://")
    before, _, query = rest.partition("?")  # libpq takes a password among the parameters as well
    if "@" in query and "@" not in before:  # or the question mark is one of a password
        return f"{kind}://..."
    who, at, where = before.rpartition("@")
    return f"{kind}://{who.partition(':')[0]}{at}{where}"
