"""Ways to a provider on which calls are not held: Python's own HTTP client, urllib3 (requests), WebSockets.

What they send to a known provider is told at the end of a budget, or refused with a `ConnectionError`. Leaves
out gRPC.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from viaticum.agents.instrumentation.holding import tell, telling
from viaticum.errors import MissingExtra

try:
    import wrapt
except ImportError:
    raise MissingExtra("wrapt", "remote") from None


def install() -> None:
    """Put the hooks in place, now or when a library is imported."""
    wrapt.register_post_import_hook(_watch_urllib3, "urllib3.connectionpool")
    wrapt.register_post_import_hook(_watch_http_client, "http.client")
    wrapt.register_post_import_hook(_watch_sync_websockets, "websockets.sync.client")
    wrapt.register_post_import_hook(_watch_websockets, "websockets.asyncio.client")


def _watch_urllib3(module: ModuleType) -> None:
    def urlopen(wrapped: Any, pool: Any, args: Any, options: Any) -> Any:
        verb = args[0] if args else options["method"]
        path = args[1] if len(args) > 1 else options.get("url", "/")
        url = path if path.startswith("http") else f"{pool.scheme}://{pool.host}{path}"
        with telling("urllib3", verb, url):
            return wrapped(*args, **options)

    wrapt.wrap_function_wrapper(module, "HTTPConnectionPool.urlopen", urlopen)


def _watch_http_client(module: ModuleType) -> None:
    def putrequest(wrapped: Any, connection: Any, args: Any, options: Any) -> Any:
        verb = args[0] if args else options["method"]
        path = args[1] if len(args) > 1 else options["url"]
        host = getattr(connection, "_tunnel_host", None) or connection.host  # through a proxy
        tell("http.client", verb, path if path.startswith("http") else f"https://{host}{path}")
        return wrapped(*args, **options)

    wrapt.wrap_function_wrapper(module, "HTTPConnection.putrequest", putrequest)


def _watch_sync_websockets(module: ModuleType) -> None:
    def connect(wrapped: Any, instance: Any, args: Any, options: Any) -> Any:
        with telling("websockets", "WebSocket", str(args[0] if args else options["uri"])):
            return wrapped(*args, **options)

    wrapt.wrap_function_wrapper(module, "connect", connect)


def _watch_websockets(module: ModuleType) -> None:
    def init(wrapped: Any, instance: Any, args: Any, options: Any) -> Any:
        tell("websockets", "WebSocket", str(args[0] if args else options["uri"]))
        return wrapped(*args, **options)

    wrapt.wrap_function_wrapper(module, "connect.__init__", init)
