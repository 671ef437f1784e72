"""`viaticum doctor`: what works on this machine, what does not, and what to do about each.

Asks no provider, fetches nothing and changes nothing. Results go to stdout. Leaves out whether a provider
takes a key (`viaticum models test`) and the whole history of a ledger (`viaticum budget verify`).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from viaticum.catalogue import Catalogue, user_file
from viaticum.commands.budget import Where
from viaticum.commands.model_entries import CatalogueFile, JsonFlag
from viaticum.commands.terminal import literal
from viaticum.errors import SandboxError, ViaticumError, WeightsError, one_line
from viaticum.weights import cache_dir, locate

State = Literal["ok", "note", "fail"]

# What each extra brings, by a package that only it needs.
EXTRAS = {
    "local": ("torch", "models that run here, and the learned router"),
    "llama": ("xllamacpp", "llama.cpp as an engine"),
    "remote": ("litellm", "models behind APIs"),
    "math": ("math_verify", "formulas in answers"),
    "server": ("uvicorn", "viaticum serve"),
    "reports": ("altair", "viaticum report"),
    "langchain": ("langchain", "ChatViaticum and the middleware"),
    "postgres": ("psycopg", "ledgers in Postgres"),
    "ray": ("ray", "batches on several machines"),
}
RECENT_DAYS = 30  # for which a change of a model is shown
SCARCE, LITTLE = 10**8, 5 * 10**9  # bytes free on a disk: too few for a ledger, too few for weights


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found. advice: what to do, empty where there is nothing."""

    check: str
    state: State
    found: str
    advice: str = ""


def doctor(
    ledger: Where = None,
    as_json: JsonFlag = False,
    catalogue: CatalogueFile = None,
) -> None:
    """Check Python, torch, sandboxes, models, keys, ledger and disk. Exit code 1 if one fails."""
    findings = list(examine(ledger, catalogue))
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in findings], indent=2))
    else:
        _show(findings)
    if any(each.state == "fail" for each in findings):
        raise typer.Exit(1)


def examine(ledger: str | None = None, catalogue: Path | None = None) -> Iterator[Finding]:
    """All findings, in the order in which a user meets what they are about.

    Args:
        ledger: as `Ledger` takes it.
        catalogue: as `Catalogue.load` takes it.
    """
    yield Finding(
        "viaticum",
        "ok",
        f"{version('viaticum')} on Python {platform.python_version()}, {platform.system()} "
        f"{platform.machine()}, {os.cpu_count()} cores",
    )
    yield _extras()
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "torch": _torch,
        "sandboxes": _sandboxes,
        "models": lambda: _models(catalogue),
        "ledger": lambda: _ledger(ledger),
        "changes": lambda: _changes(ledger),
        "disk": lambda: _disk(ledger),
    }
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # whatever is broken here is what was asked for
            yield Finding(name, "fail", one_line(error) or type(error).__name__)


def _extras() -> Finding:
    here = [name for name, (package, _) in EXTRAS.items() if find_spec(package) is not None]
    lacking = [f"{name} ({what})" for name, (_, what) in EXTRAS.items() if name not in here]
    return Finding(
        "extras",
        "note" if lacking else "ok",
        ", ".join(here) or "none",
        f"not installed: {', '.join(lacking)}; install those you need: pip install 'viaticum[NAME]'"
        if lacking
        else "",
    )


def _torch() -> Iterator[Finding]:
    if find_spec("torch") is None:
        yield Finding("torch", "note", "not installed", "for local models: pip install 'viaticum[local]'")
        return
    try:
        from viaticum.decoders.cost import conditions
        from viaticum.decoders.devices import resolve_device, resolve_dtype
        from viaticum.decoders.memory import free_bytes
    except Exception as error:  # a build for another machine, a missing library
        yield Finding(
            "torch", "fail", one_line(error), "install it again: pip install --force-reinstall torch"
        )
        return
    device, facts = resolve_device("auto"), conditions()
    dtype = str(resolve_dtype("auto", device)).removeprefix("torch.")
    found = f"{facts['torch']} on {device}, {dtype}, {free_bytes(device) / 1e9:.1f} GB of memory free"
    if device.type == "cpu":
        found += f", {facts['threads']} threads, {facts['instructions']}"
    unused = device.type == "cpu" and (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists())
    advice = (
        "this torch does not use the NVIDIA GPU that is here: install a CUDA build (constraints-cuda.txt)"
    )
    yield Finding("torch", "note" if unused else "ok", found, advice if unused else "")


def _sandboxes() -> Iterator[Finding]:
    from viaticum.strategies.sandbox import open_sandbox

    problems = {}
    for backend in ("monty", "bwrap"):
        try:
            with open_sandbox(backend, workers=1):
                yield Finding(
                    backend, "ok", "runs programs; `viaticum sandbox check` says what it keeps away"
                )
        except SandboxError as error:
            problems[backend] = one_line(error)
    for backend, problem in problems.items():
        lost = (
            "programs of the strategy pot do not run" if len(problems) > 1 else "programs that need it fail"
        )
        reason, _, advice = problem.partition("; ")
        yield Finding(backend, "fail" if len(problems) > 1 else "note", f"{reason}: {lost}", advice)


def _models(path: Path | None) -> Iterator[Finding]:
    from viaticum.models.usable import UsableModels

    try:
        catalogue = Catalogue.load(path)
    except ViaticumError as error:
        yield Finding(
            "catalogue", "fail", one_line(error), "correct the file; `viaticum models where` names it"
        )
        return
    own, _ = user_file(path)
    yield Finding(
        "catalogue", "ok", f"{len(catalogue)} entries; your own: {own if own.is_file() else 'none'}"
    )
    yield _weights(catalogue)
    usable = UsableModels(catalogue)
    answering = [name for name, spec in catalogue.items() if spec.kind != "encoder"]
    remote = [name for name in answering if catalogue[name].kind == "remote"]
    keys = {name: problem for name in remote if (problem := usable.problem(name)) is not None}
    yield Finding(
        "keys",
        "note" if keys or not remote else "ok",
        f"{len(remote) - len(keys)} of {len(remote)} models behind APIs can be called"
        if remote
        else "no model behind an API is in the catalogue",
        "; ".join(dict.fromkeys(one_line(problem) for problem in keys.values()))
        if remote
        else "add one: viaticum models add PROVIDER/MODEL",
    )
    here = [name for name in answering if name in usable]
    yield Finding(
        "answers",
        "ok" if here else "fail",
        f"{len(here)} of {len(answering)} models can answer{': ' if here else ''}{', '.join(here)}",
        "" if here else "viaticum models pull, or viaticum models add PROVIDER/MODEL",
    )


def _weights(catalogue: Catalogue) -> Finding:
    lacking = []
    specs = catalogue.weights_of()
    for spec in specs:
        try:
            locate(spec)
        except WeightsError:
            lacking.append(spec.name)
    return Finding(
        "weights",
        "note" if lacking else "ok",
        f"{len(specs) - len(lacking)} of {len(specs)} of the default models are in {cache_dir()}",
        f"viaticum models pull fetches {', '.join(lacking)}" if lacking else "",
    )


def _ledger(where: str | None) -> Iterator[Finding]:
    from viaticum.agents.batch.folder import without_password
    from viaticum.budgets import Ledger, default_path

    text = str(where or default_path())
    if text.startswith(("postgresql://", "postgres://", "memory:")):
        label = without_password(text) if "://" in text else text
    else:
        path = Path(text).expanduser()
        if not path.exists():
            folder = _nearest(path)
            can = os.access(folder, os.W_OK) and _is_writable(folder)
            found = f"none yet; the first call makes {path}" if can else f"{folder} cannot be written"
            yield Finding("ledger", "ok" if can else "fail", found, "" if can else _LEDGER_ADVICE)
            return
        if problem := _write_problem(path):
            yield Finding("ledger", "fail", f"{path}: {problem}", _LEDGER_ADVICE)
            return
        label = str(path)
    with Ledger(text, read_only=not text.startswith("memory:")) as ledger:
        budgets, unknown = len(ledger.budgets()), len(ledger.holds(state="unknown"))
    yield Finding(
        "ledger",
        "note" if unknown else "ok",
        f"{label}: {budgets} budgets" + (f", {unknown} calls of unknown cost" if unknown else ""),
        "viaticum budget reconcile settles them" if unknown else "",
    )


def _changes(where: str | None) -> Iterator[Finding]:
    """Models that were found to have changed since a router was fitted, in the last 30 days."""
    from viaticum.agents.workflow.watched_router import current_changes, folder_of

    since = (datetime.now(UTC) - timedelta(days=RECENT_DAYS)).isoformat()
    for change in current_changes(folder_of(where)).values():
        if change.at >= since:
            yield Finding(
                "changes",
                "note",
                f"{change.model} left its profile, noticed {change.at[:10]}: {change.why}",
                "profile it again, then viaticum router fit; nothing to do where that has been done since",
            )


_LEDGER_ADVICE = "give it rights to write, or name another: --ledger, VIATICUM_LEDGER or VIATICUM_HOME"


def _write_problem(path: Path) -> str:
    """Why the file takes no entries; empty where it does. What is written is taken back."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=5)) as file:
            file.execute("BEGIN IMMEDIATE")  # which a file that may only be read grants as well
            file.execute("CREATE TABLE doctor (x)")
            file.execute("ROLLBACK")
    except sqlite3.Error as error:
        return one_line(error)
    return ""


def _disk(where: str | None) -> Iterator[Finding]:
    from viaticum.budgets import default_path

    folders = {"weights": cache_dir()}
    if "://" not in str(where) and where != "memory:":
        folders["ledger"] = Path(where).expanduser() if where else default_path()
    free = {name: shutil.disk_usage(_nearest(folder)).free for name, folder in folders.items()}
    least = min(free.values())
    yield Finding(
        "disk",
        "fail" if least < SCARCE else "note" if free["weights"] < LITTLE else "ok",
        ", ".join(f"{size / 1e9:.1f} GB free for {name}" for name, size in free.items()),
        ""
        if least >= LITTLE
        else f"free some: the default models take up to {LITTLE / 1e9:.0f} GB while they are unpacked; "
        "VIATICUM_CACHE names another folder",
    )


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def _is_writable(folder: Path) -> bool:
    """Whether the file system takes a file there; root may write everywhere else."""
    return not os.statvfs(folder).f_flag & os.ST_RDONLY if hasattr(os, "statvfs") else True


def _show(findings: list[Finding]) -> None:
    console = Console()
    colours = {"ok": "green", "note": "yellow", "fail": "red"}
    table = Table.grid(padding=(0, 2, 0, 0))
    for each in findings:
        state = Text(each.state, colours[each.state])
        table.add_row(state, each.check, Text(literal(each.found), overflow="fold"))
        if each.advice:
            table.add_row("", "", Text(literal(f"-> {each.advice}"), overflow="fold"))
    console.print(table)
