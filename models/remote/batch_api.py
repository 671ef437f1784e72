"""The contract of a provider's batch endpoint: requests in a file, answered within a day at a lower price.

A batch goes through `upload` (where the provider takes files), `create`, `state` until it has ended, and
`results`. A process may die between any two of these, so `find` looks for a batch by its name. Leaves out the
body of a request and what an answer means (`models.remote.batch_lines`), holds, and when to ask
(`viaticum.agents.batch.deferred`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from viaticum.catalogue import ModelSpec
from viaticum.errors import MissingExtra
from viaticum.models.api_keys import api_key

Outcome = Literal["succeeded", "errored", "expired", "cancelled"]
TIMEOUT = 120.0  # seconds of a request, such as the upload of a file
TRIES = 2  # after the first, by the provider's client, which keeps to its Retry-After


@dataclass(frozen=True, slots=True)
class BatchName:
    """What a batch is known by before the provider has given it an id.

    Args:
        name: of this batch alone, 1 to 48 letters, digits, - and _; the ids of its requests begin with it.
        requests: how many it has.
        since: Unix time before which it cannot have been sent.
        others: ids of batches that are known to be others.
    """

    name: str
    requests: int
    since: float
    others: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class BatchState:
    """A batch as the provider tells of it.

    Args:
        id: of the batch.
        status: in the provider's word.
        ended: whether nothing more is answered, and what was can be fetched.
        done: requests that were answered, billed or not.
        succeeded: requests that were answered and are billed; None where it does not say.
        total: requests of the batch.
        input_file: id of the uploaded file; "" for none.
        files: ids or addresses of the files with results; () where there are none.
        failure: why the whole batch failed, in the provider's words; "" where it did not.
        is_full: it failed because too much is waiting at the provider already.
    """

    id: str
    status: str
    ended: bool
    done: int = 0
    succeeded: int | None = None
    total: int = 0
    input_file: str = ""
    files: tuple[str, ...] = ()
    failure: str = ""
    is_full: bool = False


@dataclass(frozen=True, slots=True)
class BatchLine:
    """The result of one request.

    Args:
        custom_id: of the request.
        outcome: whether it was answered; only an answer is billed.
        body: of the answer, as a call would have had it; {} without one.
        message: why there is no answer.
    """

    custom_id: str
    outcome: Outcome
    body: Mapping[str, Any]
    message: str = ""


class MaybeSent(Exception):
    """A batch was not found, and could still appear: it is to be looked for again before it is sent."""


class BatchAPI(ABC):
    """The batch endpoint of one provider. Methods raise what the provider's own client raises.

    max_requests, max_bytes: of one batch. path: of the requests in it.
    """

    max_requests: int
    max_bytes: int
    path: str
    _client: Any

    def __init__(self, spec: ModelSpec, key: str | None = None) -> None:
        """Open the provider's own client.

        Args:
            spec: of a model of this provider, or of a server that speaks as it does.
            key: None for the one that is stored, or in the environment.

        Raises:
            MissingExtra: the client is not installed.
        """
        key = key or api_key(spec) or (None if spec.api_base is None else "none")
        try:
            self._client = self._open(api_key=key, base_url=spec.api_base, timeout=TIMEOUT, max_retries=TRIES)
        except ImportError as error:
            raise MissingExtra(error.name or "openai", "remote") from None

    @abstractmethod
    def _open(self, **settings: Any) -> Any:
        """The provider's own client. settings: as it takes them."""

    @abstractmethod
    def line(self, custom_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request as a line of the file."""

    @abstractmethod
    def upload(self, path: Path) -> str:
        """Upload the file of requests; return its id, or "" where the provider takes them with `create`."""

    @abstractmethod
    def create(self, path: Path, file_id: str, name: BatchName, hours: float) -> BatchState:
        """Send a batch. path: the file of its requests; hours: in which it is to be answered."""

    @abstractmethod
    def find(self, name: BatchName) -> BatchState | None:
        """Look for a batch that may have been sent; None where it was not.

        Raises:
            MaybeSent: that cannot be told yet.
        """

    @abstractmethod
    def state(self, id: str) -> BatchState: ...

    @abstractmethod
    def cancel(self, id: str) -> BatchState:
        """Ask for no further answers. What was answered by then is billed, and in the results."""

    @abstractmethod
    def results(self, state: BatchState) -> Iterator[BatchLine]:
        """The lines of a batch that has ended, in any order; some may be missing, or there twice."""

    @abstractmethod
    def clean_up(self, state: BatchState) -> None:
        """Remove what was uploaded for a batch that is through."""

    def close(self) -> None:
        """Close its connections."""
        self._client.close()
