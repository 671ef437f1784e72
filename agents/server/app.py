"""The server as an ASGI application: the routes of its APIs, handlers, and error responses.

Leaves out completions (`completion_route`) and the shared state (`service`). Needs the `server` extra.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from viaticum.agents.anthropic_api.api import Messages
from viaticum.agents.anthropic_api.requests import CountRequest, parse_count
from viaticum.agents.anthropic_api.responses import TokensCount
from viaticum.agents.completions import CompletionRequest, available_names, count_prompt
from viaticum.agents.openai_api.api import CompletionAPI
from viaticum.agents.openai_api.chat import ChatCompletions
from viaticum.agents.openai_api.errors import APIError
from viaticum.agents.openai_api.responses import Health, model_list, model_object
from viaticum.agents.responses_api.api import Responses
from viaticum.agents.responses_api.responses import DeletedResponse
from viaticum.agents.responses_api.store import ResponseStore
from viaticum.agents.server.auth import Caller
from viaticum.agents.server.batch_lines import LineAnswers
from viaticum.agents.server.batch_routes import Batches
from viaticum.agents.server.batch_runner import BatchRunner
from viaticum.agents.server.body import read_request
from viaticum.agents.server.completion_route import CompletionRoute
from viaticum.agents.server.embeddings import Embeddings
from viaticum.agents.server.file_routes import Files
from viaticum.agents.server.metrics import CONTENT_TYPE
from viaticum.agents.server.openapi import openapi_document
from viaticum.agents.server.run import REQUEST_ID, api_error, error_response
from viaticum.agents.server.service import Service
from viaticum.errors import ViaticumError

MESSAGES = Messages(REQUEST_ID.get)
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


def build_app(service: Service) -> Starlette:
    """The ASGI application of a service. Its `state.batches` answers batches once it is started."""
    embeddings, chat = Embeddings(service), ChatCompletions()
    handlers, responses = _Handlers(service, embeddings), Responses(service.responses)
    answers = LineAnswers(service, embeddings, {CHAT: chat, RESPONSES: responses})
    runner = None if service.files is None else BatchRunner(service, service.files, answers)
    app = Starlette(
        routes=[
            Route(CHAT, CompletionRoute(service, chat), methods=["POST"]),
            Route("/v1/messages", CompletionRoute(service, MESSAGES), methods=["POST"]),
            Route("/v1/messages/count_tokens", handlers.count_tokens, methods=["POST"]),
            Route(RESPONSES, CompletionRoute(service, responses), methods=["POST"]),
            Route("/v1/responses/{id}", handlers.show_response, methods=["GET"]),
            Route("/v1/responses/{id}", handlers.delete_response, methods=["DELETE"]),
            Route("/v1/embeddings", embeddings.create, methods=["POST"]),
            *Files(service, service.files, service.limits.file_bytes).routes,
            *Batches(service, service.files, runner).routes,
            Route("/v1/models", handlers.list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", handlers.show_model, methods=["GET"]),
            Route("/health", handlers.health, methods=["GET"]),
            Route("/metrics", handlers.metrics, methods=["GET"]),
            Route("/openapi.json", handlers.openapi, methods=["GET"]),
        ],
        exception_handlers={
            HTTPException: _not_found,
            APIError: _error,
            ViaticumError: _error,
            Exception: _error,  # of a mistake; it is raised again, and the connection ends
        },
    )
    app.state.batches = runner
    return app


class _Handlers:
    def __init__(self, service: Service, embeddings: Embeddings) -> None:
        self.service, self.embeddings = service, embeddings

    async def list_models(self, request: Request) -> Response:
        service = self.service
        caller = await service.authenticator.authenticate(request, service.run_in_thread)
        names = await service.run_in_thread(
            lambda: available_names(service.client.derive(residency=caller.residency))
        )
        names += await service.run_in_thread(self.embeddings.names, caller)
        return JSONResponse(model_list(name for name in names if caller.may_use(name)))

    async def show_model(self, request: Request) -> Response:
        service, name = self.service, request.path_params["name"]
        caller = await service.authenticator.authenticate(request, service.run_in_thread)
        if name not in self.embeddings.known(caller):
            service.check_model(caller, name)
        return JSONResponse(model_object(name))

    async def show_response(self, request: Request) -> Response:
        store, scope, name = await self._kept(request)
        body = None if store is None else await self.service.run_in_thread(store.body, name, scope)
        if body is None:
            raise _no_response(name)
        return JSONResponse(body)

    async def delete_response(self, request: Request) -> Response:
        store, scope, name = await self._kept(request)
        if store is None or not await self.service.run_in_thread(store.delete, name, scope):
            raise _no_response(name)
        deleted: DeletedResponse = {"id": name, "object": "response.deleted", "deleted": True}
        return JSONResponse(deleted)

    async def _kept(self, request: Request) -> tuple[ResponseStore | None, str, str]:
        """The store, the scope whose responses the caller sees, and the id that was asked for."""
        service = self.service
        caller = await service.authenticator.authenticate(request, service.run_in_thread)
        return service.responses, caller.owner, request.path_params["id"]

    async def count_tokens(self, request: Request) -> Response:
        service = self.service
        caller, counted = await read_request(service, request, parse_count)
        service.check_model(caller, counted.model)
        tokens = await service.run_in_slot(caller, self._count, counted, caller)  # weights may load first
        return JSONResponse(TokensCount(input_tokens=tokens))

    def _count(self, request: CountRequest, caller: Caller) -> int:
        messages, extra = request.to_messages(), request.to_extra()
        completion = CompletionRequest(
            request.model, messages, caller.scope, "", extra=extra, residency=caller.residency
        )
        return count_prompt(self.service.client, completion)

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
    return error_response(api_error(error), _api_of(request))


async def _not_found(request: Request, error: Exception) -> Response:
    """Statuses 404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    reason = "no such address" if error.status_code == 404 else f"{request.method} is not for this address"
    response = error_response(APIError(error.status_code, f"{reason}: {request.url.path}"), _api_of(request))
    response.headers.update(error.headers or {})
    return response


def _no_response(id: str) -> APIError:
    return APIError(404, f"no response {id!r} is kept", code="not_found", param="response_id")


def _api_of(request: Request) -> CompletionAPI | None:
    """The API in whose form an error is told; None for OpenAI's."""
    return MESSAGES if request.url.path.startswith("/v1/messages") else None
