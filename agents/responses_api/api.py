"""The Responses API as an API of the server, with the store that conversations go on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from viaticum.agents.completions import CompletionFinished
from viaticum.agents.openai_api.api import CompletionAPI, CompletionBody, ResponseWriter
from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.responses_api.requests import ResponseRequest, parse_response_request
from viaticum.agents.responses_api.responses import ResponsesWriter
from viaticum.agents.responses_api.store import ResponseStore
from viaticum.residency import Residency
from viaticum.types import Message


class Responses(CompletionAPI):
    """POST /v1/responses. store: None keeps nothing."""

    id_prefix = "resp_"

    def __init__(self, store: ResponseStore | None = None) -> None:
        self.store = store
        self.keeps = store is not None

    def parse(self, body: bytes) -> CompletionBody:
        return parse_response_request(body)

    def load(self, body: CompletionBody, scope: str) -> CompletionBody:
        assert isinstance(body, ResponseRequest)
        if self.store is None:
            body.store = False
        if (previous := body.previous_response_id) is None:
            return body
        if self.store is None:
            raise APIError(
                400,
                "previous_response_id: no responses are kept here; send the whole conversation",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        kept = self.store.conversation(previous, scope)
        if kept is None:
            raise APIError(
                400,
                f"previous_response_id: no response {previous!r} is kept; send the whole conversation",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        earlier, residency = kept
        if lacking := set(residency.groups) - set(Residency.of(body.only).groups):
            raise APIError(
                400,
                f"only: the conversation went to models labelled {Residency(tuple(sorted(lacking)))} alone; "
                "say so again",
                param="only",
            )
        return body.continued(earlier)

    def writer(self, id: str, body: CompletionBody) -> ResponseWriter:
        assert isinstance(body, ResponseRequest)
        return ResponsesWriter(id, body)

    def keep(
        self,
        body: CompletionBody,
        scope: str,
        finished: Sequence[CompletionFinished],
        response: Mapping[str, Any],
    ) -> None:
        assert isinstance(body, ResponseRequest)
        if self.store is None or not body.is_stored:
            return
        new, previous = body.conversation(), body.previous_response_id
        earlier = body.earlier
        if tuple(new[: len(earlier)]) == earlier:
            new = new[len(earlier) :]
        else:
            previous = None  # it changed an earlier turn, so that all of it is kept anew
        messages = [*new, _turn(finished[-1])]
        residency = Residency.of(body.only)
        self.store.put(response["id"], scope, previous, messages, response, residency=residency)


def _turn(done: CompletionFinished) -> Message:
    """The assistant's turn, as it is sent again."""
    turn: Message = {"role": "assistant", "content": done.text}
    if done.tool_calls:
        turn["tool_calls"] = [dict(call) for call in done.tool_calls]
    return turn
