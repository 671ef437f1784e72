"""POST /v1/embeddings: texts as vectors, by an encoder of the catalogue, such as the one that routers use.

An encoder runs in this process. Its call holds what it costs before it, as any other: an encoder without a
price costs nothing, but its tokens are posted. Leaves out the encoder itself (`viaticum.routers.query`).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from viaticum.agents.openai_api.embeddings import (
    EmbeddingList,
    EmbeddingRequest,
    embedding_list,
    parse_embeddings,
)
from viaticum.agents.openai_api.errors import APIError, model_not_found
from viaticum.agents.openai_api.responses import to_usd
from viaticum.agents.server.auth import Caller
from viaticum.agents.server.body import read_request
from viaticum.agents.server.run import api_error
from viaticum.agents.server.service import Service
from viaticum.agents.workflow.calls import tries
from viaticum.budgets import Ledger
from viaticum.budgets.tagging import tagged
from viaticum.catalogue import ModelSpec
from viaticum.errors import WeightsError
from viaticum.money import Price
from viaticum.residency import Residency
from viaticum.types import TokenCount, Usage
from viaticum.weights import locate

if TYPE_CHECKING:
    from viaticum.routers.query.encoder import Encoder

FREE = Price(0, 0)
ENDED_UNPAID = ("void", "expired")


def _is_here(spec: ModelSpec) -> bool:
    try:
        locate(spec)
    except WeightsError:
        return False
    return True


class Embeddings:
    """The handler, with the encoders that it has loaded."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._encoders: dict[str, Encoder] = {}
        self._lock = threading.Lock()

    def names(self, caller: Caller) -> list[str]:
        """The encoders whose weights are here and that a caller's data may go to."""
        encoders = self.service.client.catalogue.encoders()
        return [spec.name for spec in encoders if caller.residency.allows(spec.labels) and _is_here(spec)]

    def known(self, caller: Caller) -> list[str]:
        """The encoders that a caller may use, here or not."""
        names = (spec.name for spec in self.service.client.catalogue.encoders())
        return [name for name in names if caller.may_use(name)]

    async def create(self, request: Request) -> Response:
        started, service = time.perf_counter(), self.service
        label, status = "unknown", 500
        try:
            caller, asked = await read_request(service, request, parse_embeddings)
            self.check_model(caller, asked.model)
            label = asked.model
            body, cost = await service.run_in_slot(caller, self.answer, caller, asked)
            status = 200
            headers = {"x-viaticum-cost": str(cost), "x-viaticum-cost-usd": f"{to_usd(cost):.9f}"}
            return JSONResponse(body, headers={"x-viaticum-route": asked.model, **headers})
        except Exception as error:
            status = api_error(error).status
            raise
        finally:
            service.metrics.requests.labels(label, str(status)).inc()
            service.metrics.seconds.labels(label).observe(time.perf_counter() - started)

    def check_model(self, caller: Caller, name: str) -> None:
        """Raise `APIError` with status 404 for an encoder that is not there or not for this caller."""
        known = self.known(caller)
        if name not in known:
            raise model_not_found(f"unknown encoder {name!r}; known: {', '.join(known) or 'none'}")

    def answer(
        self, caller: Caller, request: EmbeddingRequest, key: str | None = None
    ) -> tuple[EmbeddingList, int]:
        """The response, paid, and its cost in nano-dollars. In a thread.

        Args:
            key: of the hold, which is paid once, however often the request is answered under it.
        """
        self._check_residency(caller, request)
        encoder = self._encoder(request.model)
        texts = [_text(encoder, index, each) for index, each in enumerate(request.inputs)]
        tokens = _count(encoder, texts)
        ledger = self.service.client.ledger
        key = _usable_key(ledger, key or f"embed-{uuid.uuid4().hex}")
        with self._budget_of(caller, request, key) as scope, tagged(**caller.tags):
            price = self.service.client.catalogue[request.model].price or FREE
            used = {request.model: TokenCount(tokens)}
            tags = {"model": request.model, "strategy": "embed"}
            labels = self.service.client.labels(request.model)
            hold = ledger.reserve(scope, key, used, {request.model: price}, tags=tags, labels=labels)
            try:
                if hold.state == "reserved":
                    ledger.dispatch(key)
                body = embedding_list(request, encoder(texts).numpy(), tokens)
            except BaseException:
                if hold.state != "posted":
                    ledger.void(key)  # it ran here, and gave nothing
                raise
            cost = ledger.settle(key, used).nanousd
        self.service.metrics.count_tokens(Usage(used))
        return body, cost

    def _check_residency(self, caller: Caller, request: EmbeddingRequest) -> None:
        """Raise `ModelNotAllowed` where the data may not go to this encoder."""
        labels = self.service.client.labels(request.model)
        residency = caller.residency & Residency.of(request.only)
        if not residency.allows(labels) or not self.service.client.allows(request.model):
            raise residency.refusal({request.model: labels})

    @contextmanager
    def _budget_of(self, caller: Caller, request: EmbeddingRequest, key: str) -> Iterator[str]:
        """The scope that pays, which is the request's own where it has a budget."""
        limit = request.limit_nanousd
        if limit is None:
            yield caller.scope
            return
        scope = f"{caller.scope}/{key}"
        with self.service.client.ledger.request_limit(scope, parent=caller.scope, limit_nanousd=limit):
            yield scope

    def _encoder(self, name: str) -> Encoder:
        """An encoder, loaded at its first use. Raises `WeightsError`, `MissingExtra`."""
        from viaticum.routers.query.encoder import Encoder

        with self._lock:
            if name not in self._encoders:
                # Without a cache on disk, which would grow with every text of every client.
                self._encoders[name] = Encoder(name, cache=None, catalogue=self.service.client.catalogue)
            return self._encoders[name]


def _usable_key(ledger: Ledger, first: str) -> str:
    """The key of the try that was paid for or can go on, else of a new one."""
    return next(key for key, hold in tries(ledger, first) if hold is None or hold.state not in ENDED_UNPAID)


def _text(encoder: Encoder, index: int, given: str | Sequence[int]) -> str:
    if isinstance(given, str):
        return given
    text = encoder.decode(given)
    if text is None:
        field = f"input.{index}"
        message = f"{field}: {encoder.name} has {encoder.vocabulary_size} tokens; give ids of its tokenizer"
        raise APIError(400, message, param=field)
    return text


def _count(encoder: Encoder, texts: Sequence[str]) -> int:
    """Tokens of all texts. Raises `APIError` for one that the encoder would cut."""
    counts = encoder.count(texts)
    for index, count in enumerate(counts):
        if count > encoder.max_tokens:
            message = f"input.{index}: {count} tokens; {encoder.name} reads {encoder.max_tokens} at most"
            raise APIError(400, message, code="context_length_exceeded", param=f"input.{index}")
    return sum(counts)
