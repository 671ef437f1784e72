"""Who may ask, and whose budget pays: the key of a request, or, where there are no keys, this machine's own users.

One answer for every request that is not let in, whatever was wrong with it. Needs the `server` extra.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import HTTPConnection

from viaticum.agents.openai_api.requests import APIError
from viaticum.agents.server.api_keys import Keys
from viaticum.budgets import Ledger
from viaticum.errors import ViaticumError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
InThread = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever a request comes from. name: whose rate it is; scope: who pays; models: all where empty."""

    name: str
    scope: str
    models: tuple[str, ...] = ()
    per_minute: int | None = None

    def allows(self, model: str) -> bool:
        return not self.models or model in self.models


class Authenticator:
    """within: only keys of this scope and those below it are let in; None: all. As soon as there is a key, one is
    needed; until then a server on the loopback is open, under the address of this machine alone, so that no web page
    gets in by a name of its own for it (DNS rebinding)."""

    def __init__(
        self,
        ledger: Ledger,
        scope: str,
        keys: Keys | None,
        *,
        public: bool = False,
        within: str | None = None,
    ) -> None:
        self._ledger, self._scope, self._keys = ledger, scope, keys
        self._public, self._within = public, within
        self._inside: dict[str, bool] = {}

    async def admit(self, request: HTTPConnection, in_thread: InThread) -> Caller:
        """Raises `APIError` with status 401."""
        known = self._keys.all() if self._keys is not None else []
        unseen = {key.scope for key in known if key.scope is not None} - self._inside.keys()
        if unseen:  # a scope's place never changes
            self._inside |= await in_thread(self._places_of, unseen)
        if not known:
            if self._public or _host(request) in LOOPBACK:
                return Caller("", self._scope)
            raise _unknown()
        assert self._keys is not None
        inside = {scope for scope, yes in self._inside.items() if yes}
        key = self._keys.find(_token(request), scopes=inside)
        if key is None:
            raise _unknown()
        return Caller(f"key {key.name}", key.scope or self._scope, key.models, key.per_minute)

    def budgets(self) -> list[str]:
        """The scopes that pay for anyone."""
        keys = self._keys.all() if self._keys is not None else []
        scopes = [key.scope for key in keys if key.scope is not None and self._inside.get(key.scope)]
        return list(dict.fromkeys([self._scope, *scopes]))

    def _places_of(self, scopes: set[str]) -> dict[str, bool]:
        return {scope: self._is_inside(scope) for scope in scopes}

    def _is_inside(self, scope: str) -> bool:
        try:
            above = [each.name for each in self._ledger.lineage(scope)]
        except ViaticumError:
            return False
        return self._within is None or self._within in above


def _token(request: HTTPConnection) -> str:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def _host(request: HTTPConnection) -> str:
    host = request.headers.get("host", "")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
    return name.lower()


def _unknown() -> APIError:
    return APIError(
        401,
        "no valid API key; send Authorization: Bearer KEY, made by `viaticum keys create`",
        code="invalid_api_key",
    )
