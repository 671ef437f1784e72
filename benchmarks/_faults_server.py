"""The server's part of benchmarks/faults.py: clients that vanish or are slow, SIGTERM, SIGKILL; what leaks?

    python benchmarks/_faults_server.py --clients 300

`viaticum serve` is a process of its own over scripted models. After each part nothing may be left: no hold
that is open, no place in use, no scope but the server's, no connection. A call that was under way at SIGKILL
is unknown, not leaked: `viaticum budget reconcile --crashed` lists it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from viaticum.budgets import Ledger

PATIENCE = 2.0  # seconds, of the server with its clients
CONCURRENCY = 24
HONEST = 20  # clients that only ask, beside those that do not
WORDS, PAUSE = 60, 0.01  # of the model `slow`
MODELS = ("slow", "slow+cot")
SETTLE_SECONDS = 60.0
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
FAR_FUTURE = datetime(9998, 1, 1, tzinfo=UTC)


@dataclass
class Found:
    """What one part left; all but `clients`, `ends` and `unknown` must be 0.

    unknown: calls that were under way at SIGKILL; unserved: honest clients without an answer.
    """

    clients: int
    ends: dict[str, int] = field(default_factory=dict)
    unserved: int = 0
    holds: int = 0
    places: int = 0
    connections: int = 0
    scopes: int = 0
    findings: int = 0
    wrong_exit: int = 0
    tracebacks: int = 0
    unknown: int = 0

    @property
    def leaks(self) -> dict[str, int]:
        names = ("holds", "places", "connections", "scopes", "findings", "wrong_exit", "tracebacks")
        return {name: getattr(self, name) for name in (*names, "unserved") if getattr(self, name)}


# --- the server -------------------------------------------------------------------------------------------


class ServerProcess:
    """`viaticum serve` in a folder; the ledger stays there from one process to the next."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_catalogue(folder / "catalogue.toml")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", "from viaticum.cli import main; main()", "serve", "--json"),
                *("--port", "0", "--folder", str(folder), "--catalogue", str(folder / "catalogue.toml")),
                *("--concurrency", str(CONCURRENCY), "--queue", "1000", "--patience", str(PATIENCE)),
                *("--grace", "1", *(() if (folder / "ledger.db").exists() else ("--budget", "1000"))),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(self.process.communicate()[1])
        self.url: str = json.loads(line)["url"]
        self.port = int(self.url.rpartition(":")[2].partition("/")[0])
        self.idle_sockets = self.sockets()

    def sockets(self) -> int:
        folder, count = Path(f"/proc/{self.process.pid}/fd"), 0
        for each in folder.iterdir() if folder.is_dir() else ():
            with suppress(OSError):
                count += os.readlink(each).startswith("socket:")
        return count

    def wait_until_idle(self, found: Found) -> None:
        """Wait for what is under way to end, and count what is left."""
        end = time.monotonic() + SETTLE_SECONDS
        while True:
            with httpx.Client() as http:
                health = http.get(f"http://127.0.0.1:{self.port}/health").json()
            time.sleep(0.2)
            found.places = health["in_flight"] + health["queued"]
            found.connections = max(0, self.sockets() - self.idle_sockets)
            if not found.places + found.connections or time.monotonic() > end:
                return

    def end(self, found: Found, number: signal.Signals = signal.SIGTERM) -> None:
        """End the process, and look at what it left in the ledger."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=120)
        found.wrong_exit = self.process.returncode != (0 if number == signal.SIGTERM else -number)
        found.tracebacks = errors.count("Traceback")
        with Ledger(self.folder / "ledger.db") as ledger:
            if number == signal.SIGKILL:
                ledger.expire_leases(FAR_FUTURE)
            states = Counter(hold.state for hold in ledger.holds())
            found.unknown = states["unknown"] if number == signal.SIGKILL else 0
            ended = states["posted"] + states["void"] + states["expired"] + found.unknown
            found.holds = states.total() - ended
            found.scopes = len({budget.name for budget in ledger.budgets()} - {"serve"})
            found.findings = len(ledger.check())


def write_catalogue(path: Path) -> None:
    entry = 'description = "d"\nkind = "scripted"\ncontext_length = 8192\ninput_price = 1\noutput_price = 1\n'
    slow = " ".join(f"w{number}" for number in range(WORDS)) + " The answer is 7."
    wide = " ".join("x" * 20_000 for _ in range(300))  # more than the buffers between two processes hold
    path.write_text(
        f'[models.slow]\n{entry}pause = {PAUSE}\ntext = "{slow}"\n[models.wide]\n{entry}text = "{wide}"\n'
    )


# --- clients ----------------------------------------------------------------------------------------------


def request(rng: random.Random, **fields: Any) -> bytes:
    """A whole request; half of them have a budget of their own."""
    body = {
        "model": rng.choice(MODELS),
        "messages": [{"role": "user", "content": f"What is {rng.randrange(1000)} + 1?"}],
        "max_tokens": WORDS + 20,
        **({"budget": 0.01} if rng.random() < 0.5 else {}),
        **fields,
    }
    content = json.dumps(body)
    return f"{HEAD}content-length: {len(content)}\r\n\r\n{content}".encode()


class Peer:
    """A connection of a client, over a plain socket."""

    def __init__(self, port: int, rng: random.Random) -> None:
        self.rng, self._loop = rng, asyncio.get_running_loop()
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self._port = port

    async def send(self, data: bytes) -> None:
        if self.socket.fileno() >= 0 and not self._is_connected():
            await self._loop.sock_connect(self.socket, ("127.0.0.1", self._port))
        await self._loop.sock_sendall(self.socket, data)

    def _is_connected(self) -> bool:
        try:
            self.socket.getpeername()
        except OSError:
            return False
        return True

    async def read(self, count: int) -> bytes:
        return await asyncio.wait_for(self._loop.sock_recv(self.socket, count), 60)

    async def pause(self, longest: float) -> None:
        await asyncio.sleep(self.rng.random() * longest)

    def close(self, *, reset: bool = False) -> None:
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


async def leave_in_head(peer: Peer) -> None:
    await peer.send(HEAD.encode()[: peer.rng.randrange(1, len(HEAD))])
    await peer.pause(0.5)


async def leave_in_body(peer: Peer) -> None:
    whole = request(peer.rng)
    await peer.send(whole[: -peer.rng.randrange(1, 50)])
    await peer.pause(0.5)


async def leave_before_answer(peer: Peer) -> None:
    await peer.send(request(peer.rng, stream=peer.rng.random() < 0.5))
    await peer.pause(1.5)


async def leave_in_stream(peer: Peer) -> None:
    await peer.send(request(peer.rng, stream=True, n=peer.rng.choice((1, 2))))
    for _ in range(peer.rng.randrange(1, 40)):
        if not await peer.read(200):
            return


async def say_nothing(peer: Peer) -> None:
    await peer.send(b"")
    await read_until_closed(peer)


async def send_head_in_drops(peer: Peer) -> None:
    await in_drops(peer, HEAD.encode() + b"x: y\r\n" * 1000)


async def send_body_in_drops(peer: Peer) -> None:
    await in_drops(
        peer, f"{HEAD}content-length: 100000\r\n\r\n".encode() + b" " * 90_000, first=len(HEAD) + 30
    )


async def in_drops(peer: Peer, data: bytes, first: int = 1) -> None:
    await peer.send(data[:first])
    for start in range(first, len(data)):
        await asyncio.sleep(0.2)
        await peer.send(data[start : start + 1])


async def read_nothing(peer: Peer) -> None:
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await peer.send(request(peer.rng, model="wide", max_tokens=400, stream=True))
    await asyncio.sleep(4 * PATIENCE)


async def read_in_drops(peer: Peer) -> None:
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await peer.send(request(peer.rng, model="wide", max_tokens=400, stream=True))
    for _ in range(20):
        await asyncio.sleep(0.4)
        if not await peer.read(10):
            return


async def read_until_closed(peer: Peer) -> None:
    while await peer.read(4096):
        pass


VANISHING = (leave_in_head, leave_in_body, leave_before_answer, leave_in_stream)
SLOW = (say_nothing, send_head_in_drops, send_body_in_drops, read_nothing, read_in_drops)
Way = Callable[[Peer], Awaitable[None]]


async def go(port: int, way: Way, rng: random.Random) -> str:
    """One client. Returns how it ended, as the client sees it."""
    peer = Peer(port, rng)
    try:
        await way(peer)
        return way.__name__
    except (OSError, TimeoutError) as error:
        return f"{way.__name__}: {type(error).__name__}"
    finally:
        peer.close(reset=rng.random() < 0.3)


async def ask(http: httpx.AsyncClient, url: str, number: int) -> bool:
    """An honest client. Returns whether it was answered in full."""
    body = {
        "model": MODELS[number % 2],
        "messages": [{"role": "user", "content": f"What is {number} + 1?"}],
        "stream": number % 3 == 0,
        "max_tokens": WORDS + 20,
    }
    try:
        response = await http.post(f"{url}/chat/completions", json=body)
    except httpx.HTTPError:
        return False
    return response.status_code == 200 and response.text.endswith(("}}", "data: [DONE]\n\n"))


async def crowd(
    server: ServerProcess,
    ways: tuple[Way, ...],
    clients: int,
    seed: int,
    honest: int,
    kill_after: float | None,
) -> tuple[dict[str, int], int]:
    """All clients at once. Returns how they ended, and how many honest ones were not served."""
    tasks = [
        asyncio.create_task(go(server.port, ways[number % len(ways)], random.Random(f"{seed} {number}")))
        for number in range(clients)
    ]
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        asked = [asyncio.create_task(ask(http, server.url, number)) for number in range(honest)]
        if kill_after is not None:
            await asyncio.sleep(kill_after)
            server.process.send_signal(signal.SIGTERM if seed % 2 else signal.SIGKILL)
        ends = Counter(await asyncio.gather(*tasks))
        served = await asyncio.gather(*asked)
    return dict(ends), 0 if kill_after is not None else honest - sum(served)


# --- the campaign -----------------------------------------------------------------------------------------


def campaign(folder: Path, ways: tuple[Way, ...], clients: int, seed: int) -> Found:
    """Clients of these ways beside honest ones, then SIGTERM of the idle server."""
    server, found = ServerProcess(folder), Found(clients)
    found.ends, found.unserved = asyncio.run(crowd(server, ways, clients, seed, HONEST, None))
    server.wait_until_idle(found)
    server.end(found)
    return found


def killed(folder: Path, number: signal.Signals, clients: int, seed: int) -> Found:
    """A signal while all kinds of clients are there; after SIGKILL the server starts again and answers."""
    server, found = ServerProcess(folder), Found(clients)
    seed = 2 * seed + (number == signal.SIGTERM)
    found.ends, _ = asyncio.run(crowd(server, (*VANISHING, *SLOW), clients, seed, HONEST, 1.5))
    server.end(found, number)
    if number == signal.SIGKILL:
        again, after = ServerProcess(folder), Found(0)
        _, found.unserved = asyncio.run(crowd(again, (), 0, seed, HONEST, None))
        again.wait_until_idle(after)
        again.end(after)
        found.places, found.connections = after.places, after.connections
        found.holds += max(0, after.holds - found.unknown)
    return found


def run(seed: int, clients: int = 300) -> tuple[bool, dict[str, Any]]:
    """The whole campaign. Returns whether nothing leaked, and the figures."""
    parts: dict[str, Callable[[Path], Found]] = {
        "vanishing clients": lambda folder: campaign(folder, VANISHING, clients, seed),
        "slow clients": lambda folder: campaign(folder, SLOW, clients, seed),
        "SIGTERM": lambda folder: killed(folder, signal.SIGTERM, clients // 3, seed),
        "SIGKILL": lambda folder: killed(folder, signal.SIGKILL, clients // 3, seed),
    }
    right, figures = True, dict[str, Any]()
    for name, part in parts.items():
        with tempfile.TemporaryDirectory() as folder:
            found = part(Path(folder))
        unknown = f"; {found.unknown} calls under way are unknown" if found.unknown else ""
        print(
            f"{name}: {found.clients} clients and {HONEST} honest ones; leaked: {found.leaks or 0}{unknown}"
        )
        right = right and not found.leaks
        figures[name] = {"clients": found.clients, "unknown": found.unknown, **found.leaks}
        figures[name]["ends"] = found.ends
    return right, figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    everything_right, numbers = run(args.seed, args.clients)
    print(json.dumps(numbers))
    sys.exit(not everything_right)
