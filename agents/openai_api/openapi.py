"""The OpenAPI 3.1 document of the server, made from the models that read its requests. A test compares it with what
the server does (schemathesis).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from viaticum import __version__
from viaticum.agents.openai_api.requests import ChatRequest

_INTEGER = {"type": "integer"}
_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
_MAYBE_TEXT = {"type": ["string", "null"]}


def _object(properties: dict[str, Any], *optional: str) -> dict[str, Any]:
    needed = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": needed}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


_USAGE = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
        "completion_tokens_details": _object({"reasoning_tokens": _COUNT}),
    }
)
_TOLD = _object(
    {
        "route": _TEXT,
        "routes": {"type": "array", "items": _TEXT},
        "answer": _MAYBE_TEXT,
        "reason": _TEXT,
        "cost_nanousd": _COUNT,
        "cost_usd": {"type": "number", "minimum": 0},
        "left_nanousd": {"type": ["integer", "null"]},
        "usage": {
            "type": "object",
            "additionalProperties": _object({"input_tokens": _COUNT, "output_tokens": _COUNT}),
        },
    }
)
_CHOICE = _object(
    {
        "index": _COUNT,
        "message": _object(
            {
                "role": {"const": "assistant"},
                "content": _MAYBE_TEXT,
                "refusal": {"type": "null"},
                "tool_calls": {"type": "array", "items": {"type": "object"}},
            },
            "tool_calls",
        ),
        "logprobs": {"type": ["object", "null"]},
        "finish_reason": {"enum": ["stop", "length", "tool_calls", "content_filter"]},
    }
)
_COMPLETION = _object(
    {
        "id": _TEXT,
        "object": {"const": "chat.completion"},
        "created": _INTEGER,
        "model": _TEXT,
        "system_fingerprint": {"type": "null"},
        "choices": {"type": "array", "items": _CHOICE, "minItems": 1},
        "usage": _ref("Usage"),
        "viaticum": _ref("Viaticum"),
    }
)
_ERROR = _object(
    {"error": _object({"message": _TEXT, "type": _TEXT, "param": _MAYBE_TEXT, "code": _MAYBE_TEXT})}
)
_MODEL = _object(
    {"id": _TEXT, "object": {"const": "model"}, "created": _INTEGER, "owned_by": {"const": "viaticum"}}
)
_HEALTH = _object({"status": {"enum": ["ok", "draining"]}, "in_flight": _COUNT, "queued": _COUNT})

_RETRY = {"retry-after": {"schema": _INTEGER, "description": "Seconds.", "required": False}}
_WHY = {
    "400": "What was asked cannot be done; the message says what is wrong.",
    "401": "No valid key: missing, wrong, revoked, or of another budget, all alike.",
    "402": "The worst case does not fit the budget; nothing was charged.",
    "404": "No such model, or none that this key may use.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "429": "More requests than the key's rate allows.",
    "502": "The model failed; what it wrote until then is charged.",
    "503": "Busy, shutting down, or the ledger cannot be used.",
    "504": "No answer in time; what was written is charged.",
}


def _errors(*statuses: str) -> dict[str, Any]:
    return {
        status: {
            "description": _WHY[status],
            "content": _json(_ref("Error")),
            **({"headers": _RETRY} if status in ("429", "503") else {}),
        }
        for status in statuses
    }


def _ok(what: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"200": {"description": what, "content": _json(schema)}}


_CHAT = {
    "operationId": "createChatCompletion",
    "summary": "Answer a chat within a budget.",
    "requestBody": {"required": True, "content": _json(_ref("ChatRequest"))},
    "responses": {
        "200": {
            "description": "The answer; with stream: true as server-sent events of chat.completion.chunk objects, "
            "[DONE] at the end, an error object where it broke in the middle.",
            "headers": {
                "x-viaticum-route": {"schema": _TEXT, "description": "Who wrote it.", "required": True},
                "x-viaticum-cost": {"schema": _COUNT, "description": "Nano-dollars; not of a stream."},
                "x-viaticum-cost-usd": {"schema": {"type": "string", "pattern": r"^\d+\.\d{9}$"}},
                "x-viaticum-left": {"schema": _INTEGER, "description": "Nano-dollars; not of a stream."},
            },
            "content": {
                "application/json": {"schema": _ref("ChatCompletion")},
                "text/event-stream": {"schema": _TEXT},
            },
        },
        **_errors("400", "401", "402", "404", "408", "413", "429", "502", "503", "504"),
    },
}


@cache
def document() -> dict[str, Any]:
    request = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = {
        **request.pop("$defs", {}),
        "ChatRequest": request,
        "ChatCompletion": _COMPLETION,
        "Usage": _USAGE,
        "Viaticum": _TOLD,
        "Error": _ERROR,
        "Model": _MODEL,
        "Health": _HEALTH,
    }
    models = _object({"object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}})
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Viaticum",
            "version": __version__,
            "description": "OpenAI's chat completions, each within a hard budget.",
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}, {}],
        "paths": {
            "/v1/chat/completions": {"post": _CHAT},
            "/v1/models": {
                "get": {
                    "operationId": "listModels",
                    "summary": "The names that can be asked for.",
                    "responses": {**_ok("The names.", models), **_errors("401")},
                }
            },
            "/v1/models/{name}": {
                "get": {
                    "operationId": "showModel",
                    "summary": "One name.",
                    "parameters": [name],
                    "responses": {**_ok("The name.", _ref("Model")), **_errors("401", "404")},
                }
            },
            "/health": {
                "get": {
                    "operationId": "health",
                    "summary": "Whether requests are taken.",
                    "security": [{}],
                    "responses": {
                        **_ok("They are.", _ref("Health")),
                        "503": {"description": "It is shutting down.", "content": _json(_ref("Health"))},
                    },
                }
            },
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "summary": "Counts for Prometheus.",
                    "responses": {
                        "200": {
                            "description": "Text format 0.0.4.",
                            "content": {"text/plain": {"schema": _TEXT}},
                        },
                        **_errors("401"),
                    },
                }
            },
            "/openapi.json": {
                "get": {
                    "operationId": "document",
                    "summary": "This document.",
                    "security": [{}],
                    "responses": _ok("The document.", {"type": "object"}),
                }
            },
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Needed as soon as there is a key.",
                }
            },
        },
    }
