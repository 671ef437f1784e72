"""A provider with batches on a loopback port: OpenAI's files and batches, Anthropic's message batches.

It answers "What is N + 2?" and counts what it bills: of a batch the requests that it has answered, whatever
becomes of the batch, and every direct call. Batches go through the states of the real ones as time passes.
"""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

from viaticum.catalogue import ModelSpec

Fate = str  # of a request: "ok", "error", "expired", "no usage", "no line", "unreadable"
INPUT_TOKENS, OUTPUT_TOKENS = 20, 5
BILLED = ("ok", "no usage", "no line", "unreadable")


@dataclass
class StubBatch:
    """One batch. Its stages last `pace` seconds each: validating, in progress (two), finalizing."""

    id: str
    form: str
    requests: list[tuple[str, dict[str, Any]]]
    metadata: dict[str, str]
    pace: float
    input_file: str = ""
    window: str = ""
    began: float = field(default_factory=time.monotonic)
    created: float = field(default_factory=time.time)
    stays: bool = False  # in progress until it is cancelled
    failure: tuple[str, str] | None = None  # code and message
    expires: bool = False  # at the end some requests are not answered
    stopped: float | None = None  # when it was cancelled
    looks: int = 0

    def age(self, now: float | None = None) -> float:
        return ((now or time.monotonic()) - self.began) / self.pace

    @property
    def status(self) -> str:
        if self.stopped is not None:
            gone = (time.monotonic() - self.stopped) / self.pace
            return "cancelling" if gone < 1 else "cancelled"
        age = self.age()
        if age < 1:
            return "validating"
        if self.failure is not None:
            return "failed"
        if age < 3 or self.stays:
            return "in_progress"
        if age < 4:
            return "finalizing"
        return "expired" if self.expires else "completed"

    @property
    def answered(self) -> int:
        """Requests that it is through with, in the order of the file."""
        now = self.stopped if self.stopped is not None else time.monotonic()
        share = min(1.0, max(0.0, (self.age(now) - 1) / 2))
        if self.failure is not None:
            return 0
        share = min(share, 0.5) if self.stays or self.expires else share
        return int(share * len(self.requests))

    @property
    def is_through(self) -> bool:
        return self.status in ("completed", "expired", "cancelled", "failed")


class BatchProvider(ThreadingHTTPServer):
    """The server.

    Args:
        pace: seconds of a stage of a batch.
        fate: of a request, by the number in its question.

    Attributes:
        faults: for requests by method and path, what happens to the next ones: a status, or "hang up" (the
            work is done, the answer never comes).
        changes: applied to the next batches as they are made.
        unsupported: models that batches are not made for. full: most requests that wait at once.
        paid: what is billed, by (way, model, number in the question); ways are "batch" and "direct".
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, pace: float = 0.1, fate: Callable[[int], Fate] = lambda number: "ok") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pace, self.fate, self.lock = pace, fate, threading.RLock()
        self.faults: dict[str, list[Any]] = {}
        self.changes: list[dict[str, Any]] = []
        self.unsupported: set[str] = set()
        self.full: int | None = None
        self.listed_after = 0.0  # seconds until a batch is in the list
        self.files: dict[str, bytes] = {}
        self.file_names: dict[str, str] = {}
        self.batches: dict[str, StubBatch] = {}
        self.direct = Counter[tuple[str, int]]()
        self.log: list[str] = []
        self.repeats = True  # some lines of results are there twice
        self.pause = 0.0  # of a direct call
        self.may_answer: Callable[[], bool] = lambda: True  # direct calls wait for it, a minute at most
        self.first_answer: float | None = None  # Unix time of the first one
        self.archived = False  # the results of Anthropic's batches that have ended are removed
        self._ids = count(1)
        self._connections: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def shutdown(self) -> None:
        """Hang up on everyone: a client that keeps its connections would keep these for ever."""
        super().shutdown()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def paid(self) -> Counter[tuple[str, str, int]]:
        found = Counter({("direct", model, number): n for (model, number), n in self.direct.items()})
        for batch in self.batches.values():
            for position, (_, body) in enumerate(batch.requests[: batch.answered]):
                number = number_in(body)
                if self.fate_of(batch, position, number) in BILLED:
                    found["batch", body["model"], number] += 1
        return found

    def fate_of(self, batch: StubBatch, position: int, number: int) -> Fate:
        if position >= batch.answered:
            return "cancelled" if batch.stopped is not None else "expired"
        return self.fate(number)

    def new_id(self, kind: str) -> str:
        return f"{kind}_{next(self._ids):06}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A process that was killed hung up."""


def number_in(body: dict[str, Any]) -> int:
    """n of "What is n + 2?"."""
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    return int(text.partition("What is ")[2].split()[0])


def answer_to(body: dict[str, Any]) -> str:
    return f"It is {number_in(body) + 2}"


def openai_answer(body: dict[str, Any], usage: bool = True) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer_to(body), "refusal": None}
    total = {
        "prompt_tokens": INPUT_TOKENS,
        "completion_tokens": OUTPUT_TOKENS,
        "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS,
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        **({"usage": total} if usage else {}),
    }


def anthropic_answer(body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": [{"type": "text", "text": answer_to(body)}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS, "service_tier": "batch"},
    }


class _Handler(BaseHTTPRequestHandler):
    server: BatchProvider
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self, method: str) -> None:
        length = int(self.headers.get("content-length") or 0)
        self.body = self.rfile.read(length)
        path, _, query = self.path.partition("?")
        self.query = dict(part.partition("=")[::2] for part in query.split("&") if part)
        route = f"{method} {re.sub(r'(file|batch|msgbatch)_[0-9]+', '*', path)}"
        with self.server.lock:
            self.server.log.append(route)
            faults = self.server.faults.get(route)
            fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            self._reply(
                fault, {"error": {"message": f"a fault {fault}", "type": "server_error", "code": None}}
            )
            return
        self.silent = fault == "hang up"
        for pattern, handler in _ROUTES:
            if found := re.fullmatch(pattern, f"{method} {path}"):
                handler(self, *found.groups())
                return
        self._reply(404, {"error": {"message": f"no {path}", "type": "invalid_request_error"}})

    def _reply(self, status: int, value: Any, kind: str = "application/json") -> None:
        if getattr(self, "silent", False):
            self.close_connection = True
            self.connection.close()
            return
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    # --- OpenAI -----------------------------------------------------------------------------------

    def upload(self) -> None:
        boundary = self.headers["content-type"].partition("boundary=")[2].encode()
        content, name = b"", ""
        for part in self.body.split(b"--" + boundary):
            head, _, rest = part.partition(b"\r\n\r\n")
            if b'name="file"' in head:
                content, name = rest.removesuffix(b"\r\n"), head.decode().partition('filename="')[2]
        with self.server.lock:
            file = self.server.new_id("file")
            self.server.files[file] = content
            self.server.file_names[file] = name.partition('"')[0]
        self._reply(200, self._file(file))

    def _file(self, file: str) -> dict[str, Any]:
        return {
            "id": file,
            "object": "file",
            "bytes": len(self.server.files[file]),
            "created_at": int(time.time()),
            "filename": self.server.file_names.get(file, file),
            "purpose": "batch",
            "status": "processed",
        }

    def delete_file(self, file: str) -> None:
        known = self.server.files.pop(file, None) is not None
        self._reply(200 if known else 404, {"id": file, "object": "file", "deleted": known})

    def content(self, file: str) -> None:
        kind, _, batch = file.partition("-")
        if kind in ("file_output", "file_error"):
            lines = self._lines(self.server.batches[batch])
            self._reply(200, lines["output" if kind == "file_output" else "error"], "application/jsonl")
        elif file in self.server.files:
            self._reply(200, self.server.files[file], "application/jsonl")
        else:
            self._reply(404, {"error": {"message": f"No such File object: {file}"}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        if wanted["input_file_id"] not in self.server.files:
            self._reply(400, {"error": {"message": "no such file", "type": "invalid_request_error"}})
            return
        lines = self.server.files[wanted["input_file_id"]].splitlines()
        requests = [(each["custom_id"], each["body"]) for each in map(json.loads, lines)]
        assert all(each["url"] == wanted["endpoint"] for each in map(json.loads, lines))
        with self.server.lock:
            batch = StubBatch(
                self.server.new_id("batch"),
                "openai",
                requests,
                wanted.get("metadata") or {},
                self.server.pace,
                wanted["input_file_id"],
                wanted["completion_window"],
            )
            self._check(batch)
        self._reply(200, self._openai(batch))

    def _check(self, batch: StubBatch) -> None:
        """Add a batch, and let it fail where its file does not do."""
        server = self.server
        waiting = sum(len(each.requests) for each in server.batches.values() if not each.is_through)
        ids = [custom_id for custom_id, _ in batch.requests]
        if len(set(ids)) < len(ids):
            batch.failure = ("duplicate_custom_id", "a custom_id is there twice")
        elif any(body["model"] in server.unsupported for _, body in batch.requests):
            batch.failure = ("model_not_found", "the model has no batches")
        elif server.full is not None and waiting + len(ids) > server.full:
            batch.failure = ("token_limit_exceeded", "Enqueued token limit reached")
        for name, value in (server.changes.pop(0) if server.changes else {}).items():
            setattr(batch, name, value)
        server.batches[batch.id] = batch

    def _openai(self, batch: StubBatch) -> dict[str, Any]:
        status, answered = batch.status, batch.answered
        fates = self._fates(batch)[:answered]
        bad, good = fates.count("error"), sum(fate in BILLED for fate in fates)
        ended = batch.is_through and batch.failure is None
        errors = None
        if status == "failed" and batch.failure is not None:
            code, message = batch.failure
            errors = {"object": "list", "data": [{"code": code, "message": message, "line": None}]}
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "errors": errors,
            "input_file_id": batch.input_file,
            "completion_window": batch.window,
            "status": status,
            "output_file_id": f"file_output-{batch.id}" if ended and self._lines(batch)["output"] else None,
            "error_file_id": f"file_error-{batch.id}" if ended and self._lines(batch)["error"] else "",
            "created_at": int(batch.created),
            "metadata": batch.metadata,
            "request_counts": {
                "total": 0 if status == "validating" else len(batch.requests),
                "completed": good,
                "failed": bad,
            },
        }

    def _fates(self, batch: StubBatch) -> list[Fate]:
        return [
            self.server.fate_of(batch, position, number_in(body))
            for position, (_, body) in enumerate(batch.requests)
        ]

    def _lines(self, batch: StubBatch) -> dict[str, bytes]:
        """The files of results, in another order than the requests."""
        output: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        for fate, (custom_id, body) in zip(self._fates(batch), batch.requests, strict=True):
            line: dict[str, Any] = {"id": f"batch_req_{custom_id}", "custom_id": custom_id, "error": None}
            if fate == "no line":
                continue
            if fate in ("expired", "cancelled"):
                error = {"code": f"batch_{fate}", "message": f"This request was {fate}."}
                errors.append({**line, "response": None, "error": error})
            elif fate == "error":
                refused = {"error": {"message": "bad request", "code": "invalid_request"}}
                errors.append({**line, "response": {"status_code": 400, "request_id": "r", "body": refused}})
            else:
                body = {"weird": True} if fate == "unreadable" else openai_answer(body, fate != "no usage")
                output.append({**line, "response": {"status_code": 200, "request_id": "r", "body": body}})
        return {"output": _shuffled(output, self.server.repeats), "error": _shuffled(errors, False)}

    def list_batches(self) -> None:
        found, more = self._page([each for each in self.server.batches.values() if each.form == "openai"])
        data = [self._openai(each) for each in found]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        self._reply(200, {"object": "list", "data": data, "has_more": more, **ends})

    def _page(self, batches: list[StubBatch]) -> tuple[list[StubBatch], bool]:
        """Newest first, those that are listed by now; a page is short, so that there are several."""
        newest = [
            each for each in reversed(batches) if time.time() - each.created >= self.server.listed_after
        ]
        after = self.query.get("after") or self.query.get("after_id")
        names = [each.id for each in newest]
        start = names.index(after) + 1 if after in names else 0
        return newest[start : start + 3], len(newest) > start + 3

    def retrieve(self, id: str) -> None:
        batch = self.server.batches[id]
        batch.looks += 1
        self._reply(200, self._openai(batch))

    def cancel(self, id: str) -> None:
        batch = self.server.batches[id]
        if batch.is_through:
            self._reply(409, {"error": {"message": f"Cannot cancel a batch with status {batch.status}"}})
            return
        batch.stopped = batch.stopped or time.monotonic()
        self._reply(200, self._openai(batch))

    def chat(self) -> None:
        body = json.loads(self.body)
        with self.server.lock:
            self.server.direct[body["model"], number_in(body)] += 1
        time.sleep(self.server.pause)
        until = time.monotonic() + 60
        while not self.server.may_answer() and time.monotonic() < until:
            time.sleep(0.01)
        self.server.first_answer = self.server.first_answer or time.time()
        if not body.get("stream"):
            self._reply(200, openai_answer(body))
            return
        whole = openai_answer(body)
        chunk = {key: whole[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
        events = [
            {**chunk, "choices": [{"index": 0, "delta": {"role": "assistant", "content": answer_to(body)}}]},
            {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {**chunk, "choices": [], "usage": whole["usage"]},
        ]
        text = "".join(f"data: {json.dumps(each)}\n\n" for each in events) + "data: [DONE]\n\n"
        self._reply(200, text.encode(), "text/event-stream")

    # --- Anthropic --------------------------------------------------------------------------------

    def create_messages(self) -> None:
        requests = [(each["custom_id"], each["params"]) for each in json.loads(self.body)["requests"]]
        bad = [name for name, _ in requests if not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name)]
        if bad or any(body["model"] in self.server.unsupported for _, body in requests):
            self._anthropic_error(400, "invalid_request_error", f"not a request: {bad}")
            return
        with self.server.lock:
            name = self.server.new_id("msgbatch")
            batch = StubBatch(name, "anthropic", requests, {}, self.server.pace)
            self._check(batch)
        self._reply(200, self._anthropic(batch))

    def _anthropic_error(self, status: int, kind: str, message: str) -> None:
        self._reply(status, {"type": "error", "error": {"type": kind, "message": message}})

    def _anthropic(self, batch: StubBatch) -> dict[str, Any]:
        ended = batch.is_through
        readable = ended and not self.server.archived
        fates = self._fates(batch) if ended else []
        counts = {
            "succeeded": sum(fate in BILLED for fate in fates),
            "errored": fates.count("error"),
            "expired": fates.count("expired"),
            "canceled": fates.count("cancelled"),
            "processing": 0 if ended else len(batch.requests),
        }
        at = datetime.fromtimestamp(batch.created, UTC).isoformat()
        status = "ended" if ended else ("canceling" if batch.stopped is not None else "in_progress")
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": status,
            "request_counts": counts,
            "created_at": at,
            "expires_at": at,
            "ended_at": at if ended else None,
            "archived_at": at if ended and self.server.archived else None,
            "cancel_initiated_at": at if batch.stopped is not None else None,
            "results_url": f"{self.server.url}/v1/messages/batches/{batch.id}/results" if readable else None,
        }

    def list_messages(self) -> None:
        found, more = self._page([each for each in self.server.batches.values() if each.form == "anthropic"])
        data = [self._anthropic(each) for each in found]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        self._reply(200, {"data": data, "has_more": more, "first_id": None, "last_id": None, **ends})

    def retrieve_messages(self, id: str) -> None:
        self._reply(200, self._anthropic(self.server.batches[id]))

    def cancel_messages(self, id: str) -> None:
        batch = self.server.batches[id]
        if batch.is_through:
            self._anthropic_error(400, "invalid_request_error", "it has ended")
            return
        batch.stopped = batch.stopped or time.monotonic()
        self._reply(200, self._anthropic(batch))

    def results(self, id: str) -> None:
        batch, lines = self.server.batches[id], list[dict[str, Any]]()
        for fate, (custom_id, body) in zip(self._fates(batch), batch.requests, strict=True):
            if fate == "no line":
                continue
            kind = {"cancelled": "canceled", "error": "errored", "expired": "expired"}.get(fate, "succeeded")
            result: dict[str, Any] = {"type": kind}
            if kind == "succeeded":
                result["message"] = anthropic_answer(body)
            if kind == "errored":
                error = {"type": "invalid_request_error", "message": "bad request"}
                result["error"] = {"type": "error", "error": error}
            lines.append({"custom_id": custom_id, "result": result})
        self._reply(200, _shuffled(lines, self.server.repeats), "application/x-jsonl")

    def messages(self) -> None:
        body = json.loads(self.body)
        with self.server.lock:
            self.server.direct[body["model"], number_in(body)] += 1
        whole = anthropic_answer(body)
        if not body.get("stream"):
            self._reply(200, whole)
            return
        start = {**whole, "content": [], "stop_reason": None}
        events: list[dict[str, Any]] = [
            {"type": "message_start", "message": start},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": answer_to(body)},
            },
            {"type": "content_block_stop", "index": 0},
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                "usage": whole["usage"],
            },
            {"type": "message_stop"},
        ]
        text = "".join(f"event: {each['type']}\ndata: {json.dumps(each)}\n\n" for each in events)
        self._reply(200, text.encode(), "text/event-stream")


_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"POST /v1/files", _Handler.upload),
    (r"DELETE /v1/files/([\w-]+)", _Handler.delete_file),
    (r"GET /v1/files/([\w-]+)/content", _Handler.content),
    (r"POST /v1/batches", _Handler.create),
    (r"GET /v1/batches", _Handler.list_batches),
    (r"GET /v1/batches/(\w+)", _Handler.retrieve),
    (r"POST /v1/batches/(\w+)/cancel", _Handler.cancel),
    (r"POST /v1/chat/completions", _Handler.chat),
    (r"POST /v1/messages/batches", _Handler.create_messages),
    (r"GET /v1/messages/batches", _Handler.list_messages),
    (r"GET /v1/messages/batches/(\w+)/results", _Handler.results),
    (r"GET /v1/messages/batches/(\w+)", _Handler.retrieve_messages),
    (r"POST /v1/messages/batches/(\w+)/cancel", _Handler.cancel_messages),
    (r"POST /v1/messages", _Handler.messages),
]


def _shuffled(lines: list[dict[str, Any]], repeats: bool) -> bytes:
    """Lines in another order; with repeats, the first of them again at the end."""
    order = random.Random(len(lines)).sample(lines, len(lines))
    order += order[:2] if repeats else []
    return "".join(json.dumps(each) + "\n" for each in order).encode()


@contextmanager
def batch_provider(
    pace: float = 0.1, fate: Callable[[int], Fate] = lambda number: "ok"
) -> Iterator[BatchProvider]:
    with BatchProvider(pace, fate) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def spec_for(server: BatchProvider, name: str, form: str, **changed: Any) -> ModelSpec:
    """An entry of the server. form: "openai", "anthropic", or "none" for a model without batches."""
    base = server.url if form == "anthropic" else f"{server.url}/v1"
    provider = "anthropic" if form == "anthropic" else "openai"
    fields: dict[str, Any] = {
        "name": name,
        "description": "Adds two.",
        "kind": "remote",
        "litellm_model": f"{provider}/{name}",
        "api_base": base,
        "context_length": 4096,
        "input_price": 1,
        "output_price": 4,
        "max_retries": 0,
        "batch_api": form,
        "batch_hours": 0.001,
    }
    return ModelSpec.model_validate(fields | changed)
