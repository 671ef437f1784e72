"""The routes of batches: POST and GET /v1/batches, and cancel. Leaves out who answers (`batch_runner`)."""

from __future__ import annotations

import time
import uuid

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from viaticum.agents.openai_api.batches import (
    BatchesQuery,
    BatchList,
    BatchObject,
    BatchRequest,
    new_batch,
    parse_batch_request,
)
from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.files import page_ends, parse_query
from viaticum.agents.server.auth import Caller
from viaticum.agents.server.batch_runner import BatchRunner
from viaticum.agents.server.batch_store import BatchStore, StoredBatch
from viaticum.agents.server.body import read_request
from viaticum.agents.server.file_routes import StoredFiles
from viaticum.agents.server.service import Service

CANCELLABLE = ("validating", "in_progress")


class Batches(StoredFiles):
    """The handlers. runner: None where no files are kept."""

    def __init__(self, service: Service, store: BatchStore | None, runner: BatchRunner | None) -> None:
        super().__init__(service, store)
        self.runner = runner

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/v1/batches", self.create, methods=["POST"]),
            Route("/v1/batches", self.list_batches, methods=["GET"]),
            Route("/v1/batches/{id}", self.show, methods=["GET"]),
            Route("/v1/batches/{id}/cancel", self.cancel, methods=["POST"]),
        ]

    async def create(self, request: Request) -> Response:
        service = self.service
        caller, asked = await read_request(service, request, parse_batch_request)
        batch = await service.run_in_thread(self._add, caller, asked)
        self._wake()
        return JSONResponse(batch)

    def _add(self, caller: Caller, asked: BatchRequest) -> BatchObject:
        file = self.store.file(asked.input_file_id, caller.owner)
        if file is None:
            message = f"input_file_id: no file {asked.input_file_id!r} is kept; upload it"
            raise APIError(404, message, code="not_found", param="input_file_id")
        if file["purpose"] != "batch":
            message = f"input_file_id: a file of purpose {file['purpose']}; upload one of purpose batch"
            raise APIError(400, message, param="input_file_id")
        batch = new_batch(f"batch_{uuid.uuid4().hex}", asked, int(time.time()))
        expires = asked.output_expires_after
        seconds = None if expires is None else expires.seconds
        stored = StoredBatch(batch, caller.owner, caller.name, caller.scope, seconds)
        self.store.add_batch(stored, file["bytes"])
        return batch

    async def list_batches(self, request: Request) -> Response:
        service = self.service
        caller = await service.authenticator.authenticate(request, service.run_in_thread)
        query = parse_query(BatchesQuery, request.query_params)
        data, has_more = await service.run_in_thread(
            lambda: self.store.batches(caller.owner, after=query.after, limit=query.limit)
        )
        first, last = page_ends(data)
        listed: BatchList = {
            "object": "list",
            "data": data,
            "has_more": has_more,
            "first_id": first,
            "last_id": last,
        }
        return JSONResponse(listed)

    async def show(self, request: Request) -> Response:
        _, batch = await self._found(request)
        return JSONResponse(batch)

    async def cancel(self, request: Request) -> Response:
        _, batch = await self._found(request)
        if batch["status"] in CANCELLABLE:
            changes = {"status": "cancelling", "cancelling_at": int(time.time())}
            unless = ("finalizing", "cancelling", "completed", "failed", "expired", "cancelled")
            changed = await self.service.run_in_thread(
                lambda: self.store.update(batch["id"], changes, unless=unless)
            )
            batch = changed or batch
            self._wake()
        if batch["status"] not in ("cancelling", "cancelled"):
            raise APIError(400, f"the batch is {batch['status']}, and cannot be cancelled any more")
        return JSONResponse(batch)

    async def _found(self, request: Request) -> tuple[Caller, BatchObject]:
        service, name = self.service, request.path_params["id"]
        caller = await service.authenticator.authenticate(request, service.run_in_thread)
        batch = await service.run_in_thread(self.store.batch, name, caller.owner)
        if batch is None:
            raise APIError(404, f"no batch {name!r} is kept", code="not_found", param="batch_id")
        return caller, batch

    def _wake(self) -> None:
        if self.runner is not None:
            self.runner.wake()
