"""The OpenAI-compatible server as an ASGI application: routes, handlers, and error responses.

Leaves out chat completions (`chat_completions`) and the shared state (`service`). Needs the `server` extra.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from viaticum.agents.completions import available_names
from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.openapi import openapi_document
from viaticum.agents.openai_api.responses import Health, ModelList, model_object
from viaticum.agents.server.chat_completions import ChatCompletions
from viaticum.agents.server.metrics import CONTENT_TYPE
from viaticum.agents.server.run import api_error, error_response
from viaticum.agents.server.service import Service


def build_app(service: Service) -> Starlette:
    """The ASGI application of a service."""
    handlers = _Handlers(service)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", ChatCompletions(service), methods=["POST"]),
            Route("/v1/models", handlers.list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", handlers.show_model, methods=["GET"]),
            Route("/health", handlers.health, methods=["GET"]),
            Route("/metrics", handlers.metrics, methods=["GET"]),
            Route("/openapi.json", handlers.openapi, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _not_found, Exception: _error, APIError: _error},
    )


class _Handlers:
    def __init__(self, service: Service) -> None:
        self.service = service

    async def list_models(self, request: Request) -> Response:
        service = self.service
        caller = await service.authenticator.authenticate(request, service.run_in_thread)
        names = await service.run_in_thread(
            lambda: available_names(service.client.derive(residency=caller.residency))
        )
        models: ModelList = {
            "object": "list",
            "data": [model_object(name) for name in names if caller.may_use(name)],
        }
        return JSONResponse(models)

    async def show_model(self, request: Request) -> Response:
        service, name = self.service, request.path_params["name"]
        caller = await service.authenticator.authenticate(request, service.run_in_thread)
        service.check_model(caller, name)
        return JSONResponse(model_object(name))

    async def health(self, request: Request) -> Response:
        draining, limiter = self.service.draining, self.service.limiter
        health: Health = {
            "status": "draining" if draining else "ok",
            "in_flight": limiter.running,
            "queued": limiter.queued,
        }
        return JSONResponse(health, 503 if draining else 200)

    async def metrics(self, request: Request) -> Response:
        service = self.service
        caller = await service.authenticator.authenticate(request, service.run_in_thread)
        text = await service.run_in_thread(service.render_metrics, caller)
        return Response(text, media_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(openapi_document())


async def _error(request: Request, error: Exception) -> Response:
    return error_response(api_error(error))


async def _not_found(request: Request, error: Exception) -> Response:
    """Statuses 404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    reason = "no such address" if error.status_code == 404 else f"{request.method} is not for this address"
    response = error_response(APIError(error.status_code, f"{reason}: {request.url.path}"))
    response.headers.update(error.headers or {})
    return response
