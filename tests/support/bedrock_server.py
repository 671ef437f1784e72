"""A server on a loopback port in the form of Amazon Bedrock's runtime: Converse and InvokeModel, and streams.

It answers any question with a few words, and reports their tokens as Bedrock does.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from forms_server import broken, left
from openai_server import served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

READ, WRITTEN = 12, 5


@dataclass
class BedrockServer:
    """calls: operation and body of each request. script: statuses of the next ones, then 200; "stall" answers
    when the client has left, "drop" breaks the connection.

    usage: what it reports; None for nothing.
    """

    port: int = 0
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    script: list[Any] = field(default_factory=list)
    usage: dict[str, int] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        self.calls, self.script = [], []
        self.usage = {"inputTokens": READ, "outputTokens": WRITTEN, "totalTokens": READ + WRITTEN}

    async def answer(self, request: Request) -> Response:
        operation = request.path_params["operation"]
        self.calls.append((operation, await request.json()))
        status = self.script.pop(0) if self.script else 200
        if status == "stall":
            await left(request)
        if status == "drop":
            return StreamingResponse(broken(), media_type="application/json")
        if status not in (200, "stall"):
            headers = {"x-amzn-errortype": "ThrottlingException"}
            return JSONResponse({"message": "slow down"}, status, headers)
        response: Response = getattr(self, "_" + operation.replace("-", "_"))()
        return response

    def _converse(self) -> Response:
        message = {"role": "assistant", "content": [{"text": "It is four."}]}
        usage = {"usage": self.usage} if self.usage is not None else {}
        return JSONResponse(
            {"output": {"message": message}, "stopReason": "end_turn", "metrics": {"latencyMs": 1}, **usage}
        )

    def _converse_stream(self) -> Response:
        events = [
            ("messageStart", {"role": "assistant"}),
            *[
                ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": t}})
                for t in ("It is ", "four.")
            ],
            ("messageStop", {"stopReason": "end_turn"}),
        ]
        if self.usage is not None:
            events.append(("metadata", {"usage": self.usage, "metrics": {"latencyMs": 1}}))
        return _stream(events)

    def _invoke(self) -> Response:
        usage = {"usage": {"input_tokens": READ, "output_tokens": WRITTEN}} if self.usage is not None else {}
        text = {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "text", "text": "four"}],
            **usage,
        }
        headers = {"x-amzn-bedrock-input-token-count": "13", "x-amzn-bedrock-output-token-count": "6"}
        return JSONResponse(text, 200, headers)

    def _invoke_with_response_stream(self) -> Response:
        start = {"type": "message_start", "message": {"usage": {"input_tokens": READ, "output_tokens": 1}}}
        delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "four"}}
        end = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": WRITTEN}}
        return _stream(
            [
                ("chunk", {"bytes": base64.b64encode(json.dumps(each).encode()).decode()})
                for each in (start, delta, end, {"type": "message_stop"})
            ]
        )


def _stream(events: list[tuple[str, dict[str, Any]]]) -> Response:
    async def body() -> Any:
        for name, payload in events:
            yield event(name, payload)

    return StreamingResponse(body(), media_type="application/vnd.amazon.eventstream")


def event(name: str, payload: dict[str, Any]) -> bytes:
    """An event in Amazon's binary form: lengths and checksums around headers and a payload."""
    pairs = {":message-type": "event", ":event-type": name, ":content-type": "application/json"}
    headers = b"".join(
        bytes([len(key)]) + key.encode() + b"\x07" + struct.pack(">H", len(value)) + value.encode()
        for key, value in pairs.items()
    )
    data = json.dumps(payload).encode()
    prelude = struct.pack(">II", 16 + len(headers) + len(data), len(headers))
    whole = prelude + struct.pack(">I", zlib.crc32(prelude)) + headers + data
    return whole + struct.pack(">I", zlib.crc32(whole))


@contextmanager
def running_bedrock() -> Iterator[BedrockServer]:
    server = BedrockServer()
    server.reset()
    app = Starlette(routes=[Route("/model/{model}/{operation}", server.answer, methods=["POST"])])
    with served(app) as server.port:
        yield server
