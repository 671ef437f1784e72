"""Uploads: the multipart body of POST /v1/files, limited in size and in time while it comes in.

Its file goes to a temporary file of the system without a name, readable by this process alone. Leaves out
where files are kept (`batch_store`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import IO

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.files import MAX_NAME, UploadFields, parse_upload_fields
from viaticum.agents.server.auth import Caller
from viaticum.agents.server.run import Limits

MAX_FIELDS = 16  # beside the file
FIELD_BYTES = 4_096
ENVELOPE_BYTES = 1 << 16  # of the body beside the file
BYTES_A_SECOND = 16_384  # that a client sends at least, after its patience


@dataclass(frozen=True, slots=True)
class ReceivedFile:
    """An upload. content: open at its beginning, until the context of `received_file` ends."""

    fields: UploadFields
    filename: str
    content: IO[bytes]


@asynccontextmanager
async def received_file(
    request: Request, caller: Caller, limits: Limits, max_bytes: int
) -> AsyncGenerator[ReceivedFile]:
    """Receive an upload. Raises `APIError`."""
    _refuse_web_pages(request, caller)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise APIError(
            400, f"send a form with content-type multipart/form-data, not {kind or 'without one'!r}"
        )
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise APIError(415, "send the file as it is, without a content-encoding")
    body = _limited_body(request, limits, max_bytes)
    parser = MultiPartParser(
        request.headers, body, max_files=1, max_fields=MAX_FIELDS, max_part_size=FIELD_BYTES
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise APIError(
            400, f"the body is no form as multipart/form-data writes it: {error.message}"
        ) from None
    try:
        yield _checked(form, max_bytes)
    finally:
        await form.close()


def _refuse_web_pages(request: Request, caller: Caller) -> None:
    """A browser sends a form anywhere without asking first, and says from which page; a key it has not."""
    if not caller.name and "origin" in request.headers:
        raise APIError(403, "a web page cannot upload files here; make a key", type="permission_error")


async def _limited_body(request: Request, limits: Limits, max_bytes: int) -> AsyncGenerator[bytes]:
    """The pieces of a body. Raises `APIError` for one that is too large or too slow."""
    most = max_bytes + ENVELOPE_BYTES
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise _too_large(max_bytes)
    began, received, pieces = time.monotonic(), 0, request.stream()
    while True:
        left = began + limits.stall_timeout + received / BYTES_A_SECOND - time.monotonic()
        try:
            async with asyncio.timeout(min(left, limits.stall_timeout)):
                piece = await anext(pieces, None)
        except TimeoutError:
            raise APIError(408, "the file arrives too slowly") from None
        if piece is None:
            return
        received += len(piece)
        if received > most:
            raise _too_large(max_bytes)
        yield piece


def _checked(form: FormData, max_bytes: int) -> ReceivedFile:
    found = form.get("file")
    if not isinstance(found, UploadFile):
        raise APIError(400, "file: send a file under this name", param="file")
    if (found.size or 0) > max_bytes:
        raise _too_large(max_bytes)
    fields = parse_upload_fields({name: value for name, value in form.items() if isinstance(value, str)})
    name = "".join(each for each in found.filename or "" if each.isprintable())[:MAX_NAME] or "file.jsonl"
    return ReceivedFile(fields, name, found.file)


def _too_large(max_bytes: int) -> APIError:
    return APIError(413, f"the file is larger than {max_bytes} bytes", code="body_too_large", param="file")
