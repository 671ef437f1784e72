"""Signed, retried webhooks in the form of Standard Webhooks (https://www.standardwebhooks.com).

The signature is `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`. An id stays the same through
all tries, so that a receiver can drop repetitions; the timestamp is that of the try. Leaves out what is sent
(`viaticum.agents.workflow.soft_limits`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from viaticum.checks import checked_seconds, checked_text, shown
from viaticum.errors import InputError
from viaticum.models.remote.errors import retry_after_of

PREFIX = "whsec_"
RETRY_SECONDS = (5.0, 30.0, 300.0, 1800.0)  # before each further try, and up to a tenth more
GONE = 410  # the receiver wants no more
MAX_WAIT = 3600.0  # seconds; longer waits that a receiver asks for are cut
_log = logging.getLogger("viaticum")


@dataclass(frozen=True)
class Webhook:
    """Where events are posted.

    Args:
        url: an http or https address. Redirects are not followed.
        secret: the key of the signatures, base64, with or without `whsec_` before it; 24 to 64 bytes.
        timeout: seconds that a try may take.
        retry_seconds: waits before further tries; no more are made after the last.

    Raises:
        InputError: a value cannot be used.
    """

    url: str
    secret: str = field(repr=False)
    timeout: float = 20.0
    retry_seconds: tuple[float, ...] = RETRY_SECONDS

    def __post_init__(self) -> None:
        parts = urlsplit(checked_text("the address of a webhook", self.url))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"a webhook is an https:// or http:// address, got {shown(self.url)}")
        checked_seconds("timeout", self.timeout)
        if not 24 <= len(self.key) <= 64:
            raise InputError(
                f"the secret of a webhook is 24 to 64 bytes in base64, got {len(self.key)}; make one with "
                "`openssl rand -base64 32`"
            )

    @property
    def key(self) -> bytes:
        try:
            return base64.b64decode(self.secret.removeprefix(PREFIX), validate=True)
        except (binascii.Error, ValueError, AttributeError):
            raise InputError(
                "the secret of a webhook is base64; make one with `openssl rand -base64 32`"
            ) from None

    def headers(self, id: str, seconds: int, body: bytes) -> dict[str, str]:
        """The headers of one try. seconds: of Unix time."""
        signed = f"{id}.{seconds}.".encode() + body
        signature = base64.b64encode(hmac.digest(self.key, signed, hashlib.sha256)).decode()
        return {
            "content-type": "application/json",
            "webhook-id": id,
            "webhook-timestamp": str(seconds),
            "webhook-signature": f"v1,{signature}",
        }


Outcome = Literal["delivered", "given up", "closed"]


@dataclass(frozen=True, slots=True)
class _Event:
    id: str
    body: bytes
    done: Callable[[Outcome], None]


class WebhookSender:
    """Posts events from a thread of its own, in order, so that no call waits for a receiver."""

    def __init__(self, webhook: Webhook) -> None:
        self.webhook = webhook
        self._events: queue.SimpleQueue[_Event | None] = queue.SimpleQueue()
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    def send(
        self, id: str, event: Mapping[str, Any], done: Callable[[Outcome], None] = lambda outcome: None
    ) -> None:
        """Queue an event. id: the same for the same event, whoever sends it. done: called at its end."""
        body = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
        with self._lock:
            if self._closed.is_set():
                return
            self._events.put(_Event(id, body, done))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="viaticum-webhooks", daemon=True)
                self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Try what is queued once more, for `timeout` seconds at most."""
        with self._lock:
            self._closed.set()
            self._events.put(None)
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            outcome, problem = self._deliver(event)
            if problem:
                host = urlsplit(self.webhook.url).hostname
                _log.error("webhook %s was not delivered to %s: %s", event.id, host, problem)
            event.done(outcome)

    def _deliver(self, event: _Event) -> tuple[Outcome, str]:
        """All tries of one event: how it ended, and what went wrong at the last one."""
        problem, asked = self._try(event)
        for wait in self.webhook.retry_seconds:
            if not problem or asked < 0:
                break
            is_last = self._closed.wait(max(wait, asked) * random.uniform(1.0, 1.1))
            problem, asked = self._try(event)
            if is_last and problem:
                return "closed", problem
        return ("given up" if problem else "delivered"), problem

    def _try(self, event: _Event) -> tuple[str, float]:
        """What went wrong, or "", and the seconds that the receiver asks to wait; below 0: for ever."""
        import httpx

        headers = self.webhook.headers(event.id, int(time.time()), event.body)
        try:
            response = httpx.post(
                self.webhook.url,
                content=event.body,
                headers=headers,
                timeout=self.webhook.timeout,
                follow_redirects=False,
            )
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}", 0.0
        if response.is_success:
            return "", 0.0
        asked = -1.0 if response.status_code == GONE else retry_after_of(response.headers) or 0.0
        return f"status {response.status_code}", min(asked, MAX_WAIT)
