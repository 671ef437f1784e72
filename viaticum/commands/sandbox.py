"""`viaticum sandbox`: run one program in a sandbox, and check which sandboxes work on this machine.

Results go to stdout. Leaves out errors and exit codes: `viaticum.cli` turns a `ViaticumError` into one line
and exit code 1.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from viaticum.errors import InputError, SandboxError, reason

app = typer.Typer(no_args_is_help=True, help="Run programs in a sandbox; check which sandboxes work here.")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="A Python program; - reads from stdin.")],
    backend: Annotated[str, typer.Option(help="auto, monty, bwrap, or subprocess (no sandbox).")] = "auto",
    seconds: Annotated[float, typer.Option(help="Time limit.", min=0.01, max=3600.0)] = 2.0,
    memory: Annotated[int, typer.Option(help="Memory limit in MiB.", min=1, max=2**20)] = 64,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Allow subprocess, which is no sandbox.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run one program and print its output, or the error. Exit code 1 if it failed, except with --json."""
    from viaticum.strategies.sandbox import Limits, open_sandbox

    program = _read(file)
    with open_sandbox(backend, workers=1, unsafe=unsafe) as sandbox:
        result = sandbox.run(program, Limits(seconds, memory * 2**20))
    if as_json:
        typer.echo(json.dumps({"ok": result.ok, **asdict(result), "seconds": round(result.seconds, 4)}))
        return
    typer.echo(result.stdout, nl=False)
    if not result.ok:
        sys.stderr.write(f"{result.error} ({result.backend})\n")
        raise typer.Exit(1)


@app.command("check")
def check_backends(as_json: JsonFlag = False) -> None:
    """Start and test each sandbox: whether it works here, how strong it is, and what to install if not."""
    from viaticum.strategies.sandbox import open_sandbox

    found: list[dict[str, Any]] = []
    for backend in ("monty", "bwrap"):
        try:
            with open_sandbox(backend, workers=1) as sandbox:
                found.append({"backend": backend, "works": True, "strength": sandbox.strength, "error": ""})
        except SandboxError as error:
            found.append({"backend": backend, "works": False, "strength": "", "error": str(error)})
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for each in found:
        typer.echo(f"{each['backend']}: {each['strength'] if each['works'] else 'no: ' + each['error']}")


def _read(file: Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as a program: {reason(error)}") from error
