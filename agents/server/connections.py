"""Connections of the server: time limits from the first byte, and how many there are at once.

uvicorn limits neither the time that the head of a request takes, nor how long a client may leave its response
unread, nor what is open at once. `LimitedConnection` is its HTTP protocol with these limits, and
`Connections` looks over all of them a few times a second. At the limit the connection that has waited longest
for its client, to ask or to read, makes room, so that slow clients keep nobody out. Of the other servers
hypercorn limits one read at a time, which each drop begins anew, and granian the head alone. Leaves out
requests (`app`), and the time of a body, which its reader limits (`body`).
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from viaticum.agents.openai_api.errors import APIError, overloaded
from viaticum.agents.server.request_ids import HEADER, new_request_id
from viaticum.agents.server.run import Limits

# Connections that the event loop accepts before it handles the first of them, and that are being refused.
ACCEPTED_AT_ONCE = 32
OTHER_DESCRIPTORS = 64  # ledger, keys, checkpoints, pipes, files of models
DESCRIPTORS_PER_CALL = 4  # connections to a provider and programs in the sandbox
LINGER = 2.0  # seconds in which the rest of a refused body is read, so that the client reads the response
TCP_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # a dead peer: a minute


def allowed_connections(limits: Limits, *, descriptors: int | None = None) -> int:
    """How many connections may be open at once.

    Args:
        descriptors: files that the process may have open; by default what the system says.
    """
    if descriptors is None:
        descriptors = _descriptor_limit()
    reserved = 2 * ACCEPTED_AT_ONCE + OTHER_DESCRIPTORS + DESCRIPTORS_PER_CALL * limits.concurrency
    return max(1, min(limits.connections, descriptors - reserved))


def _descriptor_limit() -> int:
    try:
        import resource
    except ImportError:  # Windows: sockets are not counted with files
        return 1 << 30
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft


class Connections:
    """The open connections of one event loop.

    Args:
        maximum: connections at once.
        patience: seconds for the head of a request, and for a client to read anything of what was written.
    """

    def __init__(self, maximum: int, patience: float) -> None:
        self._maximum, self._patience = maximum, patience
        self._open: set[LimitedConnection] = set()
        self._refused: set[LimitedConnection] = set()
        self._check: asyncio.TimerHandle | None = None

    def protocol(self, **arguments: Any) -> LimitedConnection:
        """A connection, as uvicorn makes one."""
        return LimitedConnection(self, **arguments)

    def start(self) -> None:
        """Look over the connections from now on, until `stop`. In the event loop."""
        self._check_all()

    def stop(self) -> None:
        if self._check is not None:
            self._check.cancel()

    def add(self, connection: LimitedConnection) -> bool:
        """Count a new connection; False where there is no room, and it is to say so and close."""
        if len(self._open) >= self._maximum:
            waiting = [each for each in self._open if each.waits_for_client]
            if not waiting:
                self._refused.add(connection)
                return False
            min(waiting, key=lambda each: each.waits_since).abort()
        self._open.add(connection)
        return True

    @property
    def may_linger(self) -> bool:
        return len(self._refused) <= ACCEPTED_AT_ONCE

    def remove(self, connection: LimitedConnection) -> None:
        self._open.discard(connection)
        self._refused.discard(connection)

    def _check_all(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self._open):
            connection.check(now, self._patience)
        self._check = loop.call_later(min(0.5, self._patience / 4), self._check_all)


class LimitedConnection(H11Protocol):
    """One connection.

    waits_since: time of the event loop from which the client is waited for: it has unread output, the
        connection was opened, its last response ended, or the first byte of the next request came.
    """

    def __init__(
        self,
        connections: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._connections = connections
        self._is_refused = False
        self._is_idle = False  # between two requests: uvicorn's own limit counts
        self._unread = 0  # bytes that the transport holds for the client
        self._read_at = self._drained_at = self._responded_at = self._awaited_since = self.loop.time()

    @property
    def waits_for_client(self) -> bool:
        """The request has not come as a whole, or the client does not read."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY) or self._unread > 0

    @property
    def waits_since(self) -> float:
        return self._drained_at if self._unread else self._awaited_since

    def abort(self) -> None:
        """Close at once, whatever is unsent."""
        self._connections.remove(self)
        self.transport.abort()

    # --- uvicorn's events ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _set_options(transport.get_extra_info("socket"))
        if not self._connections.add(self):
            self._refuse()

    def _refuse(self) -> None:
        """Send a 503 and close, a little later: closing over unread bytes would take back the response."""
        self._is_refused = True
        self.connections.discard(self)
        self.transport.write(_response(overloaded(1)))
        if self._connections.may_linger:
            self.transport.write_eof()
            self.loop.call_later(LINGER, self.transport.abort)
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._is_idle:
            self._is_idle, self._awaited_since = False, self.loop.time()
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._responded_at = self._awaited_since = self.loop.time()
        self._is_idle = self.conn.their_state is h11.DONE and not self.conn.trailing_data[0]
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.remove(self)
        super().connection_lost(exc)

    # --- limits -------------------------------------------------------------------------------------------

    def check(self, now: float, patience: float) -> None:
        """Abort a connection that is over a limit of time."""
        unread = self.transport.get_write_buffer_size()
        if not unread or unread < self._unread:
            self._read_at = now
        if not unread:
            self._drained_at = now
        self._unread = unread
        is_head_late = (
            self.conn.their_state is h11.IDLE and not self._is_idle and now - self._awaited_since > patience
        )
        is_body_late = (
            self.conn.their_state is h11.SEND_BODY
            and self.cycle is not None
            and self.cycle.response_complete
            and now - self._responded_at > LINGER
        )
        if is_head_late or is_body_late or now - self._read_at > patience:
            self.abort()


def _set_options(connection: socket.socket) -> None:
    """Send small writes at once, and notice peers that vanished.

    asyncio does the first only for sockets that name their protocol, which `socket.create_server` leaves out.
    """
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in TCP_KEEPALIVE.items():
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _response(error: APIError) -> bytes:
    """The whole response to a connection that is refused before its request is read."""
    body = json.dumps(error.body).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        HEADER: new_request_id(),
    }
    lines = [f"{name}: {value}\r\n" for name, value in (headers | error.headers).items()]
    return f"HTTP/1.1 {error.status} \r\n{''.join(lines)}\r\n".encode() + body
