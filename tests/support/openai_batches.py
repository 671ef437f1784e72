"""Batches of a running server through OpenAI's SDK, unchanged."""

from __future__ import annotations

import json
from typing import Any

import openai
from viaticum_server import RunningServer, chat_body, wait_until

from viaticum.agents.server.batch_run import ENDED

CHAT = "/v1/chat/completions"


def sdk(server: RunningServer, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def line(custom_id: str, model: str = "fast", url: str = CHAT, **body: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": url,
        "body": {**chat_body(model), **body},
    }


def jsonl(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def create(client: openai.OpenAI, content: bytes, **settings: Any) -> Any:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    settings = {"endpoint": CHAT, "completion_window": "24h", **settings}
    return client.batches.create(input_file_id=file.id, **settings)


def ended(client: openai.OpenAI, batch: Any) -> Any:
    wait_until(lambda: client.batches.retrieve(batch.id).status in ENDED)
    return client.batches.retrieve(batch.id)


def rows(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """The lines of a file by their custom ids, each of which stands there once."""
    if file_id is None:
        return {}
    found = [json.loads(each) for each in client.files.content(file_id).text.splitlines()]
    by_id = {each["custom_id"]: each for each in found}
    assert len(by_id) == len(found)
    return by_id
