"""Fixtures of all tests: a catalogue of tiny random models, a ledger over each store, servers, reports."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from ledger_calls import Clock
from tiny_catalogue import write_tiny_model

from viaticum.budgets import Ledger
from viaticum.catalogue import Catalogue

if TYPE_CHECKING:
    from openai_server import OpenAIServer

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # a test that imports it asks no network

# No example of a property has a time limit: on a busy machine one takes any time.
settings.register_profile(  # the same examples in every run
    "patient", settings(), deadline=None, suppress_health_check=(HealthCheck.too_slow,), derandomize=True
)
settings.load_profile("patient")

REAL_SECONDS = 1500  # time limit of a test of real models: minutes, and many more on a busy machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of real models a time limit of their own, unless one names another."""
    for item in items:
        if item.get_closest_marker("real") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(REAL_SECONDS))


@pytest.fixture(autouse=True)
def close_event_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Close the loop that LiteLLM's synchronous calls leave open: its warning would fail a later test."""
    yield
    if request.node.get_closest_marker("asyncio") is None and "asyncio" in sys.modules:
        policy = sys.modules["asyncio"].get_event_loop_policy()
        loop = getattr(getattr(policy, "_local", None), "_loop", None)
        if loop is not None and not loop.is_running():
            loop.close()
            policy.set_event_loop(None)


_clients: dict[int, object] = {}


@pytest.fixture(autouse=True)
def keep_clients() -> Iterator[None]:
    """Keep the HTTP clients that LiteLLM's cache drops after ten minutes.

    Nothing closes the socket of a client whose loop has ended: its warning would fail a later test.
    """
    yield
    cache = vars(sys.modules.get("litellm", object)).get("in_memory_llm_clients_cache")
    if cache is not None:
        _clients.update((id(client), client) for client in cache.cache_dict.values())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch on one thread: models this small are slower on more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_catalogue_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    lines = []
    for seed, name in enumerate(("tiny-small", "tiny-large")):
        write_tiny_model(folder / name, seed)
        lines.append(
            f'[models.{name}]\ndescription = "random"\nkind = "local"\ncontext_length = 8192\n'
            f"input_price = 0.1\noutput_price = 0.{seed + 1}\n"
            f'[[models.{name}.sources]]\ntype = "path"\npath = "{folder / name}"\n'
        )
    lines.append(
        '[models.tiny-pair]\ndescription = "both"\nkind = "pair"\nsmall = "tiny-small"\n'
        'large = "tiny-large"\nrouter = "r-stitch"\ntau = 0.75\nmode = "routed"\n'
    )
    file = folder / "catalogue.toml"
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="session")
def tiny_catalogue(tiny_catalogue_file: Path) -> Catalogue:
    return Catalogue.load(tiny_catalogue_file)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The address of a private Postgres on a free loopback port."""
    from postgres_server import running_server

    with running_server() as address:
        yield address


_databases = itertools.count()


@pytest.fixture
def postgres(postgres_server: str) -> str:
    """The address of a new database for each test."""
    from postgres_server import new_database

    return new_database(postgres_server, f"test_{next(_databases)}")


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def store_address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each of the three stores in turn, empty."""
    if request.param == "memory":
        return "memory:"
    if request.param == "sqlite":
        return str(tmp_path / "ledger.db")
    address: str = request.getfixturevalue("postgres")
    return address


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(store_address: str, clock: Clock) -> Iterator[Ledger]:
    """Over each of the three stores, checked at the end."""
    with Ledger(store_address, clock=clock) as opened:
        yield opened
        assert opened.check() == []


@pytest.fixture(scope="module")
def openai_process() -> Iterator[OpenAIServer]:
    from openai_server import running_server

    with running_server() as running:
        yield running


@pytest.fixture
def server(openai_process: OpenAIServer) -> OpenAIServer:
    """A scripted OpenAI server, reset before each test."""
    openai_process.reset()
    return openai_process


@pytest.fixture(scope="session")
def report_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with jobs to report on and the outcome table of their questions (job_runs.py). Read only."""
    from job_runs import make_job, questions, write_table

    folder = tmp_path_factory.mktemp("runs")
    asked = questions(120)
    write_table(folder / "table.jsonl", asked)
    make_job(folder, asked)
    make_job(folder, asked[20:], name="thrifty", generous=0.8, escalates=False, seed=2)
    make_job(folder, asked[:60], name="running", running=True)
    make_job(folder, asked[:50], name="poor", limit=18_000_000)
    return folder
