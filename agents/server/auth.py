"""Authentication: the API key of a request names the budget that pays; without keys local users pass.

Every authentication failure returns the same 401 response. Needs the `server` extra.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import HTTPConnection

from viaticum.agents.openai_api.errors import KEY_HEADERS, invalid_api_key
from viaticum.agents.server.api_keys import ApiKey, ApiKeyStore
from viaticum.budgets import Ledger
from viaticum.errors import ViaticumError
from viaticum.residency import NO_RESTRICTION, Residency

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[\w.-]+))(?::\d{1,5})?", re.ASCII)
RunInThread = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated client.

    Args:
        name: whose rate limit applies.
        scope: the budget that pays.
        models: names that may be requested; all where empty.
        per_minute: requests; None for the server's rate.
        is_alone: no other key is in use, so that this one may take all slots.
        all_metrics: may read the metrics of the whole server, not only of its budget.
        residency: where its data may go.
        tags: of its calls: the key's name and its team.
    """

    name: str
    scope: str
    models: tuple[str, ...] = ()
    per_minute: int | None = None
    is_alone: bool = True
    all_metrics: bool = False
    residency: Residency = NO_RESTRICTION
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def owner(self) -> str:
        """To whom kept responses belong: this key in its scope."""
        return f"{self.name}@{self.scope}"

    def may_use(self, model: str) -> bool:
        return not self.models or model in self.models


class Authenticator:
    """Authenticates requests by API key.

    Without keys a server on the loopback is open, but only to requests whose Host header names the loopback,
    so that no web page reaches it through a host name of its own (DNS rebinding). As soon as there is a key,
    one is required.

    Args:
        scope: the budget that pays for callers without a key and for keys without a budget.
        keys: the key store; None serves without keys.
        public: other machines can reach the server, so the Host header is not checked.
        root_scope: accept only keys of this budget and those below it; None accepts all.
    """

    def __init__(
        self,
        ledger: Ledger,
        scope: str,
        keys: ApiKeyStore | None,
        *,
        public: bool = False,
        root_scope: str | None = None,
    ) -> None:
        self._ledger, self._scope, self._keys = ledger, scope, keys
        self._public, self._root_scope = public, root_scope
        self._accepted: dict[str, bool] = {}  # by scope; the lineage of a scope never changes

    async def authenticate(self, request: HTTPConnection, run_in_thread: RunInThread) -> Caller:
        """The caller that sent a request. Raises `APIError` with status 401."""
        keys = self._keys.all() if self._keys is not None else []
        unseen = {key.scope for key in keys if key.scope is not None} - self._accepted.keys()
        if unseen:
            self._accepted |= await run_in_thread(self._check_scopes, unseen)
        if not keys:
            if self._public or _host(request) in LOOPBACK_NAMES:
                return Caller("", self._scope, all_metrics=True)
            raise invalid_api_key()
        assert self._keys is not None
        accepted = {scope for scope, is_accepted in self._accepted.items() if is_accepted}
        key = self._keys.find(_token(request), scopes=accepted)
        if key is None:
            raise invalid_api_key()
        return self._caller(key, keys)

    def recall(self, name: str, scope: str) -> Caller | None:
        """The caller of this name as it is now, for work that it left; None where another server does it.

        Reads the ledger: not for the event loop's thread.

        Raises:
            APIError: with status 401: its key was revoked, or there are keys now and it had none.
        """
        keys = self._keys.all() if self._keys is not None else []
        if not name:
            if keys:
                raise invalid_api_key()
            return Caller("", scope, all_metrics=True) if scope == self._scope else None
        key = next((key for key in keys if _name(key) == name), None)
        if key is None or key.revoked is not None:
            raise invalid_api_key()
        if key.scope is not None and key.scope not in self._accepted:
            self._accepted |= self._check_scopes({key.scope})
        is_ours = (key.scope or self._scope) == scope and (key.scope is None or self._accepted[key.scope])
        return self._caller(key, keys) if is_ours else None

    def _caller(self, key: ApiKey, keys: Sequence[ApiKey]) -> Caller:
        accepted = {scope for scope, is_accepted in self._accepted.items() if is_accepted}
        used = [each for each in keys if each.revoked is None and each.scope in {None, *accepted}]
        scope = key.scope or self._scope
        return Caller(
            _name(key),
            scope,
            key.models,
            key.per_minute,
            is_alone=len(used) == 1,
            all_metrics=key.metrics,
            tags={"key": key.name} | ({} if key.team is None else {"team": key.team}),
            residency=Residency.of(key.only or None) & self._ledger.residency(scope),
        )

    def budget_names(self) -> list[str]:
        """The server's budget and those of accepted keys."""
        keys = self._keys.all() if self._keys is not None else []
        scopes = [key.scope for key in keys if key.scope is not None and self._accepted.get(key.scope)]
        return list(dict.fromkeys([self._scope, *scopes]))

    def _check_scopes(self, scopes: set[str]) -> dict[str, bool]:
        return {scope: self._is_accepted(scope) for scope in scopes}

    def _is_accepted(self, scope: str) -> bool:
        try:
            self._ledger.residency(scope)  # which it remembers
            lineage = [budget.name for budget in self._ledger.lineage(scope)]
        except ViaticumError:
            return False
        return self._root_scope is None or self._root_scope in lineage


def _name(key: ApiKey) -> str:
    return f"key {key.name}"


def _token(request: HTTPConnection) -> str:
    """The key of a request: a bearer token, or as Azure's and Anthropic's clients send it."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return next((request.headers[name].strip() for name in KEY_HEADERS if name in request.headers), "")


def _host(request: HTTPConnection) -> str:
    """The host without its port; empty for a header that is no host and port as a whole."""
    found = _HOST.fullmatch(request.headers.get("host", ""))
    return (found["address"] or found["name"]).lower() if found else ""
