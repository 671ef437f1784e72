"""Where calls of Amazon Bedrock are met: in botocore, below boto3's clients, whenever these were made.

botocore sends a call up to five times by itself: its events tell each attempt, which has a hold of its own.
`Converse` and `ConverseStream` are held; `InvokeModel` and its stream where the body is in Anthropic's form.
What does not fit is a `ClientError` with the status of the refusal, which is not tried again. Other
operations are told as before, where they reach urllib3.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from viaticum.agents.instrumentation.bedrock import ConverseCall, converse_count
from viaticum.agents.instrumentation.holding import (
    Refused,
    SentCall,
    being_sent,
    hold,
    payer_for,
    sending,
    unknown,
)
from viaticum.agents.instrumentation.requests import ModelCall
from viaticum.agents.instrumentation.usage import UsageReader
from viaticum.errors import MissingExtra
from viaticum.types import TokenCount

try:
    import wrapt
except ImportError:
    raise MissingExtra("wrapt", "remote") from None

SERVICE = "bedrock-runtime"
_CONVERSE = ("Converse", "ConverseStream")
_INVOKE = ("InvokeModel", "InvokeModelWithResponseStream")
_NOT_SENT = (
    *("ClientError", "ParamValidationError", "NoCredentialsError", "NoRegionError", "UnknownEndpointError"),
    *("EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "SSLError"),
)
_HEADERS = ("x-amzn-bedrock-input-token-count", "x-amzn-bedrock-output-token-count")
_registering = threading.Lock()


def hook(module: ModuleType) -> None:
    """Hook a loaded `botocore.client`."""
    wrapt.wrap_function_wrapper(module, "BaseClient._make_api_call", _call)


def _call(wrapped: Any, client: Any, args: Any, options: Any) -> Any:
    operation, parameters = _arguments(*args, **options)
    model = client.meta.service_model
    if model.service_name != SERVICE or operation not in (*_CONVERSE, *_INVOKE):
        return wrapped(*args, **options)
    url = client.meta.endpoint_url
    payer = payer_for(url)
    if payer is None:
        return wrapped(*args, **options)
    call = _model_call(operation, url, parameters)
    if call is None:
        what = f"{operation} of {parameters.get('modelId')} at {urlsplit(url).hostname}"
        met: SentCall | Refused | None = unknown(payer, what)
    else:
        met = hold(payer, call)
    if isinstance(met, Refused):
        raise _refusal(operation, met)
    if met is None:
        with sending(None, ()):
            return wrapped(operation, parameters)
    _watch_attempts(client)
    with sending(met, _NOT_SENT):
        response = wrapped(operation, _limited(met, parameters))
    return _settled(operation, met, response)


def _watch_attempts(client: Any) -> None:
    """Have a client tell of each attempt; once for each client.

    botocore's own check for an id that is known is no check among threads: an attempt that is told twice is
    held twice.
    """
    events = client.meta.events
    with _registering:
        events.register(f"before-send.{SERVICE}", _begin_attempt, unique_id="viaticum-begin")
        events.register(f"response-received.{SERVICE}", _end_attempt, unique_id="viaticum-end")


def _begin_attempt(event_name: str, **_: Any) -> None:
    """Hold for an attempt. botocore raises the error of a refusal as it is, and tries no further."""
    sent = being_sent()
    refused = None if sent is None else sent.begin()
    if refused is not None:
        raise _refusal(event_name.rpartition(".")[2], refused)


def _end_attempt(response_dict: Mapping[str, Any] | None, exception: BaseException | None, **_: Any) -> None:
    """End an attempt that failed, before the client waits and tries again."""
    if (sent := being_sent()) is None:
        return
    if exception is not None:
        sent.fail(exception, _NOT_SENT)
    elif response_dict is not None:
        sent.answered(response_dict["status_code"])


def _arguments(operation_name: str, api_params: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    return operation_name, api_params


def _model_call(operation: str, url: str, parameters: Mapping[str, Any]) -> ModelCall | None:
    """The call that an operation is; None where its body is in a form that is not known."""
    parts, model = urlsplit(url), str(parameters.get("modelId", ""))
    host, streams = parts.hostname or "", operation.endswith("Stream")
    if operation in _CONVERSE:
        limit = (parameters.get("inferenceConfig") or {}).get("maxTokens")
        limit = limit if isinstance(limit, int) and limit > 0 else None
        return ConverseCall("converse", host, model, parameters, limit, streams, parts.port)
    body = parameters.get("body")
    try:
        values = json.loads(body) if isinstance(body, str | bytes | bytearray) else None
    except ValueError:
        return None
    if not isinstance(values, dict) or "anthropic_version" not in values or "messages" not in values:
        return None
    limit = values.get("max_tokens")
    if not isinstance(limit, int) or limit <= 0:
        return None  # which the provider refuses too
    return ModelCall("messages", host, model, values, limit, streams, parts.port)


def _limited(held: SentCall, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    limited = held.call.limited(held.limit)
    return limited if held.call.api == "converse" else {**parameters, "body": json.dumps(limited)}


def _refusal(operation: str, refused: Refused) -> Exception:
    from botocore.exceptions import ClientError

    error = {"Code": refused.code, "Message": f"viaticum: {refused.message}"}
    metadata = {"HTTPStatusCode": refused.status, "HTTPHeaders": {}, "RetryAttempts": 0}
    made: Exception = ClientError({"Error": error, "ResponseMetadata": metadata}, operation)
    return made


def _settled(operation: str, held: SentCall, response: Any) -> Any:
    """Settle what a response reports, now or when its stream ends or is left."""
    if operation == "Converse":
        held.settle(converse_count(response.get("usage"), has_output=bool(response.get("output"))))
    elif operation == "InvokeModel":
        from botocore.response import StreamingBody

        reader = UsageReader("messages")
        with sending(held, ()):
            text = response["body"].read()
        reader.read(text)
        headers = (response.get("ResponseMetadata") or {}).get("HTTPHeaders") or {}
        held.settle(reader.count() or _count_in(headers))
        response["body"] = StreamingBody(io.BytesIO(text), len(text))
    else:
        name = "stream" if operation == "ConverseStream" else "body"
        response[name] = WatchedEvents(held, response[name])
    return response


def _count_in(headers: Mapping[str, str]) -> TokenCount | None:
    """The tokens that Bedrock itself counted, which it writes beside a model's answer."""
    read, written = (int(each) if (each := headers.get(name, "")).isdigit() else 0 for name in _HEADERS)
    return TokenCount(read, written) if read > 0 and written > 0 else None


class WatchedEvents:
    """The events of a stream, read for usage as they pass; settled when it ends or is left.

    Many callers leave `ConverseStream` at its messageStop, right before the report: that is read for them.
    """

    def __init__(self, held: SentCall, events: Any) -> None:
        self._held, self._events = held, events
        self._reader = UsageReader("messages")
        self._count: TokenCount | None = None
        self._is_stopped = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._events, name)

    def __iter__(self) -> Iterator[Any]:
        try:
            for event in self._events:
                self._take(event)
                yield event
        finally:
            self._settle()

    def close(self) -> None:
        self._settle()
        self._events.close()

    def _settle(self) -> None:
        if self._is_stopped and self._count is None:
            with suppress(Exception):  # the connection may be gone
                for event in self._events:
                    self._take(event)
        self._held.settle(self._count)

    def _take(self, event: Mapping[str, Any]) -> None:
        self._is_stopped = self._is_stopped or "messageStop" in event
        if "metadata" in event:
            self._count = converse_count(event["metadata"].get("usage")) or self._count
        elif "chunk" in event:
            data = event["chunk"].get("bytes", b"")
            self._reader.read(data)
            if b'"message_stop"' in data:  # earlier reports have but a part of what was written
                self._count = self._reader.count()
