"""`viaticum serve`: the server of OpenAI's and Anthropic's APIs. Leaves out its keys: see `keys`."""

from __future__ import annotations

import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from viaticum.commands.generation import POLICY, Load, MaxSeconds, Only, Policy, with_generation_options
from viaticum.commands.local import with_local_options
from viaticum.commands.models import CatalogueFile
from viaticum.commands.progress import loading_shown
from viaticum.commands.shadow import with_shadow_options
from viaticum.commands.soft_limits import with_soft_limit_options
from viaticum.errors import MissingExtra
from viaticum.generation import NO_SETTINGS, GenerationSettings
from viaticum.local_settings import NO_LOCAL_SETTINGS, LocalSettings
from viaticum.money import format_usd

if TYPE_CHECKING:
    from viaticum.agents.client import Viaticum
    from viaticum.agents.responses_api.store import ResponseStore
    from viaticum.agents.server.api_keys import ApiKeyStore
    from viaticum.agents.server.batch_store import BatchStore
    from viaticum.agents.server.process import Address
    from viaticum.agents.server.service import Service

BUDGET_NAME = "serve"
BUDGET_USD = "1"

Folder = Annotated[
    Path | None,
    typer.Option(
        "--folder",
        help="Folder of ledger and keys; by default VIATICUM_HOME, else yours.",
        metavar="DIR",
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on; other than this machine's own needs a key.")]
Port = Annotated[int, typer.Option(help="0 takes any free one.", min=0, max=65535)]
Dollars = Annotated[
    str | None,
    typer.Option("--budget", help="Dollars for all requests together. [default: 1, of a new budget]"),
]
BudgetName = Annotated[
    str | None,
    typer.Option(
        "--budget-name",
        help="The budget that pays; only keys of it and of budgets below it are accepted. "
        f"[default: {BUDGET_NAME}, all keys]",
    ),
]
Router = Annotated[Path | None, typer.Option(help="The folder of a fitted router.", metavar="DIR")]
Concurrency = Annotated[
    int, typer.Option(help="Calls at once; a local model decodes them as one batch.", min=1)
]
Queue = Annotated[int, typer.Option(help="Requests that wait for a free slot; more are rejected.", min=0)]
Rate = Annotated[int | None, typer.Option(help="Requests a minute of each key.", min=1)]
Timeout = Annotated[float, typer.Option(help="Seconds for a whole request.")]
Patience = Annotated[
    float, typer.Option(help="Seconds that a client may read nothing, or take to send its request.")
]
Grace = Annotated[float, typer.Option(help="Seconds that running calls have to end after SIGTERM.", min=0)]
BodyLimit = Annotated[int, typer.Option("--body-limit", help="Bytes of a request at most.", min=1)]
Connections = Annotated[
    int, typer.Option(help="Open at once at most, and fewer than the files of the process.", min=1)
]
KeepResponses = Annotated[
    float,
    typer.Option(
        "--keep-responses",
        help="Days for which conversations of /v1/responses are kept, unless they say store: false; "
        "0 keeps none.",
        min=0,
    ),
]
KeepFiles = Annotated[
    float,
    typer.Option(
        "--keep-files",
        help="Days for which files and batches of /v1/files and /v1/batches are kept; 0 takes none.",
        min=0,
    ),
]
FileLimit = Annotated[int, typer.Option("--file-limit", help="Bytes of an uploaded file at most.", min=1)]
KeepBytes = Annotated[
    int,
    typer.Option(
        "--keep-bytes",
        help="Bytes that each key keeps at most, of responses and of files: the oldest responses go, files "
        "are refused.",
        min=1,
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Accept other machines without a key.")]
JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print address, process and budget as JSON on stdout.")
]


@with_local_options
@with_generation_options
@with_shadow_options
@with_soft_limit_options
def serve(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    dollars: Dollars = None,
    budget_name: BudgetName = None,
    catalogue: CatalogueFile = None,
    router: Router = None,
    policy: Policy = POLICY,
    concurrency: Concurrency = 8,
    queue: Queue = 64,
    rate: Rate = None,
    timeout: Timeout = 600.0,
    patience: Patience = 30.0,
    grace: Grace = 30.0,
    body_limit: BodyLimit = 1 << 20,
    connections: Connections = 1000,
    only: Only = None,
    max_seconds: MaxSeconds = None,
    load: Load = None,
    generation: GenerationSettings = NO_SETTINGS,
    local: LocalSettings = NO_LOCAL_SETTINGS,
    shadow: Any = None,
    soft_limits: Any = None,
    keep_responses: KeepResponses = 30.0,
    keep_files: KeepFiles = 30.0,
    keep_bytes: KeepBytes = 1 << 30,
    file_limit: FileLimit = 200_000_000,
    insecure: Insecure = False,
    folder: Folder = None,
    as_json: JsonFlag = False,
) -> None:
    """Serve the APIs of OpenAI and Anthropic, each request within a budget.

    Models: auto (routed), any name of `viaticum models list`, and NAME+STRATEGY. Point a client at
    http://127.0.0.1:8000/v1, one of Anthropic at http://127.0.0.1:8000. SIGTERM drains: running calls end or
    are cancelled, and are settled.
    """
    _require_extra()
    from viaticum.agents.client import Viaticum
    from viaticum.agents.server.api_keys import ApiKeyStore
    from viaticum.agents.server.process import Address, require_key_for_public_address
    from viaticum.agents.server.run import Limits
    from viaticum.agents.server.service import Service
    from viaticum.budgets import default_path

    address = Address(host, port)
    limits = Limits(
        concurrency=concurrency,
        queue=queue,
        per_minute=rate,
        timeout=timeout,
        stall_timeout=patience,
        body_bytes=body_limit,
        file_bytes=file_limit,
        connections=connections,
    )
    home = folder or default_path().parent
    with ApiKeyStore(home / "keys.db") as keys:
        require_key_for_public_address(address, keys, insecure=insecure)
        name = budget_name or BUDGET_NAME
        with (
            Viaticum(
                dollars or _limit_of_new_budget(home, name),
                budget_name=name,
                catalogue=catalogue,
                router=router,
                policy=policy,
                folder=home,
                concurrency=concurrency,
                slots="auto",
                local=local,
                strategies=load or (),
                only=only,
                max_seconds=max_seconds,
                generation=generation,
                shadow=shadow,
                soft_limits=soft_limits,
            ) as client,
            _responses(home, keep_responses, keep_bytes) as responses,
            _files(home, keep_files, keep_bytes) as files,
        ):
            service = Service(
                client,
                keys=keys,
                limits=limits,
                public=not address.is_loopback,
                root_scope=budget_name,
                responses=responses,
                files=files,
            )
            _run(service, keys, address, grace=grace, as_json=as_json)


def _responses(home: Path, days: float, most: int) -> AbstractContextManager[ResponseStore | None]:
    from viaticum.agents.responses_api.store import ResponseStore

    return ResponseStore(home / "responses.db", days=days, bytes_a_key=most) if days else nullcontext()


def _files(home: Path, days: float, most: int) -> AbstractContextManager[BatchStore | None]:
    from viaticum.agents.server.batch_store import BatchStore

    return BatchStore(home, days=days, bytes_a_key=most) if days else nullcontext()


def _require_extra() -> None:
    try:
        import viaticum.agents.server.process  # noqa: F401
    except ImportError as error:
        raise MissingExtra(error.name or "starlette", "server") from None


def _limit_of_new_budget(home: Path, name: str) -> str | None:
    """Dollars for a budget that has to be created; None for one that exists, which keeps its terms."""
    from viaticum.budgets import Ledger

    with Ledger(home / "ledger.db") as ledger:
        return None if name in {budget.name for budget in ledger.budgets()} else BUDGET_USD


def _run(service: Service, keys: ApiKeyStore, address: Address, *, grace: float, as_json: bool) -> None:
    """Listen and serve until a signal comes."""
    from viaticum.agents.server.process import serve

    with address.listen() as listener:
        host = f"[{address.host}]" if ":" in address.host else address.host
        url = f"http://{host}:{listener.getsockname()[1]}/v1"
        announce = partial(_announce, url, service.client, keys, as_json)
        with loading_shown():
            serve(service, listener, grace=grace, on_ready=announce)


def _announce(url: str, client: Viaticum, keys: ApiKeyStore, as_json: bool) -> None:
    budget = client.budget()
    if as_json:
        payload = {
            "url": url,
            "pid": os.getpid(),
            "budget": budget.name,
            "left_nanousd": budget.left_nanousd,
            "keys": sum(key.revoked is None for key in keys.all()),
        }
        typer.echo(json.dumps(payload))
    left = "" if budget.left_nanousd is None else f", {format_usd(budget.left_nanousd)} left"
    sys.stderr.write(f"serving {url}, budget {budget.name}{left}\n")
    if not keys.all():
        sys.stderr.write(
            "warning: there is no key, so everyone on this machine can spend it; "
            "make one with `viaticum keys create NAME`\n"
        )
    sys.stdout.flush()
    sys.stderr.flush()
