"""Two API models without outcomes: figures and prices choose, the reason says so, and feedback takes over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai_server import KEY, OpenAIServer, running_server

from viaticum import Viaticum
from viaticum.types import Answer

pytest.importorskip("litellm")

QUESTION = "How many legs do three spiders have?"
PRIOR_ONLY = "prior only: no outcomes for this model"


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAIServer]:
    with running_server() as state:
        state.text = "The answer is 24."
        yield state


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new user's machine: no weights, no catalogue, no ledger."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("VIATICUM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VIATICUM_CATALOGUE", raising=False)
    monkeypatch.setenv("STUB_KEY", KEY)
    return tmp_path


def catalogue(folder: Path, server: OpenAIServer, **figures: str) -> Path:
    """`small` at $0.15 and $0.60 a million tokens, `large` at twenty times that, with TOML figures."""
    path = folder / "mine.toml"
    path.write_text(
        "".join(
            f'[models.{name}]\ndescription = "stub"\nkind = "remote"\nlitellm_model = "openai/{name}"\n'
            f'api_base = "{server.url}"\napi_key_env = "STUB_KEY"\ncontext_length = 8000\n'
            f"input_price = {price}\noutput_price = {4 * price}\nbenchmarks = {figures.get(name, '{}')}\n"
            for name, price in (("small", 0.15), ("large", 3.0))
        )
    )
    return path


def solve(file: Path, policy: str = "within:0.01", budget: str = "1") -> Answer:
    with Viaticum(budget=budget, catalogue=file, policy=policy) as viaticum:
        return viaticum.solve(QUESTION)


def test_the_better_figure_is_chosen_and_the_reason_says_that_nothing_was_measured(
    home: Path, server: OpenAIServer
) -> None:
    file = catalogue(home, server, small='{"mmlu-pro" = 0.64}', large='{"mmlu-pro" = 0.84, "gsm8k" = 0.97}')
    answer = solve(file)
    route = answer.routes[0]
    assert route.pair.model == "large"
    assert PRIOR_ONLY in route.why
    assert route.row.accuracy_low is not None
    assert route.row.accuracy_low < route.row.accuracy
    assert answer.value == "24"
    assert solve(file, policy="weighted:1000").routes[0].pair.model == "small"


def test_without_figures_or_with_equal_ones_the_cheap_model_is_taken(
    home: Path, server: OpenAIServer
) -> None:
    for figures in ({}, {"small": '{"gsm8k" = 0.9}', "large": '{"gsm8k" = 0.9}'}):
        for policy in ("within:0.01", "best", "cheapest:0.5"):
            route = solve(catalogue(home, server, **figures), policy).routes[0]
            assert route.pair.model == "small"
            assert PRIOR_ONLY in route.why


def test_feedback_takes_over_from_the_figures(home: Path, server: OpenAIServer) -> None:
    """The model with the better figure is wrong on this user's questions: another is asked after a while."""
    file = catalogue(home, server, small='{"mmlu-pro" = 0.64}', large='{"mmlu-pro" = 0.70}')
    asked = []
    for number in range(8):
        with Viaticum(budget="1", catalogue=file, policy="best") as viaticum:
            question = f"{QUESTION} ({number})"
            answer = viaticum.solve(question)
            asked.append(answer.routes[0].pair)
            viaticum.feedback(question, answer, correct=asked[-1].model == "small")
    assert asked[0].model == "large"
    assert asked[-1].model == "small"
    assert "of this model" in answer.routes[0].why


def test_a_damaged_file_of_feedback_is_left_out(
    home: Path, server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    (home / "home").mkdir()
    (home / "home" / "outcomes.jsonl").write_text("no outcome\n")
    assert PRIOR_ONLY in solve(catalogue(home, server)).routes[0].why
    assert "the prior goes without the outcomes of feedback" in caplog.text
