"""`viaticum serve`: the OpenAI-compatible server. Leaves out its keys: see `keys`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from viaticum.commands.models import CatalogueFile
from viaticum.errors import MissingExtra
from viaticum.money import format_usd

if TYPE_CHECKING:
    from viaticum.agents.client import Viaticum
    from viaticum.agents.server.api_keys import Keys

SCOPE = "serve"
BUDGET_USD = "1"

Folder = Annotated[
    Path | None,
    typer.Option(
        "--folder", help="Where ledger and keys lie; yours by default.", metavar="DIR", envvar="VIATICUM_HOME"
    ),
]


def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.", min=0, max=65535)] = 8000,
    dollars: Annotated[
        str | None,
        typer.Option("--budget", help="Dollars for everything that is served. [default: 1, of a new budget]"),
    ] = None,
    budget_name: Annotated[
        str | None,
        typer.Option(
            "--budget-name",
            help=f"The budget that pays; only keys of it and those below are let in. [default: {SCOPE}, all keys]",
        ),
    ] = None,
    catalogue: CatalogueFile = None,
    router: Annotated[Path | None, typer.Option(help="The folder of a fitted router.", metavar="DIR")] = None,
    policy: Annotated[str, typer.Option(help="best, cheapest:ACCURACY or weighted:PER_DOLLAR")] = "best",
    concurrency: Annotated[
        int, typer.Option(help="Calls at once; a local model writes so many texts together.", min=1)
    ] = 8,
    queue: Annotated[
        int, typer.Option(help="Requests that wait for their turn; more are refused.", min=0)
    ] = 64,
    rate: Annotated[int | None, typer.Option(help="Requests a minute of each key.", min=1)] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for a whole request.")] = 600.0,
    patience: Annotated[float, typer.Option(help="Seconds that a client may read nothing.")] = 30.0,
    grace: Annotated[
        float, typer.Option(help="Seconds that running calls have to end after SIGTERM.", min=0)
    ] = 30.0,
    body_limit: Annotated[int, typer.Option("--body-limit", help="Bytes of a request at most.", min=1)] = 1
    << 20,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines in without a key.")
    ] = False,
    folder: Folder = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print address, process and budget as JSON on stdout.")
    ] = False,
) -> None:
    """Serve OpenAI's chat completions, each request within a budget.

    Models: auto (routed), any name of `viaticum models list`, and NAME+STRATEGY. Point a client at
    http://127.0.0.1:8000/v1. SIGTERM ends in order: running calls end or are cut, and are settled.
    """
    try:
        from viaticum.agents.server.process import Address, refuse_open_door
        from viaticum.agents.server.process import serve as run
        from viaticum.agents.server.run import Limits
        from viaticum.agents.server.service import Service
    except ImportError as error:
        raise MissingExtra(error.name or "starlette", "server") from None
    from viaticum.agents.client import Viaticum
    from viaticum.agents.server.api_keys import Keys
    from viaticum.budgets import default_path

    address = Address(host, port)
    limits = Limits(
        concurrency=concurrency,
        queue=queue,
        per_minute=rate,
        timeout=timeout,
        patience=patience,
        body_bytes=body_limit,
    )
    home = folder or default_path().parent
    with Keys(home / "keys.db") as keys:
        refuse_open_door(address, keys, insecure=insecure)
        scope = budget_name or SCOPE
        with (
            Viaticum(
                dollars or _limit_for(home, scope),
                budget_name=scope,
                catalogue=catalogue,
                router=router,
                policy=policy,
                folder=home,
                slots=concurrency,
            ) as client,
            address.listen() as listener,
        ):
            service = Service(
                client, keys=keys, limits=limits, public=not address.is_loopback, within=budget_name
            )
            name = f"[{host}]" if ":" in host else host
            url = f"http://{name}:{listener.getsockname()[1]}/v1"

            def ready() -> None:
                _announce(url, client, keys, as_json)

            run(service, listener, grace=grace, ready=ready)


def _limit_for(home: Path, scope: str) -> str | None:
    """Dollars for a budget that has to be made; None for one that is there, and keeps its terms."""
    from viaticum.budgets import Ledger

    with Ledger(home / "ledger.db") as ledger:
        return None if scope in {each.name for each in ledger.budgets()} else BUDGET_USD


def _announce(url: str, client: Viaticum, keys: Keys, as_json: bool) -> None:
    budget = client.budget()
    count = sum(key.revoked is None for key in keys.all())
    if as_json:
        told = {
            "url": url,
            "pid": os.getpid(),
            "budget": budget.name,
            "left_nanousd": budget.left_nanousd,
            "keys": count,
        }
        typer.echo(json.dumps(told))
    left = "" if budget.left_nanousd is None else f", {format_usd(budget.left_nanousd)} left"
    sys.stderr.write(f"serving {url}, budget {budget.name}{left}\n")
    if not keys.all():
        sys.stderr.write(
            "warning: there is no key, so everyone on this machine can spend it; "
            "make one with `viaticum keys create NAME`\n"
        )
    sys.stdout.flush()
    sys.stderr.flush()
