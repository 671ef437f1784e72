"""A server on a loopback port in the forms of five APIs: Anthropic's messages, OpenAI's responses, embeddings
and chat completions, Gemini's own. It answers any question with a few words and counts what it was asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import anthropic
import openai
from openai_server import served
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class FormsServer:
    """calls: the path and body of each request. read, written: tokens that it reports of an answer.

    script: statuses of the next requests, then 200; "drop" breaks the connection, "stall" answers when the
    client has left. away: models that answer
    with status 503. pause: seconds between the events of a stream. reply: makes the message of a chat
    completion from the request's body; by default a few words.
    """

    port: int = 0
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    read: int = 12
    written: int = 5
    script: list[Any] = field(default_factory=list)
    pause: float = 0.0
    reply: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    away: frozenset[str] = frozenset()
    moved: str = ""  # the path that others are sent on to
    clients: ExitStack = field(default_factory=ExitStack)  # closed after each test

    def reset(self) -> None:
        self.calls, self.script, self.read, self.written, self.pause = [], [], 12, 5, 0.0
        self.reply, self.away, self.moved = None, frozenset(), ""

    def openai(self, **more: Any) -> openai.OpenAI:
        """A client of OpenAI's SDK for this server."""
        return self.clients.enter_context(openai.OpenAI(api_key="k", base_url=f"{self.url}/v1", **more))

    def anthropic(self, **more: Any) -> anthropic.Anthropic:
        """A client of Anthropic's SDK for this server."""
        return self.clients.enter_context(anthropic.Anthropic(api_key="k", base_url=self.url, **more))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, request: Request) -> Response:
        body = await request.json() if "json" in request.headers.get("content-type", "") else {}
        path = request.url.path
        self.calls.append((path, body))
        if self.moved and path != self.moved:
            return Response(status_code=307, headers={"location": self.moved})
        status = self.script.pop(0) if self.script else 200
        if status == "drop":
            return StreamingResponse(broken(), media_type="application/json")
        if status == "stall":
            await left(request)
            status = 200
        status = 503 if body.get("model") in self.away else status
        if status != 200:
            return JSONResponse({"error": {"message": "not now", "type": "busy"}}, status_code=status)
        if path.endswith("Content"):
            return self.gemini(path, request.query_params.get("alt") == "sse")
        api = path.rpartition("/")[2]
        if api not in ("messages", "responses", "embeddings", "completions"):
            return JSONResponse({"id": "x"})
        if body.get("stream"):
            return StreamingResponse(self.events(api, body), media_type="text/event-stream")
        return JSONResponse(getattr(self, api)(body))

    def gemini(self, path: str, events: bool) -> Response:
        """Gemini's form: whole, as events, or a stream that is one list. Usage grows from piece to piece."""
        pieces = ["It is four."] if path.endswith(":generateContent") else ["It ", "is ", "four."]
        answers = []
        for number, text in enumerate(pieces, 1):
            is_last = number == len(pieces)
            candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "index": 0}
            thoughts, written = 2, self.written - 2 if is_last else 1
            usage = {
                "promptTokenCount": self.read,
                "cachedContentTokenCount": 4,
                "candidatesTokenCount": written,
                "thoughtsTokenCount": thoughts,
                "totalTokenCount": self.read + written + thoughts,
            }
            end = {"finishReason": "STOP"} if is_last else {}
            answers.append({"candidates": [candidate | end], "usageMetadata": usage, "modelVersion": "small"})
        if events:
            text = "".join(f"data: {json.dumps(each)}\r\n\r\n" for each in answers)
            return Response(text, media_type="text/event-stream")
        return JSONResponse(answers[0] if len(answers) == 1 else answers)

    def messages(self, body: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": [{"type": "text", "text": "It is four."}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {
                "input_tokens": self.read - 4,
                "output_tokens": self.written,
                "cache_read_input_tokens": 4,
                "cache_creation_input_tokens": 0,
            },
        }

    def responses(self, body: dict[str, Any]) -> dict[str, Any]:
        text = {"type": "output_text", "text": "It is four.", "annotations": []}
        return {
            "id": f"resp_{len(self.calls)}",
            "object": "response",
            "created_at": 1,
            "model": body["model"],
            "status": "completed",
            "output": [
                {"id": "rs_1", "type": "reasoning", "summary": []},
                {
                    "id": "m1",
                    "type": "message",
                    "role": "assistant",
                    "status": "completed",
                    "content": [text],
                },
            ],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": {
                "input_tokens": self.read,
                "output_tokens": self.written,
                "total_tokens": self.read + self.written,
                "input_tokens_details": {"cached_tokens": 4},
                "output_tokens_details": {"reasoning_tokens": 2},
            },
        }

    def embeddings(self, body: dict[str, Any]) -> dict[str, Any]:
        inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
        return {
            "object": "list",
            "model": body["model"],
            "data": [{"object": "embedding", "index": n, "embedding": [0.5]} for n in range(len(inputs))],
            "usage": {"prompt_tokens": self.read, "total_tokens": self.read},
        }

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": self.reply(body) if self.reply else {"role": "assistant", "content": "It is four."},
            "finish_reason": "stop",
        }
        return {
            "id": "c1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [choice],
            "usage": self.chat_usage,
        }

    @property
    def chat_usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.read,
            "completion_tokens": self.written,
            "total_tokens": self.read + self.written,
            "prompt_tokens_details": {"cached_tokens": 4},
        }

    async def events(self, api: str, body: dict[str, Any]) -> AsyncIterator[str]:
        for name, value in self.event_values(api, body):
            await asyncio.sleep(self.pause)
            yield (f"event: {name}\n" if name else "") + f"data: {json.dumps(value)}\n\n"
        if api == "completions":
            yield "data: [DONE]\n\n"

    def event_values(self, api: str, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        if api == "messages":
            start = self.messages(body) | {"content": [], "stop_reason": None}
            start["usage"] = {**start["usage"], "output_tokens": 1}
            yield "message_start", {"type": "message_start", "message": start}
            block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
            yield "content_block_start", block
            for word in ("It ", "is ", "four."):
                delta = {"type": "text_delta", "text": word}
                yield "content_block_delta", {"type": "content_block_delta", "index": 0, "delta": delta}
            yield "content_block_stop", {"type": "content_block_stop", "index": 0}
            yield (
                "message_delta",
                {
                    "type": "message_delta",
                    "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                    "usage": {"output_tokens": self.written},
                },
            )
            yield "message_stop", {"type": "message_stop"}
        elif api == "responses":
            done = self.responses(body)
            begun = {**done, "output": [], "usage": None, "status": "in_progress"}
            yield "response.created", {"type": "response.created", "sequence_number": 0, "response": begun}
            yield (
                "response.output_text.delta",
                {
                    "type": "response.output_text.delta",
                    "sequence_number": 1,
                    "item_id": "m1",
                    "output_index": 1,
                    "content_index": 0,
                    "delta": "It is four.",
                    "logprobs": [],
                },
            )
            yield "response.completed", {"type": "response.completed", "sequence_number": 2, "response": done}
        else:
            chunk = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
            deltas = [{"role": "assistant", "content": word} for word in ("It ", "is ", "four.")]
            for delta in [self.reply(body)] if self.reply else deltas:
                for number, call in enumerate(delta.get("tool_calls") or ()):
                    call["index"] = number
                yield "", {**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
            yield "", {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
            if (body.get("stream_options") or {}).get("include_usage"):
                yield "", {**chunk, "choices": [], "usage": self.chat_usage}


async def broken() -> AsyncIterator[str]:
    yield '{"id": "c1", "choices": ['
    await asyncio.sleep(0.05)
    raise ConnectionError("the server drops the connection")


async def left(request: Request) -> None:
    """Wait until the client has left, at most ten seconds."""
    for _ in range(500):
        if await request.is_disconnected():
            return
        await asyncio.sleep(0.02)


@contextmanager
def running_forms() -> Iterator[FormsServer]:
    """The server on a free port, in a thread of its own."""
    state = FormsServer()
    app = Starlette(
        routes=[Route("/{path:path}", state.answer, methods=["POST"])],
        middleware=[Middleware(GZipMiddleware, minimum_size=10)],
    )
    with served(app) as state.port:
        yield state
