"""OpenAI's batches: a file of requests (`/v1/files`), a batch over it (`/v1/batches`), files of results.

A batch is found again by its metadata. Through OpenAI's own client, which LiteLLM brings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viaticum.models.remote.batch_api import BatchAPI, BatchLine, BatchName, BatchState, Outcome

if TYPE_CHECKING:
    import openai

NAME = "viaticum_batch"  # in the metadata
ENDED = ("completed", "failed", "expired", "cancelled")
FULL = "token_limit_exceeded"  # too many tokens wait in the batches of the account
SKEW = 600.0  # seconds that the provider's clock may differ from ours
_EXPIRED, _CANCELLED = "batch_expired", "batch_cancelled"  # codes of lines that were not answered


class OpenAIBatches(BatchAPI):
    """The batches of one key at OpenAI, or at a server that speaks the same."""

    max_requests, max_bytes = 50_000, 190_000_000
    path = "/v1/chat/completions"
    _client: openai.OpenAI

    def _open(self, **settings: Any) -> openai.OpenAI:
        import openai

        # The user's account at OpenAI is nothing to another server.
        own: dict[str, Any] = {} if settings["base_url"] is None else {"organization": "", "project": ""}
        return openai.OpenAI(**settings, **own)

    def line(self, custom_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return {"custom_id": custom_id, "method": "POST", "url": self.path, "body": body}

    def upload(self, path: Path) -> str:
        with path.open("rb") as file:
            return self._client.files.create(file=(path.name, file), purpose="batch").id

    def create(self, path: Path, file_id: str, name: BatchName, hours: float) -> BatchState:
        batch = self._client.with_options(max_retries=0).batches.create(
            input_file_id=file_id,
            endpoint=self.path,  # type: ignore[arg-type]
            completion_window=f"{hours:g}h",  # type: ignore[arg-type]
            metadata={NAME: name.name},
            extra_headers={"Idempotency-Key": name.name},
        )
        return _state(batch)

    def find(self, name: BatchName) -> BatchState | None:
        for batch in self._client.batches.list(limit=100):
            if (batch.metadata or {}).get(NAME) == name.name:
                return _state(batch)
            if batch.created_at < name.since - SKEW:  # the newest come first
                return None
        return None

    def state(self, id: str) -> BatchState:
        return _state(self._client.batches.retrieve(id))

    def cancel(self, id: str) -> BatchState:
        return _state(self._client.batches.cancel(id))

    def results(self, state: BatchState) -> Iterator[BatchLine]:
        for file in state.files:
            with self._client.files.with_streaming_response.content(file) as response:
                for line in response.iter_lines():
                    if (found := _result(line)) is not None:
                        yield found

    def clean_up(self, state: BatchState) -> None:
        if state.input_file:
            with suppress(Exception):  # it expires by itself
                self._client.files.delete(state.input_file)


def _state(batch: Any) -> BatchState:
    counts, errors = batch.request_counts, (batch.errors.data or ()) if batch.errors else ()
    failed, completed = (getattr(counts, name, None) or 0 for name in ("failed", "completed"))
    return BatchState(
        batch.id,
        batch.status,
        batch.status in ENDED,
        completed + failed,
        completed if counts is not None else None,
        getattr(counts, "total", None) or 0,
        batch.input_file_id or "",
        tuple(file for file in (batch.output_file_id, batch.error_file_id) if file),
        "; ".join(str(each.message or each.code) for each in errors) if batch.status == "failed" else "",
        any(each.code == FULL for each in errors),
    )


def _result(line: str) -> BatchLine | None:
    """A line of a file of results; None where it is none."""
    try:
        values = json.loads(line)
        custom_id, response, error = values["custom_id"], values.get("response"), values.get("error")
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    response, error = response or {}, error or {}
    body = response.get("body") or {}
    if response.get("status_code") == 200 and not error:
        return BatchLine(str(custom_id), "succeeded", body)
    refused = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") or (refused or {}).get("message") or "no answer"
    outcomes: dict[Any, Outcome] = {_EXPIRED: "expired", _CANCELLED: "cancelled"}
    return BatchLine(str(custom_id), outcomes.get(error.get("code"), "errored"), {}, str(message))
