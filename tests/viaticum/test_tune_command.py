"""`viaticum tune` over two API models on loopback that are right on different kinds of questions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import KEY, running_server
from tune_server import KindServer, write_catalogue, write_questions
from typer.testing import CliRunner

from viaticum.budgets import Ledger
from viaticum.cli import app
from viaticum.errors import BudgetError, DataError, InputError, ViaticumError
from viaticum.outcomes import outcome_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW
    from synthetic_outcomes import NAMES, WORDS

    folder = tmp_path_factory.mktemp("encoder") / "words"
    words = [*NAMES, *(word for kind in WORDS.values() for word in kind), "cheap", "dear", "direct", "stub"]
    SentenceTransformer(modules=[BoW(words)], device="cpu").save(str(folder))
    return str(folder)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[KindServer]:
    monkeypatch.setenv("STUB_KEY", KEY)
    state = KindServer()
    with running_server(state):
        yield state


@pytest.fixture
def arguments(tmp_path: Path, server: KindServer, encoder: str) -> list[str]:
    """Of a run with 120 questions and $1."""
    catalogue = write_catalogue(tmp_path / "catalogue.toml", server)
    questions = write_questions(tmp_path / "questions.csv", 120)
    options = {
        "--models": "cheap,dear",
        "--strategies": "direct",
        "--encoder": encoder,
        "--ledger": str(tmp_path / "ledger.db"),
        "--catalogue": str(catalogue),
        "--out": str(tmp_path / "my-router"),
    }
    return ["tune", str(questions), *(each for option in options.items() for each in option)]


def run(arguments: list[str], *more: str) -> Any:
    result = CliRunner().invoke(app, [*arguments, *more, "--json"])
    if isinstance(result.exception, ViaticumError):
        raise result.exception
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout.splitlines()[-1])


def asked(server: KindServer) -> Counter[tuple[str, str]]:
    return Counter((body["model"], body["messages"][-1]["content"]) for body in server.requests)


def test_a_dry_run_says_what_it_would_cost_and_asks_nothing(
    arguments: list[str], server: KindServer, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    forecast = run(arguments, "--budget", "1", "--dry-run")
    assert forecast["learning"] + forecast["held_out"] == 120
    assert forecast["answers"] == 240
    assert 0 < forecast["all_p50"] <= forecast["all_p90"]
    assert [each["pair"] for each in forecast["pairs"]] == ["cheap+direct", "dear+direct"]
    assert not server.requests
    assert sorted(tmp_path.iterdir()) == before


def test_a_router_is_made_evaluated_on_held_out_questions_and_taken_by_batch(
    arguments: list[str], server: KindServer, tmp_path: Path
) -> None:
    result = run(arguments, "--budget", "1")
    found, forecast = result["found"], result["forecast"]
    assert found["cheap"]["name"] == "cheap+direct"
    assert found["best"]["name"] == "dear+direct"
    assert found["best"]["accuracy"] == 1.0
    assert found["questions"] == forecast["held_out"]
    assert found["cheap"]["accuracy"] < found["router"]["accuracy"]
    assert found["router"]["cost"] < found["best"]["cost"]
    assert max(asked(server).values()) == 1
    rows = [row for _, row in outcome_rows(tmp_path / "my-router.outcomes.parquet")]
    assert len(rows) == result["outcomes"] == len(server.requests)
    assert len({row["question_id"] for row in rows if row["held_out"]}) == forecast["held_out"]
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.check() == []
    spent = sum(row["cost_nanousd"] for row in rows) / 1e9
    assert result["dollars"] == pytest.approx(spent)

    options = arguments[arguments.index("--ledger") : arguments.index("--out")]
    batch = ["batch", arguments[1], "--budget", "1", "--limit", "6", "--router", str(tmp_path / "my-router")]
    routed = CliRunner().invoke(app, [*batch, "--out", str(tmp_path / "routed.jsonl"), *options])
    assert routed.exit_code == 0, (routed.output, routed.exception)
    assert len((tmp_path / "routed.jsonl").read_text().splitlines()) == 6


def test_the_budget_is_never_exceeded(arguments: list[str], server: KindServer, tmp_path: Path) -> None:
    budget = 0.003  # about thirty answers of the expensive model
    result = run(arguments, "--budget", str(budget))
    assert 0 < result["dollars"] <= budget
    assert len(server.requests) < result["forecast"]["answers"]
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.check() == []


def test_a_run_that_was_cut_off_goes_on_and_pays_for_no_call_twice(
    arguments: list[str], server: KindServer, tmp_path: Path
) -> None:
    server.script = ["ok"] * 40 + [(401, {}, "the key was revoked")] * 1000
    with pytest.raises(ViaticumError, match="key"):
        run(arguments, "--budget", "1")
    journal = tmp_path / "my-router.job" / "rows.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert lines
    journal.write_text("".join(lines[: len(lines) // 2]))  # a kill loses what was not flushed
    server.script = []
    server.requests = []
    result = run(arguments, "--budget", "1")
    assert result["found"]["router"] is not None
    assert max(asked(server).values()) == 1
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.check() == []
        state = json.loads((tmp_path / "my-router.job" / "tune.json").read_text())
        posts = [entry for entry in ledger.entries(state["budget"]) if entry.kind == "post" and entry.nanousd]
    assert len({entry.key for entry in posts}) == len(posts) == result["outcomes"]
    assert len(server.requests) <= result["outcomes"] - 40


def test_a_run_goes_on_only_with_what_it_began_with(arguments: list[str], server: KindServer) -> None:
    server.script = ["ok"] * 5 + [(401, {}, "the key was revoked")] * 1000
    with pytest.raises(ViaticumError):
        run(arguments, "--budget", "1")
    with pytest.raises(InputError, match="began with other seed"):
        run(arguments, "--budget", "1", "--seed", "1")


def test_a_model_that_is_down_is_left_out_and_named(arguments: list[str], server: KindServer) -> None:
    answer = server.answer

    def half(body: dict[str, Any]) -> tuple[dict[str, Any], str]:
        if body["model"] == "stub-dear":
            raise ConnectionError("it is down")
        return answer(body)

    server.answer = half  # type: ignore[method-assign]
    result = run(arguments, "--budget", "1")
    assert result["unanswered"]
    assert "only pair left" in result["found"]["why"]


def test_unusable_questions_and_budgets_are_refused_before_anything_is_asked(
    arguments: list[str], server: KindServer, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="does not pay for the worst case"):
        run(arguments, "--budget", "0.000001")
    write_questions(tmp_path / "questions.csv", 20)
    with pytest.raises(DataError, match="needs 30"):
        run(arguments, "--budget", "1")
    (tmp_path / "questions.csv").write_text("question\nadd plus coins\n")
    with pytest.raises(DataError, match="no answer"):
        run(arguments, "--budget", "1")
    assert not server.requests
