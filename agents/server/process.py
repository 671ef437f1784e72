"""A process that serves: it listens, and on SIGTERM or SIGINT it ends in order.

New requests are refused (503) while those that run end by themselves, or are cut after a grace period; every one of them is
settled before the process ends, with exit code 0. A second signal cuts at once. Needs the `server` extra.
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

from viaticum.agents.server.api_keys import Keys
from viaticum.agents.server.service import Service
from viaticum.errors import InputError
from viaticum.signals import SignalHandler

BACKLOG = 2048


@dataclass(frozen=True)
class Address:
    """Where to listen. port 0 is any free one."""

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
        """Raises `InputError` where that is not possible."""
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


def refuse_open_door(address: Address, keys: Keys, *, insecure: bool) -> None:
    """Raises `InputError` for a server that other machines reach and that asks for no key."""
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
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal comes, and end in order. ready is called once requests are taken."""
    Server(service, grace=grace, ready=ready).run([listener])
    service.close()


class Server(uvicorn.Server):
    """Runs a service until `stop`, or a signal where this is the main thread."""

    def __init__(
        self, service: Service, *, grace: float = 30.0, ready: Callable[[], None] = lambda: None
    ) -> None:
        config = uvicorn.Config(
            service.app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=5,
            backlog=BACKLOG,
            server_header=False,
        )
        super().__init__(config)
        self._service, self._grace, self._ready = service, grace, ready
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would end the process by the signal itself; here it is a wish that is granted."""
        with SignalHandler(lambda number: self.stop()):
            yield

    def stop(self) -> None:
        """End in order; a second time: now. From any thread, once requests are taken."""
        self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._drained())
        else:
            self._cut = asyncio.create_task(self._service.cut())

    async def _drained(self) -> None:
        running = len(self._service.runs)
        if running:
            sys.stderr.write(f"ending: {running} calls run, and have {self._grace:g} s to end\n")
        cut = await self._service.drain(self._grace)
        if cut:
            sys.stderr.write(f"{cut} calls were cut, and charged for what they wrote\n")
        self.should_exit = True
