"""One request while it runs: limits, state, the items that its thread sends, and error responses.

Leaves out who runs it (`service`) and how it is sent to the client (`completion_route`).
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.responses import JSONResponse, Response

from viaticum.agents.completions import CompletionFinished, CompletionStarted
from viaticum.agents.openai_api.api import CompletionAPI, CompletionBody
from viaticum.agents.openai_api.errors import APIError, internal_error, to_api_error
from viaticum.agents.server.auth import Caller
from viaticum.agents.server.channel import Channel
from viaticum.agents.workflow.deadlines import Deadline
from viaticum.errors import InputError
from viaticum.types import ThinkingDelta

log = logging.getLogger("viaticum.server")
REQUEST_ID = ContextVar("REQUEST_ID", default="")  # of the request that is being answered


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Args:
        concurrency: calls at once.
        queue: requests that wait for a free slot.
        per_minute: requests of each key.
        timeout: seconds for a whole request.
        stall_timeout: seconds that a client may read nothing, or take for the head or the body of a request.
        body_bytes: size of a request body, also when it is decompressed, and of a line of a batch.
        file_bytes: size of an uploaded file.
        connections: open at once; fewer where the process may not open as many files.
        keep_alive: seconds without an event after which a stream has a comment.

    Raises:
        InputError: a limit is out of range.
    """

    concurrency: int = 8
    queue: int = 64
    per_minute: int | None = None
    timeout: float = 600.0
    stall_timeout: float = 30.0
    body_bytes: int = 1 << 20
    file_bytes: int = 200_000_000
    connections: int = 1000
    keep_alive: float = 15.0

    def __post_init__(self) -> None:
        whole = ("concurrency", "body_bytes", "file_bytes", "connections")
        for name, least in (("queue", 0), *((name, 1) for name in whole)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {least} or more, got {getattr(self, name)}")
        # The command's option for the stall timeout is --patience.
        for option, seconds in (
            ("timeout", self.timeout),
            ("patience", self.stall_timeout),
            ("keep_alive", self.keep_alive),
        ):
            if not seconds > 0:
                raise InputError(f"{option} is above 0 seconds, got {seconds}")
        if self.per_minute is not None and self.per_minute < 1:
            raise InputError(f"the rate is 1 request a minute or more, got {self.per_minute}")


@dataclass(frozen=True, slots=True)
class CostSummary:
    """The last item of a request.

    Args:
        cost: of all its calls, in nano-dollars.
        left: of the budget, in nano-dollars; None where dollars are not limited.
    """

    cost: int
    left: int | None


# What a thread sends: the index of a choice with its start, a piece of its text or its end; at last the cost.
RunItem = tuple[int, CompletionStarted | str | ThinkingDelta | CompletionFinished] | CostSummary


@dataclass(eq=False)
class Run:
    """A request that holds a slot.

    Args:
        deadline: time of the event loop at which it is cancelled.
        limit: the deadline that the request has asked for; None for the server's alone.
        session: a name of the conversation that it belongs to; None for none.
        started: `time.perf_counter` when the request came in.
        finished: the choices so far.
        route: who writes the first choice.
        is_batch_line: it has a background slot, and is asked again under the same id after a kill.
        waits_aside: where its provider lets it wait, it ends by `ProviderWait`, and is asked again later.
    """

    id: str
    request: CompletionBody
    caller: Caller
    channel: Channel[RunItem]
    deadline: float
    started: float
    limit: Deadline | None = None
    session: str | None = None
    finished: list[CompletionFinished] = field(default_factory=list)
    route: str = ""
    is_batch_line: bool = False
    waits_aside: bool = False


def api_error(error: Exception) -> APIError:
    """The response to any exception; one that is no error of Viaticum is logged and has status 500."""
    found = to_api_error(error)
    if found is None:
        log.error("request %s failed", REQUEST_ID.get(), exc_info=error)
        return internal_error()
    return found


def error_response(error: APIError, api: CompletionAPI | None = None) -> Response:
    """An error in the form of an API; None for OpenAI's."""
    body = error.body if api is None else api.error_body(error)
    return JSONResponse(body, error.status, headers=error.headers)
