"""Translation of a provider's errors: which `ViaticumError` one is, whether to retry, and after how long.

LiteLLM's errors are classified by the HTTP status that all of them carry. Leaves out the waiting and retrying
itself (`models.remote.model`).
"""

from __future__ import annotations

import ast
import json
import random
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from viaticum.catalogue import ModelSpec
from viaticum.errors import (
    AuthenticationFailed,
    ContentRefused,
    InputError,
    ModelError,
    PromptTooLong,
    ProviderTimeout,
    ProviderUnavailable,
    QuotaExhausted,
    RateLimited,
    ViaticumError,
    one_line,
)

MAX_WAIT = 60.0  # seconds; a longer retry-after is left to the caller
FIRST_WAIT = 0.5  # seconds
LONGEST = 300  # characters of what a provider said
_CONTEXT_PATTERN = re.compile(
    r"context.{0,20}(window|length)|maximum context|too many tokens|prompt is too long", re.I
)
_ERROR_PREFIX = re.compile(r"^(litellm\.)?(\w+(Error|Exception)( -|:)\s*|litellm\.\w+:\s*)+")
_REFUSAL_PATTERN = re.compile(r"content.{0,3}(policy|filter|management)|safety (system|filter)", re.I)
# As OpenAI, DeepSeek, Anthropic and OpenRouter say it, with status 429, 402 or 400.
_QUOTA_PATTERN = re.compile(
    r"insufficient[_ ](quota|balance|credit|fund)|credit balance is too low|billing.{0,20}limit"
    r"|API usage limits",
    re.I,
)


def error_kind(error: Exception) -> type[ViaticumError]:
    """What an error of LiteLLM, of a provider's own library, or of the connection is to us.

    All of them carry the HTTP status. `ModelError` where it says nothing that is known.
    """
    if isinstance(error, ViaticumError):
        return type(error)
    status, text = getattr(error, "status_code", None), str(getattr(error, "message", None) or error)
    name = type(error).__name__
    if _timed_out_after_send(error):
        return ProviderTimeout
    if name == "ContextWindowExceededError" or (status in (400, 413) and _CONTEXT_PATTERN.search(text)):
        return PromptTooLong
    if name == "ContentPolicyViolationError" or (status == 400 and _REFUSAL_PATTERN.search(text)):
        return ContentRefused
    if _is_out_of_credit(error):
        return QuotaExhausted
    if status in (401, 403):
        return AuthenticationFailed
    if status == 429:
        return RateLimited
    if status in (400, 404, 405, 409, 413, 415, 422):
        return InputError
    if isinstance(status, int) or _is_connection(error):
        return ProviderUnavailable
    return ModelError


def translate_error(
    error: Exception, spec: ModelSpec, key: str | None = None, *, has_begun: bool = False
) -> ViaticumError:
    """Return our error for one of LiteLLM or the connection.

    key: API key, removed from the message.
    has_begun: whether a part of the answer had arrived, so that it is not the request that is wrong.
    """
    if isinstance(error, ViaticumError):
        return error
    kind, message = error_kind(error), _message(error, key)
    if has_begun and kind is InputError:
        kind = ProviderUnavailable
    what = _explanation(kind, spec)
    if kind in (RateLimited, ProviderUnavailable):
        return kind(f"{what}: {message}", retry_after(error))
    return kind(f"{what}: {message}")


def _explanation(kind: type[ViaticumError], spec: ModelSpec) -> str:
    """What is wrong and what to do."""
    name = spec.name
    where = f"the key in {spec.api_key_env}" if spec.api_key_env else "the key"
    explanations: dict[type[ViaticumError], str] = {
        ProviderTimeout: f"{name} said nothing for {spec.timeout_seconds or 60:g} s; raise timeout_seconds",
        PromptTooLong: f"the provider of {name} finds the prompt too long; shorten it or lower "
        "max_new_tokens",
        ContentRefused: f"the provider of {name} refuses to answer this; ask otherwise",
        QuotaExhausted: f"the account at the provider of {name} has no credit left; add some",
        AuthenticationFailed: f"the provider of {name} does not take {where}; check it",
        RateLimited: f"the provider of {name} takes no more calls for now; try later",
        InputError: f"the provider of {name} does not take the request; check litellm_model, api_base and "
        "omit of its catalogue entry, and what was asked for",
        ProviderUnavailable: f"the provider of {name} cannot be reached or failed; try later",
    }
    return explanations.get(kind, f"{name} failed")


def wait_before_retry(error: Exception, tries: int) -> float | None:
    """Return the seconds to wait before the next try of a call that wrote nothing yet; None: do not retry.

    Rate limits, server errors and lost connections are retried, after the provider's retry-after or else with
    exponential backoff: 0.5 s, 1 s, 2 s ..., shortened at random by up to a half, so that many callers do not
    return at once. A timeout after the call was sent is not retried: the provider may have worked, and may
    charge for each try. Nor is an account without credit.
    """
    status = getattr(error, "status_code", None)
    if _timed_out_after_send(error) or _is_out_of_credit(error):
        return None
    if status != 429 and not (isinstance(status, int) and status >= 500) and not _is_connection(error):
        return None
    requested = retry_after(error)
    if requested is not None:
        return requested if requested <= MAX_WAIT else None
    backoff: float = min(MAX_WAIT, FIRST_WAIT * 2 ** (tries - 1))
    return backoff * random.uniform(0.5, 1.0)


def retry_after(error: Exception) -> float | None:
    """Return the seconds to wait before a retry, from the provider's headers; None where it gave none."""
    waits = (retry_after_of(headers) for headers in _headers(error))
    return next((wait for wait in waits if wait is not None), None)


def retry_after_of(headers: httpx.Headers) -> float | None:
    """The seconds to wait that a response's headers ask for: a number, milliseconds, or a date."""
    if milliseconds := _number(headers.get("retry-after-ms")):
        return milliseconds / 1000
    text = headers.get("retry-after")
    if text is None or (seconds := _number(text)) is not None:
        return None if text is None else seconds
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _headers(error: Exception) -> Iterator[httpx.Headers]:
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        if isinstance(response, httpx.Response):
            yield response.headers
        headers = getattr(cause, "litellm_response_headers", None)
        if headers:
            yield httpx.Headers(headers)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None


def _is_out_of_credit(error: Exception) -> bool:
    status = getattr(error, "status_code", None)
    if status not in (400, 402, 403, 429):
        return False
    texts = (getattr(error, "message", None) or error, getattr(error, "body", None))
    return status == 402 or any(_QUOTA_PATTERN.search(str(text)) for text in texts)


def _timed_out_after_send(error: BaseException) -> bool:
    chain = list(_chain(error))
    if any(
        isinstance(cause, httpx.ConnectTimeout | httpx.PoolTimeout | httpx.ConnectError) for cause in chain
    ):
        return False
    return any(
        isinstance(cause, httpx.TimeoutException | TimeoutError)
        or type(cause).__name__ in ("Timeout", "APITimeoutError")
        for cause in chain
    )


def _is_connection(error: BaseException) -> bool:
    return any(
        isinstance(cause, httpx.TransportError | ConnectionError)
        or type(cause).__name__ == "APIConnectionError"
        for cause in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "original_exception", None) or error.__cause__ or error.__context__


def _message(error: Exception, key: str | None) -> str:
    text = one_line(getattr(error, "message", None) or error) or type(error).__name__
    text = _message_of_body(_ERROR_PREFIX.sub("", text) or text)
    if key:
        text = text.replace(key, "[key]")
    return one_line(text, LONGEST)


def _message_of_body(text: str) -> str:
    """What a provider said, where LiteLLM quotes the body of its response: as JSON, or as Python's bytes."""
    found: Any = text
    with suppress(ValueError, SyntaxError, RecursionError):
        if text.startswith(("b'", 'b"')):
            quoted = ast.literal_eval(text)
            if isinstance(quoted, bytes):
                found = text = quoted.decode("utf-8", "replace")
        found = json.loads(text)
        while isinstance(found, dict):  # {"error": {"message": "..."}} and {"error": "..."}
            found = found.get("error") or found.get("message")
    return found if isinstance(found, str) and found.strip() else text
