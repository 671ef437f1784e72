"""A proxy on a loopback port for programs whose calls cannot be held inside them.

It passes requests on to the provider with their own keys, through a client of this process, whose calls are
held. Nothing is stored or logged.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

# By the first part of a path: the variable that names another server, and the provider's own.
_UPSTREAMS = {
    "openai": (("OPENAI_BASE_URL", "OPENAI_API_BASE"), "https://api.openai.com/v1"),
    "anthropic": (("ANTHROPIC_BASE_URL",), "https://api.anthropic.com"),
}
_OF_CONNECTION = frozenset(
    ("host", "connection", "keep-alive", "transfer-encoding", "content-length", "accept-encoding", "upgrade")
)
_OF_BODY = frozenset(("content-length", "content-encoding", "transfer-encoding", "connection", "keep-alive"))


@contextmanager
def running_proxy() -> Iterator[dict[str, str]]:
    """A running proxy: its addresses, by the variables of the environment that clients read."""
    upstreams = {
        name: next(filter(None, map(os.environ.get, variables)), default)
        for name, (variables, default) in _UPSTREAMS.items()
    }
    with httpx.Client(timeout=httpx.Timeout(600, connect=30)) as client:

        class Handler(_Handler):
            pass

        Handler.client, Handler.upstreams = client, upstreams
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield {
                variable: f"{address}/{name}"
                for name, (variables, _) in _UPSTREAMS.items()
                for variable in variables
            }
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    client: httpx.Client
    upstreams: Mapping[str, str]
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length) if length else b""
        name, _, rest = self.path.removeprefix("/").partition("/")
        upstream = self.upstreams.get(name)
        if upstream is None:
            self.send_error(404)
            return
        headers = [(key, value) for key, value in self.headers.items() if key.lower() not in _OF_CONNECTION]
        request = self.client.build_request(
            self.command, f"{upstream.rstrip('/')}/{rest}", headers=headers, content=body
        )
        try:
            response = self.client.send(request, stream=True)
        except httpx.HTTPError as error:
            self.send_error(502, f"the provider cannot be reached: {type(error).__name__}")
            return
        with suppress(ConnectionError):  # the program has left
            try:
                self._answer(response)
            finally:
                response.close()

    def _answer(self, response: httpx.Response) -> None:
        self.send_response(response.status_code)
        for key, value in response.headers.items():
            if key.lower() not in _OF_BODY:
                self.send_header(key, value)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            for piece in response.iter_bytes():
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                self.wfile.flush()
        except httpx.HTTPError:
            self.close_connection = True  # the answer broke off; so does ours
            return
        self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = _pass_on

    def log_message(self, format: str, *args: object) -> None:
        pass
