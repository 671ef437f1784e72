"""`viaticum keys`: create, list and revoke the API keys of `viaticum serve`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from viaticum.commands.generation import Only
from viaticum.commands.serve import Folder
from viaticum.commands.table import print_table
from viaticum.errors import InputError
from viaticum.money import budget_nanousd

if TYPE_CHECKING:
    from viaticum.agents.server.api_keys import ApiKey, ApiKeyStore

KEYS = "keys.db"
app = typer.Typer(no_args_is_help=True, help="Create, list and revoke the API keys of `viaticum serve`.")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Name = Annotated[str, typer.Argument(help="The name of the key.")]


@app.command()
def create(
    name: Name,
    scope: Annotated[
        str | None, typer.Option(help="The budget that pays; the server's own by default.", metavar="BUDGET")
    ] = None,
    limit: Annotated[
        str | None, typer.Option(help="Create that budget with this limit in dollars.", metavar="USD")
    ] = None,
    parent: Annotated[str | None, typer.Option(help="The parent of a new budget.", metavar="BUDGET")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model that it may request; all by default.")
    ] = None,
    only: Only = None,
    rate: Annotated[int | None, typer.Option(help="Requests a minute.", min=1)] = None,
    team: Annotated[
        str | None, typer.Option(help="To whom its spending is charged on: see viaticum budget spending.")
    ] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="It may read the metrics of all budgets, not only of its own.")
    ] = False,
    folder: Folder = None,
    as_json: JsonFlag = False,
) -> None:
    """Create a key. It is shown only once: its hash is stored."""
    from viaticum.budgets import Ledger

    home = _home(folder)
    with Ledger(home / "ledger.db") as ledger:
        if limit is not None:
            scope = scope or name
            ledger.create(scope, limit_nanousd=budget_nanousd(limit), parent=parent)
        elif scope is not None:
            ledger.budget(scope)
    with _open_keys(folder, make=True) as keys:
        token, key = keys.create(
            name, scope=scope, models=model or (), only=only, per_minute=rate, metrics=metrics, team=team
        )
    if as_json:
        typer.echo(json.dumps({"key": token, **_to_json(key)}))
    else:
        typer.echo(token)


@app.command("list")
def list_keys(folder: Folder = None, as_json: JsonFlag = False) -> None:
    """List the keys, revoked ones too."""
    rows: list[ApiKey] = []
    if folder is not None or (_home(None) / KEYS).exists():
        with _open_keys(folder) as keys:
            rows = keys.all()
    if as_json:
        typer.echo(json.dumps([_to_json(key) for key in rows]))
        return
    columns = ("name", "key", "budget", "team", "models", "only", "a minute", "metrics", "made", "revoked")
    cells = [
        (
            key.name,
            key.shown,
            key.scope or "the server's",
            key.team or "-",
            ", ".join(key.models) or "all",
            " or ".join(key.only) or "-",
            "-" if key.per_minute is None else str(key.per_minute),
            "all" if key.metrics else "its own",
            key.created,
            key.revoked or "-",
        )
        for key in rows
    ]
    print_table(columns, cells, spare=("made", "metrics", "a minute", "only", "models", "team"))


@app.command()
def revoke(name: Name, folder: Folder = None, as_json: JsonFlag = False) -> None:
    """Revoke a key, at once and for good."""
    with _open_keys(folder) as keys:
        key = keys.revoke(name)
    typer.echo(json.dumps(_to_json(key)) if as_json else f"revoked {key.name}")


def _to_json(key: ApiKey) -> dict[str, Any]:
    return asdict(key) | {"models": list(key.models), "only": list(key.only)}


def _home(folder: Path | None) -> Path:
    from viaticum.budgets import default_path

    return folder or default_path().parent


def _open_keys(folder: Path | None, *, make: bool = False) -> ApiKeyStore:
    from viaticum.agents.server.api_keys import ApiKeyStore

    path = _home(folder) / KEYS
    if not make and not path.exists():
        raise InputError(
            f"no keys in {path.parent}; name their folder, or make one: viaticum keys create NAME"
        )
    return ApiKeyStore(path)
