"""A server on a loopback port that speaks OpenAI's chat API, for tests of whatever talks to one.

It answers by rules: tools are called, with arguments generated from their schemas; a response format is
followed; otherwise it echoes the last message. A script of behaviours, one a request, makes it fail in the
ways of servers.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from viaticum.catalogue import ModelSpec

KEY = "sk-right"


@dataclass
class OpenAIServer:
    """script: behaviours of the next requests, then "ok". requests: bodies in the order they came.

    foreign: bodies of requests in the form of another provider, which are refused.
    """

    port: int = 0
    script: list[Any] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    received_headers: list[dict[str, str]] = field(default_factory=list)
    foreign: list[dict[str, Any]] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)
    pause: float = 0.0  # seconds before each piece of a stream
    thought_pause: float = 0.0  # the same, of a thought
    text: str | None = None
    usage: dict[str, Any] | None = None  # laid over the usage it reports
    usages: list[dict[str, Any]] = field(default_factory=list)  # in its place, in chunks of their own
    headers: dict[str, str] = field(default_factory=dict)  # of its answers
    # What it thinks first, and how it shows that: the name of a field, "tags", "closing tag", or "unclosed".
    thought: str | None = None
    thought_as: str = "reasoning_content"
    # Of a stream in place of its message, and then its finish reason.
    deltas: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    piece: int | None = None  # characters in a piece of a stream; by default a word

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def reset(self) -> None:
        self.script, self.requests, self.pause, self.text, self.usage = [], [], 0.0, None, None
        self.foreign = []
        self.usages, self.received_headers, self.deltas, self.finish = [], [], [], None
        self.thought_pause = 0.0
        self.headers, self.thought, self.thought_as, self.piece = {}, None, "reasoning_content", None
        self.hung_up.clear()

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.received_headers.append(dict(request.headers))
        behaviour = self.script.pop(0) if self.script else "ok"
        if request.headers.get("authorization") not in (f"Bearer {KEY}", "Bearer none"):
            return error(
                401, f"Incorrect API key provided: {request.headers.get('authorization')}.", "invalid_api_key"
            )
        if isinstance(behaviour, tuple):
            status, headers, message = behaviour
            return error(status, message, headers=headers)
        if behaviour == "silent":
            for _ in range(2400):  # two minutes
                if await request.is_disconnected():
                    self.hung_up.set()
                    break
                await asyncio.sleep(0.05)
            return error(500, "woke up")
        if behaviour == "drop":
            raise ConnectionError("the server drops the connection")
        message, finish = self.answer(body)
        if behaviour == "filtered":
            message, finish = {"role": "assistant", "content": ""}, "content_filter"
        if self.thought is not None:
            finish = self.think(message, finish)
        usage: dict[str, Any] | None = {
            "prompt_tokens": sum(len(str(each.get("content") or "").split()) for each in body["messages"]),
            "completion_tokens": max(1, len(f"{message['content'] or ''} {self.field_thought}".split())),
        }
        assert usage is not None
        usage |= {"total_tokens": sum(usage.values())} | (self.usage or {})
        if behaviour == "no usage":
            usage = None
        if body.get("stream"):
            pieces = self.pieces(body, message, finish, usage, behaviour)
            return WatchedStream(self, pieces, media_type="text/event-stream", headers=self.headers)
        whole = {
            "id": "c1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs(body, message)}
            ],
        }
        if self.usages:
            whole["usage"] = self.usages[-1]
        elif usage:
            whole["usage"] = usage
        return JSONResponse(whole, headers=self.headers)

    async def refuse(self, request: Request) -> Response:
        self.foreign.append(await request.json())
        return error(400, "another provider's form")

    async def pieces(
        self, body: dict[str, Any], message: dict[str, Any], finish: str, usage: Any, behaviour: str
    ) -> AsyncIterator[str]:
        def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
            choice = {
                "index": 0,
                "delta": delta,
                "finish_reason": finish,
                "logprobs": more.pop("logprobs", None),
            }
            chunk = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
            return f"data: {json.dumps({**chunk, 'choices': [choice], **more})}\n\n"

        ended = False
        try:
            yield event({"role": "assistant", "content": ""})
            while behaviour == "comments":  # as gateways keep a connection alive
                yield ": still there\n\n"
                await asyncio.sleep(0.05)
            if behaviour == "break at once":
                raise ConnectionError("the server breaks off before its first word")
            for part in self.cut(self.field_thought):
                await asyncio.sleep(self.thought_pause)
                yield event({self.thought_as: self.thought_value(part)})
            for index, word in enumerate(self.cut("" if self.deltas else message["content"] or "")):
                await asyncio.sleep(self.pause)
                if behaviour == "break" and index == 2:
                    raise ConnectionError("the server breaks off")
                if behaviour == "end early" and index == 2:
                    return
                yield event({"content": word}, logprobs=logprobs(body, {"content": word}))
            for index, call in enumerate(message.get("tool_calls") or ()):
                arguments = call["function"]["arguments"]
                first = {
                    **call,
                    "index": index,
                    "function": {"name": call["function"]["name"], "arguments": ""},
                }
                yield event({"tool_calls": [first]})
                for start in range(0, len(arguments), 5):
                    await asyncio.sleep(self.pause)
                    part = {"index": index, "function": {"arguments": arguments[start : start + 5]}}
                    yield event({"tool_calls": [part]})
            for delta in self.deltas:
                yield event(delta)
            yield event({}, self.finish or finish)
            wanted = (body.get("stream_options") or {}).get("include_usage")
            for each in (self.usages or ([usage] if usage else [])) if wanted else ():
                chunk = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
                yield f"data: {json.dumps({**chunk, 'choices': [], 'usage': each})}\n\n"
            yield "data: [DONE]\n\n"
            ended = True
        finally:
            if not ended:
                self.hung_up.set()

    @property
    def field_thought(self) -> str:
        """The thought, where it comes in a field of its own."""
        return "" if self.thought_as in ("tags", "closing tag", "unclosed") else self.thought or ""

    def cut(self, text: str) -> list[str]:
        if self.piece:
            return [text[start : start + self.piece] for start in range(0, len(text), self.piece)]
        return re.findall(r"\S+\s*|\s+", text)

    def thought_value(self, part: str) -> Any:
        if self.thought_as == "reasoning_details":
            return [{"type": "reasoning.text", "text": part}]
        return [{"type": "thinking", "thinking": part}] if self.thought_as == "thinking_blocks" else part

    def think(self, message: dict[str, Any], finish: str) -> str:
        """Put the thought into the message; returns the finish reason."""
        text = message["content"] or ""
        if self.thought_as == "tags":
            message["content"] = f"<think>\n{self.thought}\n</think>\n\n{text}"
        elif self.thought_as == "closing tag":
            message["content"] = f"{self.thought}\n</think>\n\n{text}"
        elif self.thought_as == "unclosed":
            message["content"] = f"<think>\n{self.thought}"
            return "length"
        else:
            message[self.thought_as] = self.thought_value(self.thought or "")
        return finish

    def answer(self, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The message, and why it ended."""
        messages, tools = body["messages"], body.get("tools") or []
        question = (
            next((m for m in reversed(messages) if m["role"] == "user"), {"content": ""})["content"] or ""
        )
        choice = body.get("tool_choice", "auto")
        wanted = choice["function"]["name"] if isinstance(choice, dict) else None
        may_call = (
            tools and choice != "none" and (messages[-1]["role"] != "tool" or wanted or choice == "required")
        )
        if may_call:
            tool = next(t for t in tools if wanted in (None, t["function"]["name"]))["function"]
            arguments = example_value(tool.get("parameters", {}), question)
            call = {
                "id": f"call_{len(self.requests)}",
                "type": "function",
                "function": {"name": tool["name"], "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            return {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"
        form = body.get("response_format") or {}
        if form.get("type") == "json_schema":
            text = json.dumps(example_value(form["json_schema"]["schema"], question))
        elif form.get("type") == "json_object":
            text = json.dumps({"setup": "Why do cats purr?", "punchline": "Because they can."})
        else:
            text = self.text if self.text is not None else f"you said: {question}"
        for stop in body.get("stop") or ():
            text = text.split(stop)[0]
        words = re.findall(r"\S+\s*", text)
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 10_000
        if len(words) > limit:
            return {"role": "assistant", "content": "".join(words[:limit])}, "length"
        return {"role": "assistant", "content": text}, "stop"


class WatchedStream(StreamingResponse):
    """A stream whose client may hang up before its first piece is made."""

    def __init__(self, state: OpenAIServer, pieces: AsyncIterator[str], **options: Any) -> None:
        self.state, self.begun = state, False
        super().__init__(self.watched(pieces), **options)

    async def watched(self, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
        self.begun = True
        async for piece in pieces:
            yield piece

    async def __call__(self, *arguments: Any) -> None:
        try:
            await super().__call__(*arguments)
        finally:
            if not self.begun:
                self.state.hung_up.set()


def example_value(schema: dict[str, Any], question: str, root: dict[str, Any] | None = None) -> Any:
    """A value that fits a JSON schema, numbers and texts taken from the question."""
    root = root or schema
    if "$ref" in schema:
        return example_value(root["$defs"][schema["$ref"].rpartition("/")[2]], question, root)
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return example_value(schema["anyOf"][0], question, root)
    kind = schema.get("type", "object")
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: example_value(each, question, root) for name, each in properties.items()}
    if kind == "array":
        return [example_value(schema.get("items", {"type": "string"}), question, root)]
    if kind in ("integer", "number"):
        found = re.search(r"-?\d+", question)
        return int(found.group()) if found else 1
    return True if kind == "boolean" else (question or "words")


def logprobs(body: dict[str, Any], message: dict[str, Any]) -> dict[str, Any] | None:
    if not body.get("logprobs"):
        return None
    words = re.findall(r"\S+\s*", message["content"] or "")
    return {"content": [{"token": w, "logprob": -0.5, "bytes": None, "top_logprobs": []} for w in words]}


def error(
    status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    body = {"error": {"message": message, "type": "error", "code": code, "param": None}}
    return JSONResponse(body, status_code=status, headers=headers)


@contextmanager
def running_server(state: OpenAIServer | None = None) -> Iterator[OpenAIServer]:
    """The server, or one with other answers, on a free port, in a thread of its own."""
    state = state or OpenAIServer()
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", state.chat, methods=["POST"]),
            Route("/{path:path}", state.refuse, methods=["POST"]),
        ]
    )
    with served(app) as state.port:
        yield state


@contextmanager
def served(app: Starlette) -> Iterator[int]:
    """An app on a free port, in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()


def spec_for(server: OpenAIServer, **fields: object) -> ModelSpec:
    """The server as a remote model of the catalogue, through LiteLLM."""
    settings = {
        "name": "far",
        "description": "Far away.",
        "kind": "remote",
        "context_length": 10_000,
        "input_price": "1",
        "output_price": "2",
        "litellm_model": "openai/fake",
        "api_base": server.url,
    }
    return ModelSpec.model_validate(settings | fields)
