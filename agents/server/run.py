"""One request of the server: its limits, what comes out of it, and how it is refused.

Leaves out who runs it (`server`) and how it is carried to the client (`chats`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from starlette.responses import JSONResponse, Response

from viaticum.agents.completions import CompletionFinished, CompletionStarted
from viaticum.agents.openai_api.requests import APIError, ChatRequest, refusal_of
from viaticum.agents.server.auth import Caller
from viaticum.agents.server.channel import Channel
from viaticum.errors import InputError

log = logging.getLogger("viaticum.server")


@dataclass(frozen=True)
class Limits:
    """concurrency: calls at once; queue: requests that wait for their turn; per_minute: requests of each key; timeout:
    seconds for a whole request; patience: seconds that a client may read nothing, or send no more of its body."""

    concurrency: int = 8
    queue: int = 64
    per_minute: int | None = None
    timeout: float = 600.0
    patience: float = 30.0
    body_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("queue", 0), ("body_bytes", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {least} or more, got {getattr(self, name)}")
        for name in ("timeout", "patience"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is above 0 seconds, got {getattr(self, name)}")
        if self.per_minute is not None and self.per_minute < 1:
            raise InputError(f"the rate is 1 request a minute or more, got {self.per_minute}")


@dataclass(frozen=True, slots=True)
class CostSummary:
    """The end of a request: what all its calls cost, and what is left; None where dollars are not limited."""

    cost: int
    left: int | None


Item = tuple[int, CompletionStarted | str | CompletionFinished] | CostSummary


@dataclass(eq=False)
class Run:
    """One request that has a place."""

    id: str
    asked: ChatRequest
    caller: Caller
    channel: Channel[Item]
    deadline: float
    began: float
    done: list[CompletionFinished] = field(default_factory=list)
    route: str = ""


def shutting_down() -> APIError:
    return APIError(
        503,
        "the server is shutting down; try again",
        type="server_error",
        code="shutting_down",
        retry_after=5,
    )


def too_late(seconds: float) -> APIError:
    return APIError(
        504, f"no answer within {seconds:g} seconds; ask for less", type="server_error", code="timeout"
    )


def refusal(error: Exception) -> APIError:
    found = refusal_of(error)
    if found is None:
        log.error("a request broke", exc_info=error)
        return APIError(500, "the server made a mistake; its log says which", type="server_error")
    return found


def answer_of(refusal: APIError) -> Response:
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)
