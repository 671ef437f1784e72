"""An `x-request-id` on every response, also on errors: the client's own, or a new one.

Leaves out what is logged (`agents.server.run`).
"""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from viaticum.agents.server.run import REQUEST_ID

HEADER = "x-request-id"
ANTHROPIC_HEADER = "request-id"  # where Anthropic's clients read it
_PLAIN = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


def new_request_id() -> str:
    return f"req_{uuid.uuid4().hex}"


class RequestIds:
    """An ASGI application with a request id on what another one answers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _PLAIN.fullmatch(given) else new_request_id()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[HEADER] = headers[ANTHROPIC_HEADER] = request_id
            await send(message)

        REQUEST_ID.set(request_id)
        await self.app(scope, receive, send_with_id)
