"""Errors of OpenAI's API: HTTP status and error object, and the mapping of Viaticum's errors onto them.

Leaves out how a server sends them.
"""

from __future__ import annotations

import math

from typing_extensions import TypedDict  # which pydantic can make schemas of

from viaticum.errors import (
    AuthenticationFailed,
    BudgetClosed,
    BudgetExceeded,
    ContentRefused,
    DeadlineExceeded,
    InputError,
    LedgerError,
    MissingExtra,
    ModelError,
    ModelNotAllowed,
    ModelUnavailable,
    PromptTooLong,
    ProviderTimeout,
    ProviderUnavailable,
    QuotaExhausted,
    RateLimited,
    UnknownName,
    UnknownPrice,
    ViaticumError,
    WeightsError,
)

MAX_MESSAGE = 1_000  # characters: a message may quote what was sent
INVALID_KEY = "invalid_api_key"
RETRY_SECONDS = 5  # where a provider that is busy does not say when to come back
KEY_HEADERS = ("api-key", "x-api-key")  # of Azure's and Anthropic's clients, beside the bearer token


class ErrorObject(TypedDict):
    """What went wrong. `param` names the field of the request, where it is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    """The body of a response with status 400 or above, and the last event of a stream that failed."""

    error: ErrorObject


class APIError(Exception):
    """An error response.

    Args:
        status: HTTP status.
        message: what was wrong and what to do.
        type: OpenAI's class of the error.
        code: machine-readable reason.
        param: the field of the request that is wrong.
        retry_after: seconds after which a retry may succeed.
        may_retry: False where a retry costs again what this request has cost. OpenAI's clients, which retry
            every status from 500 on, do not then.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        may_retry: bool = True,
    ) -> None:
        message, param = cut_message(message), param and cut_message(param)
        super().__init__(message)
        self.status, self.retry_after, self.may_retry = status, retry_after, may_retry
        self.error: ErrorObject = {"message": message, "type": type, "param": param, "code": code}

    @property
    def body(self) -> ErrorResponse:
        return {"error": self.error}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if not self.may_retry:
            headers["x-should-retry"] = "false"
        return headers | ({"www-authenticate": "Bearer"} if self.error["code"] == INVALID_KEY else {})


def cut_message(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


def to_api_error(error: BaseException) -> APIError | None:
    """The response to an error of Viaticum; None for any other exception, which is a bug of the server."""
    match error:
        case APIError():
            return error
        case BudgetExceeded():
            return APIError(402, str(error), type="insufficient_quota", code="budget_exceeded")
        case BudgetClosed():
            return APIError(402, str(error), type="insufficient_quota", code="budget_closed")
        case ModelNotAllowed():
            return APIError(403, str(error), type="permission_error", code="model_not_allowed", param="model")
        case UnknownName() if error.kind in ("model", "strategy"):
            return model_not_found(str(error))
        case WeightsError() | MissingExtra():
            return model_not_found(str(error))
        case PromptTooLong():
            return APIError(400, str(error), code="context_length_exceeded", param="messages")
        case UnknownPrice():
            return APIError(400, str(error), code="unknown_price", param="model")
        case InputError():
            return APIError(400, str(error))
        case ModelError():
            return _model_error(error)
        case LedgerError():
            return APIError(503, str(error), type="server_error", code="ledger_unavailable", retry_after=1)
        case ViaticumError():
            return APIError(500, str(error), type="server_error")
    return None


def _model_error(error: ModelError) -> APIError:
    """The response to an error of a model or its provider, with the status that the provider gave it."""
    message = str(error)
    match error:
        case ContentRefused():
            return APIError(400, message, code="content_policy_violation", param="messages")
        case AuthenticationFailed():  # the server's key at the provider
            return APIError(401, message, type="authentication_error", code="provider_key_rejected")
        case QuotaExhausted():
            return APIError(402, message, type="insufficient_quota", code="provider_quota_exhausted")
        case RateLimited():
            return rate_limit_exceeded(_whole_seconds(error.retry_after), message)
        case ProviderTimeout():
            return APIError(504, message, type="server_error", code="provider_timeout", may_retry=False)
        case DeadlineExceeded():
            return APIError(504, message, type="server_error", code="timeout", may_retry=False)
        case ModelUnavailable():
            return overloaded(RETRY_SECONDS, message)
    seconds = error.retry_after if isinstance(error, ProviderUnavailable) else None
    retry_after = None if seconds is None else _whole_seconds(seconds)
    return APIError(502, message, type="server_error", code="model_failed", retry_after=retry_after)


def _whole_seconds(seconds: float | None) -> int:
    return RETRY_SECONDS if seconds is None else max(1, math.ceil(seconds))


def model_not_found(message: str) -> APIError:
    return APIError(404, message, code="model_not_found", param="model")


def invalid_api_key() -> APIError:
    return APIError(
        401,
        "no valid API key; send Authorization: Bearer KEY (or api-key, x-api-key), made by "
        "`viaticum keys create`",
        code=INVALID_KEY,
    )


def rate_limit_exceeded(retry_after: int, message: str = "too many requests; slow down") -> APIError:
    return APIError(
        429,
        message,
        type="rate_limit_exceeded",
        code="rate_limit_exceeded",
        retry_after=retry_after,
    )


def overloaded(retry_after: int, message: str = "the server is busy; try again") -> APIError:
    return APIError(
        503,
        message,
        type="server_error",
        code="overloaded",
        retry_after=retry_after,
    )


def shutting_down() -> APIError:
    return APIError(
        503,
        "the server is shutting down; try again",
        type="server_error",
        code="shutting_down",
        retry_after=5,
    )


def request_timeout(seconds: float) -> APIError:
    message = f"no answer within {seconds:g} seconds; ask for less"
    return APIError(504, message, type="server_error", code="timeout", may_retry=False)


def internal_error() -> APIError:
    return APIError(500, "the server made a mistake; its log says which", type="server_error")
