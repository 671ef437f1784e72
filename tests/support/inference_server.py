"""A server on a loopback port that speaks the APIs of vLLM or SGLang over a real model of torch.

Greedy tokens after token ids, with log probabilities; `/tokenize`, `/v1/models`. A script of behaviours, one
a request, makes it fail in the ways of servers.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from viaticum.decoders import Runner

Json = dict[str, Any]


@dataclass
class InferenceServer:
    """A server over `runner`, whose slots it uses in turn.

    script: behaviours of the next requests for tokens, then "ok": a status (with headers and a message),
    "silent", "break" after two tokens, "half a line", "stall" after two tokens, "error event", "abort"; or
    "mark" before the first event, which ends nothing.
    requests: bodies in the order they came. hung_up: set when a client left a stream.
    """

    runner: Runner
    dialect: str = "vllm"
    model: str = "big"
    key: str | None = None
    context: int | None = None
    encode: Callable[[str], list[int]] = lambda text: [byte - 64 for byte in text.encode()]
    stop_ids: tuple[int, ...] = ()
    max_logprobs: int = 1000
    token_ids: bool = True  # False: as an OpenAI server that knows texts only
    tokenizes: bool = True
    incremental: bool = True  # of SGLang's streams
    pause: float = 0.0  # seconds before each token
    port: int = 0
    script: list[Any] = field(default_factory=list)
    requests: list[Json] = field(default_factory=list)
    generated: int = 0  # tokens
    hung_up: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock, self._turn = threading.Lock(), 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    # --- the model ------------------------------------------------------------------------------------------

    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Log probabilities after a text: float32 [vocabulary]."""
        with self._lock, torch.inference_mode():
            held = [self.runner.cached_prefix_length(slot, ids) for slot in range(self.runner.slots)]
            best = max(range(self.runner.slots), key=lambda slot: held[slot])
            if held[best] == len(self.runner.cached_tokens[best]) > 0:
                slot = best  # it goes on
            else:
                slot, self._turn = self._turn, (self._turn + 1) % self.runner.slots
            self.runner.reuse_prefix(slot, ids)
            output = self.runner.forward([slot], [list(ids[len(self.runner.cached_tokens[slot]) :])])
            if not bool(output.finite.all()):
                self.runner.discard(slot)
            self.generated += 1
            return output.logits[0].log_softmax(-1)

    def token(self, ids: Sequence[int], top: int) -> tuple[int, float | None, list[tuple[int, float | None]]]:
        """The greedy token after a text, its log probability, and the top ones; None where one is NaN."""
        values, best = self.logprobs(ids).topk(min(top, self.runner.vocabulary))
        known = [value if value == value else None for value in values.tolist()]
        pairs = list(zip(best.tolist(), known, strict=True))
        return pairs[0][0], pairs[0][1], pairs

    async def tokens(self, ids: list[int], settings: Json) -> AsyncIterator[tuple[Any, str | None]]:
        """Tokens after a text, each with why the text ends, if it does."""
        text = list(ids)
        for count in range(1, settings["limit"] + 1):
            await asyncio.sleep(self.pause)
            token = await asyncio.to_thread(self.token, text, settings["top"])
            text.append(token[0])
            stops = token[0] in self.stop_ids and not settings["ignore_eos"]
            yield token, "stop" if stops else "length" if count == settings["limit"] else None
            if stops:
                return

    # --- HTTP -----------------------------------------------------------------------------------------------

    def refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": "Unauthorized"}, 401)

    async def models(self, request: Request) -> Response:
        card = {"id": self.model, "object": "model", "owned_by": self.dialect}
        card |= {"max_model_len": self.context or self.runner.context}
        return self.refused(request) or JSONResponse({"object": "list", "data": [card]})

    async def tokenize(self, request: Request) -> Response:
        body = await request.json()
        if not self.tokenizes:
            return JSONResponse({"detail": "Not Found"}, 404)
        ids = self.encode(body["prompt"])
        return self.refused(request) or JSONResponse({"tokens": ids, "count": len(ids)})

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        if body["model"] != self.model:
            return failure(404, f"The model `{body['model']}` does not exist.")
        if body["logprobs"] > self.max_logprobs:
            return failure(
                400,
                f"Requested sample logprobs of {body['logprobs']}, which is greater than max allowed: "
                f"{self.max_logprobs}",
            )
        prompts = self.prompts(body["prompt"])
        settings = {"limit": body["max_tokens"], "top": body["logprobs"], "ignore_eos": body["ignore_eos"]}
        return await self.respond(request, body, prompts, settings, self.vllm_event)

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        own = body["sampling_params"]
        settings = {
            "limit": own["max_new_tokens"],
            "top": body["top_logprobs_num"],
            "ignore_eos": own["ignore_eos"],
        }
        return await self.respond(request, body, self.prompts(body["input_ids"]), settings, self.sglang_event)

    def prompts(self, given: Any) -> list[list[int]]:
        if isinstance(given, str):
            return [self.encode(given)]
        return given if given and isinstance(given[0], list) else [given]

    async def respond(
        self, request: Request, body: Json, prompts: list[list[int]], settings: Json, event: Any
    ) -> Response:
        self.requests.append(body)
        behaviour = self.script.pop(0) if self.script else "ok"
        if refused := self.refused(request):
            return refused
        if isinstance(behaviour, tuple):
            status, headers, message = behaviour
            return failure(status, message, headers)
        if behaviour == "silent":
            await asyncio.sleep(120)
        if any(len(prompt) >= (self.context or self.runner.context) for prompt in prompts):
            return failure(400, "This model's maximum context length is exceeded")
        if body["stream"]:
            events = self.events(prompts[0], settings, event, behaviour)
            return StreamingResponse(events, media_type="text/event-stream")
        answers = []
        for index, prompt in enumerate(prompts):
            if behaviour == "abort":
                answers.append(event(index, [], [], "abort"))
                continue
            made = [each async for each in self.tokens(prompt, settings)]
            answers.append(event(index, [token for token, _ in made], [], made[-1][1]))
        if self.dialect == "sglang":
            return JSONResponse(answers)
        choices = [choice for answer in answers for choice in answer["choices"]]
        if isinstance(body["prompt"], str):
            choices[0]["prompt_token_ids"] = prompts[0]
        return JSONResponse({"choices": choices[::-1]})

    async def events(
        self, prompt: list[int], settings: Json, event: Any, behaviour: Any
    ) -> AsyncIterator[bytes]:
        earlier: list[Any] = []
        ended = False
        if behaviour == "mark":
            yield codecs.BOM_UTF8
            behaviour = "ok"
        try:
            async for token, finish in self.tokens(prompt, settings):
                if len(earlier) == 2 and behaviour != "ok":
                    if behaviour == "error event":
                        yield b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n'
                    elif behaviour == "abort":  # three tokens later, of which it lists the last
                        line = json.dumps(event(0, [token], [*earlier, token, token], "abort"))
                        yield f"data: {line}\n\n".encode()
                    elif behaviour == "half a line":
                        yield b'data: {"choices": [{"te'
                    elif behaviour == "stall":
                        await asyncio.sleep(120)
                    elif behaviour == "break":
                        raise ConnectionError("the server breaks off")
                    return
                line = json.dumps(event(0, [token], earlier, finish), ensure_ascii=False)
                yield f"data: {line}\n\n".encode()
                earlier.append(token)
            yield b"data: [DONE]\n\n"
            ended = True
        finally:
            if not ended:
                self.hung_up.set()

    def vllm_event(self, index: int, new: list[Any], earlier: list[Any], finish: str | None) -> Json:
        choice: Json = {"index": index, "text": "\u2028" * len(new), "finish_reason": finish}
        name = "token_id:{}".format if self.token_ids else "<{}>".format
        choice["logprobs"] = {
            "tokens": [name(token) for token, _, _ in new],
            "token_logprobs": [value for _, value, _ in new],
            "top_logprobs": [{name(i): value for i, value in top} for _, _, top in new],
        }
        if self.token_ids:
            choice["token_ids"] = [token for token, _, _ in new]
        return {"object": "text_completion", "choices": [choice]}

    def sglang_event(self, index: int, new: list[Any], earlier: list[Any], finish: str | None) -> Json:
        shown = new if self.incremental else [*earlier, *new]
        meta = {
            "finish_reason": finish and {"type": finish},
            "completion_tokens": len(earlier) + len(new),
            "output_token_logprobs": [[value, token, None] for token, value, _ in shown],
            "output_top_logprobs": [[[value, i, None] for i, value in top] for _, _, top in shown],
        }
        return {"text": "\u2028" * len(new), "meta_info": meta}


def failure(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "code": status}}, status, headers=headers)


@contextmanager
def serving(server: InferenceServer, port: int = 0) -> Iterator[InferenceServer]:
    """The server on a free port, in a thread of its own."""
    routes = [
        Route("/v1/models", server.models),
        Route("/tokenize", server.tokenize, methods=["POST"]),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/generate", server.generate, methods=["POST"]),
    ]
    listener = socket.create_server(("127.0.0.1", port))
    server.port = listener.getsockname()[1]
    config = uvicorn.Config(
        Starlette(routes=routes), log_level="critical", lifespan="off", timeout_graceful_shutdown=1
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.005)
    try:
        yield server
    finally:
        running.should_exit = True
        running.force_exit = True
        thread.join(60)
        listener.close()
