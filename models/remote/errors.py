"""What went wrong at a provider, in our words: which error it is, whether to try again, and when.

LiteLLM's errors are told apart by the HTTP status that they carry, which all of them do. Leaves out waiting and
trying (`models.remote.model`).
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

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
    RateLimited,
    ViaticumError,
)

LONGEST_WAIT = 60.0  # seconds; a provider that wants longer is left to the caller
FIRST_WAIT = 0.5
_CONTEXT = re.compile(
    r"context.{0,20}(window|length)|maximum context|too many tokens|prompt is too long", re.I
)
_WRAPPING = re.compile(r"^(litellm\.)?(\w+(Error|Exception)( -|:)\s*|litellm\.\w+:\s*)+")
_REFUSED = re.compile(r"content.{0,3}(policy|filter|management)|safety (system|filter)", re.I)


def translated(error: Exception, spec: ModelSpec, key: str | None = None) -> ViaticumError:
    """Our error for what LiteLLM, or the connection, raised. `key` is left out of its message."""
    name, said = spec.name, _one_line(error, key)
    status = getattr(error, "status_code", None)
    kind = type(error).__name__
    if isinstance(error, ViaticumError):
        return error
    if _was_sent_and_silent(error):
        return ProviderTimeout(
            f"{name} said nothing for {spec.timeout_seconds or 60:g} s; raise timeout_seconds: {said}"
        )
    if kind == "ContextWindowExceededError" or (status in (400, 413) and _CONTEXT.search(said)):
        return PromptTooLong(
            f"the provider of {name} finds the prompt too long; shorten it or lower max_new_tokens: {said}"
        )
    if kind == "ContentPolicyViolationError" or (status == 400 and _REFUSED.search(said)):
        return ContentRefused(f"the provider of {name} refuses to answer this; ask otherwise: {said}")
    if status in (401, 403):
        where = f"the key in {spec.api_key_env}" if spec.api_key_env else "the key"
        return AuthenticationFailed(f"the provider of {name} does not take {where}; check it: {said}")
    if status == 429:
        return RateLimited(
            f"the provider of {name} takes no more calls for now; try later: {said}", retry_after(error)
        )
    if status in (400, 404, 405, 409, 413, 415, 422):
        return InputError(
            f"the provider of {name} does not take the request; check litellm_model, api_base and omit of its "
            f"catalogue entry, and what was asked for: {said}"
        )
    if isinstance(status, int) or _is_connection(error):
        return ProviderUnavailable(f"the provider of {name} cannot be reached or failed; try later: {said}")
    return ModelError(f"{name} failed: {said}")


def wait_before_retry(error: Exception, tries: int) -> float | None:
    """Seconds to wait before the next try of a call that wrote nothing yet; None where another try is of no use.

    Rate limits, failures of the server and lost connections are tried again, after what the provider asked for or
    else after 0.5 s, 1 s, 2 s ..., shortened at random by up to a half, so that many callers do not come back at once. Silence after the
    call was sent is not: the provider may have worked, and charge, for each try.
    """
    status = getattr(error, "status_code", None)
    if _was_sent_and_silent(error):
        return None
    if status != 429 and not (isinstance(status, int) and status >= 500) and not _is_connection(error):
        return None
    asked = retry_after(error)
    if asked is not None:
        return asked if asked <= LONGEST_WAIT else None
    backoff: float = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries - 1))
    return backoff * random.uniform(0.5, 1.0)


def retry_after(error: Exception) -> float | None:
    """Seconds that the provider wants to be left alone for, from its headers."""
    for headers in _headers(error):
        if milliseconds := _number(headers.get("retry-after-ms")):
            return milliseconds / 1000
        text = headers.get("retry-after")
        if text is None:
            continue
        if (seconds := _number(text)) is not None:
            return seconds
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except ValueError:
            continue
    return None


def _headers(error: Exception) -> Iterator[httpx.Headers]:
    for each in _chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, httpx.Response):
            yield response.headers
        headers = getattr(each, "litellm_response_headers", None)
        if headers:
            yield httpx.Headers(headers)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None


def _was_sent_and_silent(error: BaseException) -> bool:
    chain = list(_chain(error))
    if any(isinstance(each, httpx.ConnectTimeout | httpx.PoolTimeout | httpx.ConnectError) for each in chain):
        return False
    return any(
        isinstance(each, httpx.TimeoutException | TimeoutError)
        or type(each).__name__ in ("Timeout", "APITimeoutError")
        for each in chain
    )


def _is_connection(error: BaseException) -> bool:
    return any(
        isinstance(each, httpx.TransportError | ConnectionError)
        or type(each).__name__ == "APIConnectionError"
        for each in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "original_exception", None) or error.__cause__ or error.__context__


def _one_line(error: Exception, key: str | None) -> str:
    text = " ".join(str(getattr(error, "message", None) or error).split()) or type(error).__name__
    text = _WRAPPING.sub("", text) or text
    if key:
        text = text.replace(key, "[key]")
    return text if len(text) <= 300 else f"{text[:300]}..."
