"""A server in the forms of several APIs, one for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forms_server import FormsServer, running_forms


@pytest.fixture(scope="module")
def running() -> Iterator[FormsServer]:
    with running_forms() as server:
        yield server


@pytest.fixture
def server(running: FormsServer) -> Iterator[FormsServer]:
    running.reset()
    with running.clients:
        yield running
