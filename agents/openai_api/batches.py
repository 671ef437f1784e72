"""OpenAI's batches as data: the request that makes one, its object, and the lines of its files.

Leaves out HTTP, where files are, and how a line is answered.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from viaticum.agents.openai_api.files import ExpiresAfter
from viaticum.agents.openai_api.parsing import StrictForm, parse_body
from viaticum.agents.openai_api.responses import Count
from viaticum.errors import InputError

Endpoint = Literal["/v1/chat/completions", "/v1/responses", "/v1/embeddings"]
ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)
Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
UNFINISHED: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")
MAX_LINES = 50_000  # of one batch, as at OpenAI
MAX_ID = 512  # characters of a custom_id
MAX_DEPTH = 250  # of objects and lists in one another; bodies of live requests may have 200
MAX_ERRORS = 100  # errors of a file that a batch names
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ESCAPED = re.compile("[\x85\u2028\u2029\ud800-\udfff]")
_WINDOW = re.compile(r"([1-9]\d{0,5})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
LONGEST_WINDOW = 14 * 86_400
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class BatchRequest(StrictForm):
    """The body of POST /v1/batches."""

    input_file_id: str = Field(min_length=1, max_length=200)
    endpoint: Endpoint
    completion_window: str = Field(
        pattern=r"^[1-9][0-9]{0,5}[smhd]$",
        description="24h, or another time of up to 14d: a number and s, m, h or d.",
    )
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None

    @property
    def window_seconds(self) -> int:
        found = _WINDOW.fullmatch(self.completion_window)
        assert found is not None, "the pattern holds"
        return min(LONGEST_WINDOW, int(found[1]) * _SECONDS[found[2]])


class BatchesQuery(BaseModel):
    """Which page of batches."""

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    after: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class BatchError(TypedDict):
    """What is wrong with the input file. line: its number, from 1."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(TypedDict):
    object: Literal["list"]
    data: list[BatchError]


class BatchCounts(TypedDict):
    """Lines: all of the file, those in the output file, those in the error file."""

    total: Count
    completed: Count
    failed: Count


class CachedTokens(TypedDict):
    cached_tokens: Count


class ReasoningTokens(TypedDict):
    reasoning_tokens: Count


class BatchUsage(TypedDict):
    """Tokens of the lines that were answered."""

    input_tokens: Count
    input_tokens_details: CachedTokens
    output_tokens: Count
    output_tokens_details: ReasoningTokens
    total_tokens: Count


class BatchObject(TypedDict):
    """A batch. Times are in seconds since 1970."""

    id: str
    object: Literal["batch"]
    endpoint: Endpoint
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(TypedDict):
    object: Literal["list"]
    data: list[BatchObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


@dataclass(frozen=True, slots=True)
class Line:
    """A request of an input file. number: of its line, from 1; body: JSON."""

    number: int
    custom_id: str
    body: bytes


def parse_batch_request(body: bytes) -> BatchRequest:
    """Parse a body. Raises `APIError` with status 400."""
    return parse_body(BatchRequest, body)


def new_batch(id: str, request: BatchRequest, now: int) -> BatchObject:
    return {
        "id": id,
        "object": "batch",
        "endpoint": request.endpoint,
        "errors": None,
        "input_file_id": request.input_file_id,
        "completion_window": request.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "in_progress_at": None,
        "expires_at": now + request.window_seconds,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": batch_usage(()),
        "metadata": request.metadata,
    }


# --- input files ----------------------------------------------------------------------------------


def lines_of(rows: Iterable[bytes]) -> Iterator[Line]:
    """The requests of a file that `errors_of` found nothing wrong with. Blank lines are passed over.

    Raises:
        InputError: a line is wrong nevertheless: the file has changed since.
    """
    for number, row in _rows(rows):
        try:
            found = json.loads(row)
            line = Line(number, found["custom_id"], json.dumps(found["body"]).encode())
        except (ValueError, TypeError, LookupError, RecursionError):
            raise InputError(f"line {number} of the input file is no request any more") from None
        yield line


def errors_of(rows: Iterable[bytes], endpoint: str, max_bytes: int) -> tuple[int, list[BatchError]]:
    """The number of requests in a file, and what is wrong with them; the first `MAX_ERRORS`.

    Args:
        rows: the lines of the file.
        max_bytes: of the body of a request.
    """
    seen, errors, total = dict[bytes, int](), list[BatchError](), 0
    for number, row in _rows(rows):
        total += 1
        problem = _too_long(row, max_bytes) or _problem(row, endpoint, seen, number)
        if problem is not None and len(errors) < MAX_ERRORS:
            code, message, param = problem
            errors.append({"code": code, "message": message, "param": param, "line": number})
        if total > MAX_LINES:
            message = f"the file has more than {MAX_LINES} requests; make several batches"
            return total, [{"code": "too_many_requests", "message": message, "param": None, "line": None}]
    if not total:
        message = "the file has no request; write one JSON object a line"
        errors.append({"code": "empty_file", "message": message, "param": None, "line": None})
    return total, errors


def _rows(rows: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    for number, row in enumerate(rows, 1):
        row = row.removeprefix(BYTE_ORDER_MARK) if number == 1 else row
        if row.strip():
            yield number, row


Problem = tuple[str, str, str | None]  # code, message, field


def _too_long(row: bytes, max_bytes: int) -> Problem | None:
    if len(row) <= max_bytes:
        return None
    return "request_too_large", f"the line has {len(row)} bytes; a request has {max_bytes} at most", None


def _problem(row: bytes, endpoint: str, seen: dict[bytes, int], number: int) -> Problem | None:
    try:
        found = json.loads(row)
    except (ValueError, RecursionError):
        return "invalid_json_line", "this line is no JSON", None
    if not isinstance(found, dict):
        return "invalid_json_line", "this line is no JSON object", None
    if row.count(b"{") + row.count(b"[") > MAX_DEPTH and _is_deeper(found, MAX_DEPTH):
        return "invalid_json_line", f"this line has more than {MAX_DEPTH} levels of objects and lists", None
    for name in ("custom_id", "method", "url", "body"):
        if found.get(name) is None:
            return "missing_required_parameter", f"{name} is missing", name
    custom_id = found["custom_id"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID or not _is_text(custom_id):
        return "invalid_custom_id", f"custom_id is a text of 1 to {MAX_ID} characters", "custom_id"
    if (first := seen.setdefault(id_digest(custom_id), number)) != number:
        return "duplicate_custom_id", f"custom_id {custom_id!r} stands in line {first} too", "custom_id"
    if found["method"] != "POST":
        return "invalid_method", f"method is POST, got {str(found['method'])[:20]!r}", "method"
    if found["url"] != endpoint:
        return "invalid_url", f"url is that of the batch, {endpoint}, got {str(found['url'])[:100]!r}", "url"
    if not isinstance(found["body"], dict):
        return "invalid_body", "body is a JSON object", "body"
    if found["body"].get("stream"):
        return "invalid_body", "body.stream: a line of a batch has no stream", "body.stream"
    return None


def id_digest(custom_id: str) -> bytes:
    """16 bytes that stand for a custom_id, of which there are 50,000 of up to 512 characters."""
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value has more levels of objects and lists: what reads it recursively would fail."""
    level = [value]
    for _ in range(levels):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for values in inner for each in values if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def _is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8: no half of a character."""
    return not any("\ud800" <= each <= "\udfff" for each in text)


# --- output files ---------------------------------------------------------------------------------


def output_row(line: Mapping[str, Any]) -> str:
    """A line of an output file as text: in UTF-8 no longer than what it repeats of the input.

    Only halves of characters, which have no UTF-8, and characters at which `str.splitlines` would split are
    escaped.
    """
    text = json.dumps(line, ensure_ascii=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def answered_line(
    id: str, custom_id: str, status: int, request_id: str, body: Mapping[str, Any]
) -> dict[str, Any]:
    """A line of an output file, or, with a status of 400 or above, of an error file."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": id, "custom_id": custom_id, "response": response, "error": None}


def unanswered_line(id: str, custom_id: str, code: str, message: str) -> dict[str, Any]:
    """A line of an error file for a request that was not made."""
    return {
        "id": id,
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }


def batch_usage(usages: Iterable[Mapping[str, Any]]) -> BatchUsage:
    """The sum of usages, each in the form of chat completions, of responses or of a batch."""
    sums = [0, 0, 0, 0]
    for usage in usages:
        read = usage.get("input_tokens_details") or usage.get("prompt_tokens_details") or {}
        written = usage.get("output_tokens_details") or usage.get("completion_tokens_details") or {}
        counts = (
            usage.get("input_tokens", usage.get("prompt_tokens")),
            read.get("cached_tokens"),
            usage.get("output_tokens", usage.get("completion_tokens")),
            written.get("reasoning_tokens"),
        )
        sums = [total + (count or 0) for total, count in zip(sums, counts, strict=True)]
    return {
        "input_tokens": sums[0],
        "input_tokens_details": {"cached_tokens": sums[1]},
        "output_tokens": sums[2],
        "output_tokens_details": {"reasoning_tokens": sums[3]},
        "total_tokens": sums[0] + sums[2],
    }
