"""A real server of Viaticum on a loopback port, in a thread, over scripted models of a TOML catalogue."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from viaticum import FakeRouter, Viaticum
from viaticum.agents.responses_api.store import ResponseStore
from viaticum.agents.server.api_keys import ApiKeyStore
from viaticum.agents.server.batch_store import BatchStore
from viaticum.agents.server.process import Address, Server
from viaticum.agents.server.run import Limits
from viaticum.agents.server.service import Service
from viaticum.agents.workflow.shadow_settings import ShadowSampling
from viaticum.catalogue import Catalogue
from viaticum.routers.query import QueryRouter

WORD = 1_000  # nano-dollars
LONG_TEXT = " ".join(f"w{number}" for number in range(400))
CATALOGUE = """
[models.fast]
text = "Seven times six is forty-two. The answer is 42."
[models.mute]
text = "I cannot tell"
[models.slow]
text = "{long}"
pause = 0.01
"""
FIELDS = '\ndescription = "d"\nkind = "scripted"\ncontext_length = 8192\ninput_price = 1\noutput_price = 1\n'


def write_catalogue(folder: Path) -> Path:
    file = folder / "catalogue.toml"
    text = CATALOGUE.replace("{long}", LONG_TEXT)
    file.write_text(
        "".join(f"{line}{FIELDS if line.startswith('[') else chr(10)}" for line in text.splitlines())
    )
    return file


@dataclass
class RunningServer:
    """A running server. http: a client at its root."""

    url: str
    http: httpx.Client
    client: Viaticum
    service: Service
    uvicorn: Server
    keys: ApiKeyStore

    def ask(
        self, model: str = "fast", *, headers: dict[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=chat_body(model, **body), headers=headers)

    def spent_and_held(self) -> tuple[int, int]:
        """Of the server's budget, in nano-dollars."""
        budget = self.client.budget()
        return budget.posted_nanousd, budget.held_nanousd

    def assert_settled(self) -> None:
        """Wait until nothing runs; then no slot is in use and no hold is open."""
        wait_until(lambda: not self.service.runs)
        assert self.service.limiter.running == 0
        assert [hold for hold in self.client.ledger.holds() if hold.state in ("reserved", "dispatched")] == []
        assert self.client.budget().held_nanousd == 0
        assert self.client.ledger.check() == []


def chat_body(model: str = "fast", **body: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "What is 6 times 7?"}], **body}


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def hold_back(model: Any, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let calls of a model write nothing until the event is set."""
    go_on, stream = threading.Event(), model.stream

    def held(messages: Any, generation: Any) -> Iterator[Any]:
        assert go_on.wait(120)
        yield from stream(messages, generation)

    monkeypatch.setattr(model, "stream", held)
    return go_on


@contextmanager
def serving(
    folder: Path,
    *,
    budget: str = "1",
    grace: float = 20.0,
    root_scope: str | None = None,
    catalogue: Catalogue | None = None,
    router: QueryRouter | None = None,
    shadow: ShadowSampling | None = None,
    bytes_a_key: int = 1 << 30,
    **limits: Any,
) -> Iterator[RunningServer]:
    """A server until the end of the block. bytes_a_key: of files; limits: fields of `Limits`."""
    with (
        ApiKeyStore(folder / "keys.db") as keys,
        ResponseStore(folder / "responses.db") as responses,
        BatchStore(folder, bytes_a_key=bytes_a_key) as files,
        Viaticum(
            budget,
            budget_name="serve",
            catalogue=catalogue or write_catalogue(folder),
            folder=folder,
            router=router or FakeRouter("fast+cot"),
            slots=limits.get("concurrency", 8),
            shadow=shadow,
        ) as client,
        Address(port=0).listen() as listener,
    ):
        service, ready = (
            Service(
                client,
                keys=keys,
                limits=Limits(**limits),
                root_scope=root_scope,
                responses=responses,
                files=files,
            ),
            threading.Event(),
        )
        server = Server(service, grace=grace, on_ready=ready.set)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        assert ready.wait(120)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=120) as http:
            try:
                yield RunningServer(url, http, client, service, server, keys)
            finally:
                server.stop()
                thread.join(120)
                service.close()
                assert not thread.is_alive()
