"""A server of batches in a process of its own, to be killed: prints its URL once it accepts requests.

    python batch_server.py FOLDER PROVIDER DIES_AT

PROVIDER is the URL of an OpenAI-compatible server, the model `far`, or "-" for none. When it would write the
answer of number DIES_AT (0 for never) the process kills itself: that line is paid for, and has no answer yet.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from openai_server import OpenAIServer, spec_for
from viaticum_server import write_catalogue

from viaticum import FakeRouter, Viaticum
from viaticum.agents.server.api_keys import ApiKeyStore
from viaticum.agents.server.batch_run import BatchRun
from viaticum.agents.server.batch_store import BatchStore
from viaticum.agents.server.process import Address, serve
from viaticum.agents.server.run import Limits
from viaticum.agents.server.service import Service
from viaticum.catalogue import Catalogue

CONCURRENCY, GRACE = 4, 1.0


def main(folder: Path, provider: str, dies_at: int) -> None:
    catalogue = Catalogue.load(write_catalogue(folder))
    if provider != "-":
        port = int(provider.rpartition(":")[2].removesuffix("/v1"))
        catalogue = catalogue.with_models(spec_for(OpenAIServer(port), max_retries=0))
    if dies_at:
        die_at_write(dies_at)
    with (
        ApiKeyStore(folder / "keys.db") as keys,
        BatchStore(folder) as files,
        Viaticum(
            "10",
            budget_name="serve",
            catalogue=catalogue,
            folder=folder,
            router=FakeRouter("fast+cot", "mute+cot"),
            slots=CONCURRENCY,
        ) as client,
        Address(port=0).listen() as listener,
    ):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        service = Service(client, keys=keys, limits=Limits(concurrency=CONCURRENCY), files=files)
        serve(service, listener, grace=GRACE, on_ready=lambda: print(url, flush=True))


def die_at_write(number: int) -> None:
    left, turn = [number], threading.Lock()  # the answers before it are written by then
    write = BatchRun._write

    def killed(*given: Any) -> None:
        with turn:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*given)

    BatchRun._write = killed  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
