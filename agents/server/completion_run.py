"""Steps of a completion that do not depend on who asked: check it, receive what its thread sends, keep it.

Used by the route, for a client that waits, and by the lines of batches. Leaves out slots and HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from viaticum.agents.completions import CompletionFinished, CompletionStarted
from viaticum.agents.openai_api.api import CompletionAPI, CompletionBody, ResponseWriter
from viaticum.agents.openai_api.errors import request_timeout
from viaticum.agents.openai_api.responses import ViaticumExtension, viaticum_extension
from viaticum.agents.server.auth import Caller
from viaticum.agents.server.run import CostSummary, Run, RunItem
from viaticum.agents.server.service import Service
from viaticum.errors import one_line

_log = logging.getLogger("viaticum")


async def checked_completion(
    service: Service, api: CompletionAPI, caller: Caller, request: CompletionBody
) -> CompletionBody:
    """A parsed request of a model that the caller may use, with its conversation. Raises `APIError`."""
    service.check_model(caller, request.model)
    return await service.run_in_thread(api.load, request, caller.owner)


async def receive(service: Service, run: Run) -> list[RunItem]:
    """The next items of a run, recorded in it; empty at the end. Raises `APIError` at its deadline."""
    try:
        async with asyncio.timeout_at(run.deadline):
            items = await run.channel.get()
    except TimeoutError:
        raise request_timeout(service.limits.timeout) from None
    for item in items:
        if isinstance(item, CostSummary):
            continue
        _, event = item
        if isinstance(event, CompletionStarted):
            if not run.route:
                label = service.model_label(run.request.model)
                service.metrics.first_seconds.labels(label).observe(time.perf_counter() - run.started)
            run.route = run.route or event.route
        elif isinstance(event, CompletionFinished):
            run.finished.append(event)
    return items


async def whole_response(
    service: Service, api: CompletionAPI, run: Run
) -> tuple[Mapping[str, Any], ViaticumExtension, CostSummary]:
    """Wait for the end of a run; returns its response, which is kept where the API keeps responses."""
    summary = CostSummary(0, None)
    while items := await receive(service, run):
        summary = next((item for item in items if isinstance(item, CostSummary)), summary)
    extension = extension_of(run, summary)
    writer = api.writer(run.id, run.request)
    await keep(service, api, run, writer, extension)
    return writer.whole(run.finished, extension), extension, summary


async def keep(
    service: Service, api: CompletionAPI, run: Run, writer: ResponseWriter, extension: ViaticumExtension
) -> None:
    """Let the API keep the response, where it does that."""
    if not api.keeps:
        return
    response = writer.whole(run.finished, extension)
    try:
        await service.run_in_thread(api.keep, run.request, run.caller.owner, run.finished, response)
    except Exception as error:  # the answer is paid for: it is given, and cannot be asked for by its id
        _log.error("a response is not kept: %s", one_line(error))


def extension_of(run: Run, summary: CostSummary) -> ViaticumExtension:
    return viaticum_extension(run.finished[-1], route=run.route, cost=summary.cost, left=summary.left)
