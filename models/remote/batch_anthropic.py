"""Anthropic's message batches: requests and batch in one call, results as a stream of lines.

A batch has no metadata: it is found again by its age, the number of its requests and, once it has ended, the
ids of these. Through Anthropic's own client.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viaticum.models.remote.batch_api import BatchAPI, BatchLine, BatchName, BatchState, MaybeSent, Outcome

if TYPE_CHECKING:
    import anthropic

SKEW = 600.0  # seconds that the provider's clock may differ from ours
_OUTCOMES: dict[str, Outcome] = {"succeeded": "succeeded", "expired": "expired", "canceled": "cancelled"}


class AnthropicBatches(BatchAPI):
    """The message batches of one key."""

    max_requests, max_bytes = 100_000, 240_000_000
    path = "/v1/messages"
    _client: anthropic.Anthropic

    def _open(self, **settings: Any) -> anthropic.Anthropic:
        import anthropic

        return anthropic.Anthropic(**settings)

    def line(self, custom_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return {"custom_id": custom_id, "params": body}

    def upload(self, path: Path) -> str:
        return ""

    def create(self, path: Path, file_id: str, name: BatchName, hours: float) -> BatchState:
        with path.open(encoding="utf-8") as file:
            requests = [json.loads(line) for line in file]
        return _state(self._client.with_options(max_retries=0).messages.batches.create(requests=requests))

    def find(self, name: BatchName) -> BatchState | None:
        undecided = False
        for batch in self._client.messages.batches.list(limit=100):
            if batch.created_at.timestamp() < name.since - SKEW:  # the newest come first
                break
            state = _state(batch)
            if state.total != name.requests or state.id in name.others:
                continue
            if not state.ended or not state.files:
                undecided = True
            elif any(line.custom_id.startswith(f"{name.name}_") for line in self._first(state)):
                return state
        if undecided:
            raise MaybeSent(f"a batch of {name.requests} requests is at work that may be {name.name}")
        return None

    def _first(self, state: BatchState) -> Iterator[BatchLine]:
        """The first line of the results."""
        lines = self.results(state)
        yield from (line for line, _ in zip(lines, range(1), strict=False))

    def state(self, id: str) -> BatchState:
        return _state(self._client.messages.batches.retrieve(id))

    def cancel(self, id: str) -> BatchState:
        return _state(self._client.messages.batches.cancel(id))

    def results(self, state: BatchState) -> Iterator[BatchLine]:
        if not state.files:  # removed by the provider, or not there yet: its client would raise
            return
        for each in self._client.messages.batches.results(state.id):
            kind = each.result.type
            body = each.result.message.to_dict(mode="json") if each.result.type == "succeeded" else {}
            outcome = _OUTCOMES.get(kind, "errored")
            yield BatchLine(each.custom_id, outcome, body, "" if body else _message(each.result))

    def clean_up(self, state: BatchState) -> None:
        """The requests were no file, and the provider removes the results after 29 days."""


def _state(batch: Any) -> BatchState:
    counts = batch.request_counts
    done = counts.succeeded + counts.errored + counts.canceled + counts.expired
    ended = batch.processing_status == "ended"
    return BatchState(
        batch.id,
        batch.processing_status,
        ended,
        done,
        counts.succeeded if ended else None,
        done + counts.processing,
        files=(batch.results_url,) if batch.results_url else (),
    )


def _message(result: Any) -> str:
    error = getattr(getattr(result, "error", None), "error", None)
    return str(getattr(error, "message", None) or f"the request was {result.type}")
