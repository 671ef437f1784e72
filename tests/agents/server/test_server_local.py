"""The server over local models: tiny, random, and real in every other way; and its command."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from viaticum_server import serving, wait_until

from viaticum.catalogue import Catalogue
from viaticum.cli import app
from viaticum.errors import BudgetError, InputError, MissingExtra
from viaticum.models.base import Generation
from viaticum.models.local import LocalModels


@pytest.mark.usefixtures("one_thread")
def test_many_clients_of_local_models_get_what_each_would_get_alone(
    tmp_path: Path, tiny_catalogue: Catalogue
) -> None:
    names = ["tiny-pair", "tiny-small", "tiny-large"]
    alone = LocalModels(tiny_catalogue)
    expected = [
        alone.model(names[n % 3])
        .generate([{"role": "user", "content": f"How many {n}?"}], Generation(20))
        .text
        for n in range(15)
    ]
    with serving(tmp_path, concurrency=4, catalogue=tiny_catalogue) as server:

        def ask(number: int) -> Any:
            messages = [{"role": "user", "content": f"How many {number}?"}]
            return server.ask(names[number % 3], messages=messages, max_tokens=20).json()

        with ThreadPoolExecutor(15) as clients:
            completions = list(clients.map(ask, range(15)))
        assert [each["choices"][0]["message"]["content"] for each in completions] == expected
        with server.http.stream(
            "POST",
            "/v1/chat/completions",
            json={
                "model": "tiny-pair",
                "stream": True,
                "max_tokens": 3000,
                "messages": [{"role": "user", "content": "?"}],
            },
        ) as response:
            next(response.iter_lines())
        server.assert_settled()
        model: Any = server.client.model("tiny-pair")
        wait_until(lambda: all(len(runner.free_slots) == 4 for runner in model.pool._runners.values()))
        refused = server.ask("tiny-pair", tools=[{"type": "function"}])
        assert refused.status_code == 400
        assert "tools" in refused.json()["error"]["message"]
        server.assert_settled()


def test_messages_that_a_model_s_template_refuses_are_bad_input(tiny_catalogue: Catalogue) -> None:
    model = LocalModels(tiny_catalogue).model("tiny-small")
    model.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="tiny-small cannot read these messages: roles must alternate"):
        model.worst_case([{"role": "user", "content": "hi"}], 10)


def test_weights_that_are_not_here_are_no_mistake_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "empty"))
    with serving(tmp_path) as server:
        response = server.ask("qwen2.5-coder-0.5b")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        assert "viaticum models pull" in response.json()["error"]["message"]
        names = [each["id"] for each in server.http.get("/v1/models").json()["data"]]
        assert "fast" in names
        assert "qwen2.5-coder-0.5b" not in names


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Any:
    return lambda *words: CliRunner().invoke(app, ["serve", "--folder", str(tmp_path), *words])


def test_the_command_refuses_before_it_listens(run: Any) -> None:
    for words, message in (
        (("--host", "0.0.0.0"), "viaticum keys create"),
        (("--timeout", "0"), "timeout"),
        (("--port", "0", "--budget", "-1"), "above zero"),
        (("--port", "0", "--policy", "dearest"), "policy"),
    ):
        error = run(*words).exception
        assert isinstance(error, InputError)
        assert message in str(error)
    for option in ("--concurrency", "--grace", "--insecure", "--body-limit"):
        assert option in run("--help").stdout


def test_a_budget_that_is_there_keeps_its_terms(run: Any, tmp_path: Path) -> None:
    from viaticum import Viaticum
    from viaticum.budgets import Ledger, Window

    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.create("team", limit_nanousd=5, window=Window("day"))
    error = run("--port", "0", "--budget-name", "team", "--budget", "2").exception
    assert isinstance(error, BudgetError)
    with Viaticum(budget_name="team", folder=tmp_path) as client:
        assert client.budget().limit_nanousd == 5
        assert client.budget().window == Window("day")


def test_without_the_extra_the_command_names_it(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("starlette", "viaticum.agents.ser"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    error = run("--port", "0").exception
    assert isinstance(error, MissingExtra)
    assert "viaticum[server]" in str(error)
