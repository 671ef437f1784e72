"""OpenAI's files as data: the objects, and the form fields of an upload. Leaves out contents and HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import BaseModel, Field, ValidationError
from typing_extensions import TypedDict

from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.parsing import StrictForm, invalid_request
from viaticum.agents.openai_api.responses import Count

Purpose = Literal["batch", "batch_output"]
SHORTEST_SECONDS, LONGEST_SECONDS = 3_600, 2_592_000  # for which a file may be kept, as at OpenAI
MAX_NAME = 255
Order = Literal["asc", "desc"]
Query = TypeVar("Query", bound=BaseModel)


class FilesQuery(BaseModel):
    """Which page of files."""

    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Order = "desc"
    after: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    purpose: Annotated[str, Field(max_length=100)] | None = None


class ExpiresAfter(StrictForm):
    """When a file is deleted, in seconds from when it was made."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=SHORTEST_SECONDS, le=LONGEST_SECONDS)]


class UploadFields(StrictForm):
    """The fields of an upload beside the file itself."""

    purpose: Literal["batch"]
    expires_after: ExpiresAfter | None = None


class FileObject(TypedDict):
    """A file that is kept. bytes: its size; times in seconds since 1970."""

    id: str
    object: Literal["file"]
    bytes: Count
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Purpose
    status: Literal["processed"]
    status_details: None


class FileList(TypedDict):
    object: Literal["list"]
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedFile(TypedDict):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class Upload(TypedDict):
    """The body of an upload, multipart/form-data. Written for the OpenAPI document alone."""

    file: Annotated[str, Field(json_schema_extra={"format": "binary"})]
    purpose: Literal["batch"]
    expires_after: NotRequired[ExpiresAfter]


def parse_upload_fields(fields: Mapping[str, str]) -> UploadFields:
    """Parse the form fields, nested ones as `expires_after[seconds]`. Raises `APIError` with status 400."""
    values: dict[str, Any] = {}
    for name, value in fields.items():
        outer, bracket, inner = name.partition("[")
        if not bracket:
            values[name] = value
        elif inner.endswith("]") and isinstance(nested := values.setdefault(outer, {}), dict):
            nested[inner[:-1]] = int(value) if value.isascii() and value.isdecimal() else value
    if values.get("purpose") not in (None, "batch"):
        raise APIError(
            400,
            f"purpose: files are for batches here, got {values['purpose']!r}; give batch",
            param="purpose",
        )
    try:
        return UploadFields.model_validate(values)
    except ValidationError as error:
        raise invalid_request(error) from None


def parse_query(model: type[Query], query: Mapping[str, str]) -> Query:
    """Parse a query string; names that are not known are passed over. Raises `APIError` with status 400."""
    try:
        return model.model_validate({name: value for name, value in query.items() if value})
    except ValidationError as error:
        raise invalid_request(error) from None


def page_ends(data: Sequence[Any]) -> tuple[str | None, str | None]:
    """The ids of the first and the last object of a page."""
    return (data[0]["id"], data[-1]["id"]) if data else (None, None)
