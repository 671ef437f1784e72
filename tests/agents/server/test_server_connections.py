"""Connections that send or read slowly, or not at all, next to clients that ask."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from viaticum_server import RunningServer, chat_body, serving, wait_until, write_catalogue

from viaticum.agents.server.connections import allowed_connections
from viaticum.agents.server.run import Limits

PATIENCE = 0.6


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with serving(tmp_path, concurrency=2, stall_timeout=PATIENCE, connections=12) as server:
        yield server
        server.assert_settled()


def connect(server: RunningServer, first: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=120)
    client.sendall(first)
    return client


def is_closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        while client.recv(65536):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        client.setblocking(True)


def trickle_until_closed(client: socket.socket, part: bytes, seconds: float = 120.0) -> bytes:
    """Send a part every 50 ms. Returns all that came until the server closed the connection."""
    read, end = b"", time.monotonic() + seconds
    client.settimeout(0.05)
    while time.monotonic() < end:
        try:
            client.sendall(part)
            got = client.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            return read
        if not got:
            return read
        read += got
    raise AssertionError(f"the connection is still open after {seconds} s")


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize("first", [b"", b"GET /hea", HEAD], ids=["silent", "half a line", "half a head"])
def test_a_head_that_never_ends_holds_no_connection(server: RunningServer, first: bytes) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(server, first)) for _ in range(5)]
        wait_until(lambda: all(map(is_closed, clients)))


def test_a_head_in_drops_has_a_time_limit_from_its_first_byte(server: RunningServer) -> None:
    with connect(server, HEAD) as client:
        trickle_until_closed(client, b"x: y\r\n")
    with connect(server, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n") as client:
        assert b" 200 " in client.recv(65536)
        trickle_until_closed(client, b"x")  # the next head on the same connection


def test_as_many_silent_clients_as_connections_keep_nobody_out(tmp_path: Path) -> None:
    with serving(tmp_path, connections=12) as server, ExitStack() as stack:
        for number in range(40):
            stack.enter_context(connect(server, HEAD if number % 2 else b""))
        assert server.ask().status_code == 200
        assert len(server.uvicorn.server_state.connections) <= 12
        assert httpx.get(f"{server.url}/health", timeout=120).status_code == 200
        server.assert_settled()


def test_connections_that_all_work_are_kept_and_one_more_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, concurrency=3, connections=3) as server, ExitStack() as stack:
        slow: Any = server.client.model("slow")
        slow.pause = 0.1  # 30 seconds, of which the clients wait for few
        body = json.dumps(chat_body("slow", max_tokens=300)).encode()
        request = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
        busy = [stack.enter_context(connect(server, request)) for _ in range(3)]
        wait_until(lambda: server.service.limiter.running == 3)
        with connect(server, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n") as client:
            refused = b""
            while part := client.recv(65536):
                refused += part
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in refused
        assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["code"] == "overloaded"
        assert not any(map(is_closed, busy))
        for client in busy:
            client.close()
        server.assert_settled()


def test_after_a_408_a_body_in_drops_ends(server: RunningServer) -> None:
    with connect(server, HEAD + b"content-length: 100000\r\n\r\n{") as client:
        assert b" 408 " in trickle_until_closed(client, b" ")


def test_a_body_that_is_refused_unread_ends(server: RunningServer) -> None:
    with connect(server, HEAD + b"content-length: 100000000\r\n\r\n") as client:
        assert b" 413 " in trickle_until_closed(client, b" " * 1000)


def test_a_client_that_reads_no_answer_is_given_up(server: RunningServer) -> None:
    """Requests without end down one connection, whose answers nobody reads: no route waits for ever."""
    with connect(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(0.2)
        request = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
        for _ in range(2000):
            try:
                client.sendall(request)
            except (TimeoutError, OSError):
                break
        wait_until(lambda: not server.uvicorn.server_state.connections)
    wait_until(lambda: not server.uvicorn.server_state.tasks)


def test_a_client_that_leaves_in_its_body_is_no_mistake_of_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path) as server:
        with connect(server, HEAD + b"content-length: 100\r\n\r\n{"):
            wait_until(lambda: len(server.uvicorn.server_state.tasks) == 1)
        wait_until(lambda: not server.uvicorn.server_state.tasks)
        assert not caplog.records
        assert 'viaticum_requests_total{model="unknown",status="499"} 1.0' in server.http.get("/metrics").text
        server.assert_settled()


def test_clients_that_read_in_drops_keep_nobody_out(tmp_path: Path) -> None:
    """Their requests are whole, and they read something all the time: at the limit the slowest makes room."""
    with serving(tmp_path, connections=4) as server, ExitStack() as stack:
        request = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
        readers = [stack.enter_context(connect(server)) for _ in range(4)]
        for reader in readers:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.settimeout(0.2)
            with suppress(TimeoutError):
                for _ in range(2000):
                    reader.sendall(request)
        wait_until(
            lambda: all(
                each.transport.get_write_buffer_size() for each in server.uvicorn.server_state.connections
            )
        )
        time.sleep(0.6)  # they are looked over twice a second
        for reader in readers:
            reader.recv(1)
        assert httpx.get(f"{server.url}/health", timeout=120).status_code == 200


CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),  # the first bytes of TLS
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", b"400"),
        (HEAD + b"content-length: -1\r\n\r\n{}", b"400"),
        (CHUNKED + b"zz\r\n{}\r\n", b"400"),
        (CHUNKED + b"ffffffffffffffffffffff\r\n{}\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n\x00\x00\r\n\r\n", b"200"),
        (
            b"GET /health HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
            b"200",
        ),
        (b"GET /%ff%00%0a HTTP/1.1\r\nhost: localhost\r\n\r\n", b"404"),
        (b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n", b"404"),
        (b"HEAD /health HTTP/1.1\r\nhost: localhost\r\n\r\n", b"200"),
    ],
)
def test_bytes_that_are_no_request_end_without_a_traceback(
    server: RunningServer, caplog: pytest.LogCaptureFixture, sent: bytes, status: bytes
) -> None:
    with connect(server, sent) as client:
        assert client.recv(65536).startswith(b"HTTP/1.1 " + status)
    with connect(server, sent) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    wait_until(lambda: not server.uvicorn.server_state.connections)
    assert not any(record.exc_info for record in caplog.records), caplog.text
    assert not any(record.levelname == "ERROR" for record in caplog.records), caplog.text


def test_garbage_after_a_request_that_runs_ends_it(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.dumps(chat_body("slow", stream=True)).encode()
    whole = HEAD + b"content-length: %d\r\n\r\n" % len(content) + content
    for _ in range(2):
        with connect(server, whole) as client:
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
            client.sendall(b"\x00\x01\r\n\r\n" * 10)
            time.sleep(0.1)
        server.assert_settled()
    assert not any(record.exc_info for record in caplog.records), caplog.text


def test_small_writes_are_sent_at_once(server: RunningServer) -> None:
    with connect(server, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n") as client:
        assert b" 200 " in client.recv(65536)
        (connection,) = server.uvicorn.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), "dead peers are noticed"


def test_connections_stay_below_the_descriptors() -> None:
    limits = Limits(connections=1000, concurrency=8)
    assert allowed_connections(limits, descriptors=20_000) == 1000
    few = allowed_connections(limits, descriptors=256)
    assert 80 <= few <= 200
    assert allowed_connections(limits, descriptors=64) >= 1


def test_a_flood_of_connections_leaves_descriptors_for_the_server(tmp_path: Path) -> None:
    """More clients than descriptors, against a process that may open 200: it answers, without a traceback."""
    write_catalogue(tmp_path)
    command = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200));"
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", f"{command} from viaticum.cli import main; main()", "serve"),
            *("--port", "0", "--json", "--folder", str(tmp_path)),
            *("--catalogue", str(tmp_path / "catalogue.toml")),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        url = json.loads(line)["url"]
        port = int(url.rpartition(":")[2].partition("/")[0])
        with ExitStack() as stack:
            for number in range(300):
                client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=120))
                client.sendall(HEAD if number % 2 else b"")
            response = httpx.post(f"{url}/chat/completions", json=chat_body(), timeout=120)
            assert response.status_code == 200
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "out of system resource" not in errors
