"""The server process: it listens, and drains on SIGTERM or SIGINT.

While it drains, new requests get status 503; running ones end or are cancelled after a grace period, and all
are settled before the process exits with code 0. A second signal cancels at once. Needs the `server` extra.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from viaticum.agents.server.api_keys import ApiKeyStore
from viaticum.agents.server.app import build_app
from viaticum.agents.server.batch_runner import BatchRunner
from viaticum.agents.server.connections import ACCEPTED_AT_ONCE, Connections, allowed_connections
from viaticum.agents.server.request_ids import RequestIds
from viaticum.agents.server.service import Service
from viaticum.errors import InputError
from viaticum.signals import SignalHandler

BACKLOG = 2048


@dataclass(frozen=True)
class Address:
    """Where to listen. Port 0 takes a free one."""

    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def listen(self) -> socket.socket:
        """A listening socket. Raises `InputError` for an address that cannot be used."""
        if not 0 <= self.port <= 65535:
            raise InputError(f"a port is 0 to 65535, got {self.port}")
        try:
            family = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((self.host, self.port), family=family, backlog=BACKLOG)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"cannot listen on {self.host} port {self.port}: {reason}; take another"
            ) from None


def require_key_for_public_address(address: Address, keys: ApiKeyStore, *, insecure: bool) -> None:
    """Raise `InputError` for a server that other machines can reach without a key, unless `insecure`."""
    if not address.is_loopback and not insecure and not any(key.revoked is None for key in keys.all()):
        raise InputError(
            f"{address.host} can be reached from other machines, and there is no key: make one with "
            "`viaticum keys create NAME`, or say --insecure to let everyone spend"
        )


def serve(
    service: Service,
    listener: socket.socket,
    *,
    grace: float = 30.0,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Args:
        listener: a listening socket.
        grace: seconds that running calls have to end.
        on_ready: called once requests are accepted.
    """
    Server(service, grace=grace, on_ready=on_ready).run([listener])
    service.close()


class Server(uvicorn.Server):
    """Runs a service until `stop`, or until a signal where this is the main thread."""

    def __init__(
        self, service: Service, *, grace: float = 30.0, on_ready: Callable[[], None] = lambda: None
    ) -> None:
        limits = service.limits
        self._connections = Connections(allowed_connections(limits), limits.stall_timeout)
        app = build_app(service)
        self._batches: BatchRunner | None = app.state.batches
        config = uvicorn.Config(
            RequestIds(app),
            http=self._connections.protocol,  # type: ignore[arg-type]  # called like the class
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=5,
            backlog=ACCEPTED_AT_ONCE,
            server_header=False,
        )
        super().__init__(config)
        self._service, self._grace, self._on_ready = service, grace, on_ready
        self._drain_task: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)  # uvicorn's backlog is also how many asyncio accepts at once
        self._connections.start()
        if self._batches is not None:
            self._batches.start()
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._connections.stop()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on a signal and exit with code 0; uvicorn would re-raise the signal afterwards."""
        self._loop = asyncio.get_running_loop()
        with SignalHandler(lambda number: self.stop()):
            yield

    def stop(self) -> None:
        """Drain; called again, cancel at once. From any thread, once requests are accepted."""
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._drain_task is None:
            self._drain_task = asyncio.create_task(self._drain())
        else:
            self._cancel_task = asyncio.create_task(self._service.cancel_runs())

    async def _drain(self) -> None:
        if self._batches is not None:
            self._batches.interrupt()
        running = len(self._service.runs)
        if running:
            sys.stderr.write(f"ending: {running} calls run, and have {self._grace:g} s to end\n")
        cancelled = await self._service.drain(self._grace)
        if cancelled:
            sys.stderr.write(f"{cancelled} calls were cut, and charged for what they wrote\n")
        if self._batches is not None:
            await self._batches.stop()
        self.should_exit = True
