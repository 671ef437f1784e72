"""The routes of files: POST, GET and DELETE /v1/files. Leaves out where files are (`batch_store`)."""

from __future__ import annotations

from collections import Counter

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from viaticum.agents.openai_api.errors import APIError, overloaded
from viaticum.agents.openai_api.files import (
    DeletedFile,
    FileList,
    FileObject,
    FilesQuery,
    page_ends,
    parse_query,
)
from viaticum.agents.server.auth import Caller
from viaticum.agents.server.batch_store import BatchStore
from viaticum.agents.server.body import check_caller
from viaticum.agents.server.service import Service
from viaticum.agents.server.uploads import ENVELOPE_BYTES, ReceivedFile, received_file

MAX_UPLOADS, MAX_UPLOADS_A_KEY = 8, 2  # at once, each of which has a temporary file
RETRY_SECONDS = 5
CONTENT_TYPE = "application/octet-stream"


class StoredFiles:
    """Handlers of what is kept. store: None where the server keeps no files."""

    def __init__(self, service: Service, store: BatchStore | None) -> None:
        self.service, self._store = service, store

    @property
    def store(self) -> BatchStore:
        """Raises `APIError` with status 404 where the server keeps no files."""
        if self._store is None:
            message = "this server keeps no files; start it with --keep-files above 0"
            raise APIError(404, message, code="not_found")
        return self._store


class Files(StoredFiles):
    """The handlers of files.

    Args:
        store: None keeps no files: every request is refused.
        max_bytes: of one file.
    """

    def __init__(self, service: Service, store: BatchStore | None, max_bytes: int) -> None:
        super().__init__(service, store)
        self.max_bytes = max_bytes
        self._uploads: Counter[str] = Counter()

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/v1/files", self.create, methods=["POST"]),
            Route("/v1/files", self.list_files, methods=["GET"]),
            Route("/v1/files/{id}", self.show, methods=["GET"]),
            Route("/v1/files/{id}", self.delete, methods=["DELETE"]),
            Route("/v1/files/{id}/content", self.content, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Response:
        service = self.service
        caller = await check_caller(service, request)
        length = request.headers.get("content-length", "")
        size = max(1, int(length) - ENVELOPE_BYTES) if length.isdecimal() else 1
        await service.run_in_thread(self.store.check_room, caller.owner, size)
        if self._uploads[caller.owner] >= MAX_UPLOADS_A_KEY or self._uploads.total() >= MAX_UPLOADS:
            raise overloaded(RETRY_SECONDS, "other files are being uploaded; try again")
        self._uploads[caller.owner] += 1
        try:
            async with received_file(request, caller, service.limits, self.max_bytes) as received:
                return JSONResponse(await service.run_with_files(self._add, caller, received))
        finally:
            self._uploads[caller.owner] -= 1

    def _add(self, caller: Caller, received: ReceivedFile) -> FileObject:
        expires = received.fields.expires_after
        seconds = None if expires is None else expires.seconds
        return self.store.add_file(caller.owner, received.filename, "batch", received.content, seconds)

    async def list_files(self, request: Request) -> Response:
        service = self.service
        caller = await service.authenticator.authenticate(request, service.run_in_thread)
        query = parse_query(FilesQuery, request.query_params)
        data, has_more = await service.run_in_thread(
            lambda: self.store.files(
                caller.owner,
                purpose=query.purpose,
                after=query.after,
                limit=query.limit,
                order=query.order,
            )
        )
        first, last = page_ends(data)
        listed: FileList = {
            "object": "list",
            "data": data,
            "has_more": has_more,
            "first_id": first,
            "last_id": last,
        }
        return JSONResponse(listed)

    async def show(self, request: Request) -> Response:
        return JSONResponse(await self._file(request))

    async def delete(self, request: Request) -> Response:
        service, name = self.service, request.path_params["id"]
        caller = await service.authenticator.authenticate(request, service.run_in_thread)
        if not await service.run_in_thread(self.store.delete_file, name, caller.owner):
            raise _no_file(name)
        deleted: DeletedFile = {"id": name, "object": "file", "deleted": True}
        return JSONResponse(deleted)

    async def content(self, request: Request) -> Response:
        file = await self._file(request)
        path = self.store.content_path(file["id"])
        if not await self.service.run_in_thread(path.is_file):
            raise _no_file(file["id"])
        headers = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
        return FileResponse(path, media_type=CONTENT_TYPE, filename=file["filename"], headers=headers)

    async def _file(self, request: Request) -> FileObject:
        service, name = self.service, request.path_params["id"]
        caller = await service.authenticator.authenticate(request, service.run_in_thread)
        found = await service.run_in_thread(self.store.file, name, caller.owner)
        if found is None:
            raise _no_file(name)
        return found


def _no_file(id: str) -> APIError:
    return APIError(404, f"no file {id!r} is kept", code="not_found", param="file_id")
