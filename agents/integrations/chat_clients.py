"""The clients that a chat model uses: its own, opened at the first call, and those derived from one.

Leaves out the chat itself (`agents.integrations.chat_model`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from viaticum.agents.client import Viaticum
from viaticum.models.base import Model
from viaticum.models.remote.model import RemoteModel
from viaticum.residency import Residency
from viaticum.routers.query import Best
from viaticum.routers.query.single_pair import SinglePairRouter
from viaticum.types import Pair


class ChatClients:
    """The clients of one chat, each opened or derived once. Threads may share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own: Viaticum | None = None
        self._pairs: dict[tuple[str, Residency], Viaticum] = {}
        self._limited: tuple[Viaticum, Residency, Viaticum] | None = None

    def own(self, open: Callable[[], Viaticum]) -> Viaticum:
        """The chat's own client, which `close` closes. open: called where there is none."""
        with self._lock:
            if self._own is None:
                self._own = open()
            return self._own

    def restricted(self, client: Viaticum, only: Residency) -> Viaticum:
        """The client under a restriction, and that of its budget."""
        residency = only & client.ledger.residency(client.budget_name)
        if not residency:
            return client
        with self._lock:
            if self._limited is None or self._limited[:2] != (client, residency):
                self._limited = client, residency, client.derive(residency=residency)
            return self._limited[2]

    def of_pair(self, client: Viaticum, pair: Pair, only: Residency) -> Viaticum:
        """The workflow with one pair alone, on the same budget. only: the restriction of the chat."""
        with self._lock:
            key = str(pair), only
            if key not in self._pairs:
                client.model(pair.model)  # raises if the pair's model does not exist or cannot be opened
                router = SinglePairRouter(pair)
                self._pairs[key] = client.derive(
                    router=router, on_short="cheaper", policy=Best(), timeout=None
                )
            return self._pairs[key]

    def close(self) -> None:
        """Close the own client, if it was opened. The next call opens it again."""
        with self._lock:
            opened, self._own, self._pairs = self._own, None, {}
        if opened is not None:
            opened.close()


def models_with(client: Viaticum, key: str | None, **options: Any) -> Callable[[str], Model]:
    """A function from name to model.

    Args:
        key: for the provider of a remote model; None for that of its catalogue entry.
        options: of the entries of remote models, such as timeout_seconds; None where the entry's own holds.
    """
    given = {name: value for name, value in options.items() if value is not None}

    def model(name: str) -> Model:
        opened = client.model(name)
        if (given or key) and isinstance(opened, RemoteModel):
            return RemoteModel(opened.spec.model_copy(update=given), key=key)
        return opened

    return model
