"""`viaticum tune` over two API models on loopback that are right on different kinds of questions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from openai_server import KEY, running_server
from tune_job import bought, opened
from tune_server import KindServer, write_catalogue, write_encoder, write_questions
from typer.testing import CliRunner

from viaticum.agents.batch.tune import Tuning
from viaticum.budgets import Ledger
from viaticum.cli import app
from viaticum.errors import BudgetError, DataError, InputError, ViaticumError
from viaticum.generation import GenerationSettings
from viaticum.money import short_usd
from viaticum.outcomes import outcome_rows

pytestmark = pytest.mark.usefixtures("one_thread")


class Run(NamedTuple):
    """A whole run of the command: folder, arguments, what it printed as JSON, what was asked, its page."""

    folder: Path
    arguments: list[str]
    result: dict[str, Any]
    requests: list[dict[str, Any]]
    page: str


@pytest.fixture(scope="module")
def server() -> Iterator[KindServer]:
    with pytest.MonkeyPatch.context() as patch, running_server(KindServer()) as state:
        patch.setenv("STUB_KEY", KEY)
        assert isinstance(state, KindServer)
        yield state


@pytest.fixture(autouse=True)
def nothing_scripted(server: KindServer) -> None:
    server.reset()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, server: KindServer) -> Run:
    """Of 75 questions with more than enough money."""
    import torch

    folder, threads = tmp_path_factory.mktemp("tuned"), torch.get_num_threads()
    arguments = arguments_in(folder, server, 75)
    torch.set_num_threads(1)
    server.reset()  # fixtures of the module come before `nothing_scripted`
    result = run(arguments, "--budget", "1")
    torch.set_num_threads(threads)
    return Run(folder, arguments, result, list(server.requests), (folder / "my-router.html").read_text())


def arguments_in(folder: Path, server: KindServer, count: int) -> list[str]:
    options = {
        "--models": "cheap,dear",
        "--strategies": "direct",
        "--encoder": str(write_encoder(folder / "words")),
        "--ledger": str(folder / "ledger.db"),
        "--catalogue": str(write_catalogue(folder / "catalogue.toml", server)),
        "--out": str(folder / "my-router"),
    }
    questions = write_questions(folder / "questions.csv", count)
    return ["tune", str(questions), *(each for option in options.items() for each in option)]


def run(arguments: list[str], *more: str) -> Any:
    result = CliRunner().invoke(app, [*arguments, *more, "--json"])
    if isinstance(result.exception, ViaticumError):
        raise result.exception
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout.splitlines()[-1])


def tuning(folder: Path, server: KindServer, **changed: Any) -> Tuning:
    """Of 48 questions; calls are tried once."""
    write_catalogue(folder / "catalogue.toml", server, retries=0)
    if "questions" not in changed:
        write_questions(folder / "questions.csv", 48)
    return opened(folder, **changed)


def asked(requests: list[dict[str, Any]]) -> Counter[tuple[str, str]]:
    return Counter((body["model"], body["messages"][-1]["content"]) for body in requests)


def paid(folder: Path) -> list[str]:
    """Keys of the ledger's paid calls; the ledger is whole."""
    with Ledger(folder / "ledger.db") as ledger:
        assert ledger.check() == []
        scope = json.loads((folder / "my-router.job" / "tune.json").read_text())["budget"]
        return [entry.key for entry in ledger.entries(scope) if entry.kind == "post" and entry.nanousd]


# --- the command --------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_it_would_cost_and_asks_nothing(server: KindServer, tmp_path: Path) -> None:
    arguments = arguments_in(tmp_path, server, 60)
    before = sorted(tmp_path.iterdir())
    forecast = run(arguments, "--budget", "1", "--dry-run")
    assert forecast["learning"] + forecast["held_out"] == 60
    assert forecast["answers"] == 120
    assert 0 < forecast["cost_p50"] <= forecast["cost_p90"]
    assert [each["pair"] for each in forecast["pairs"]] == ["cheap+direct", "dear+direct"]
    assert [each["pair"] for each in forecast["prior"]] == ["cheap+direct", "dear+direct"]
    assert all(0 < each["low"] < each["accuracy"] < each["high"] < 1 for each in forecast["prior"])
    printed = CliRunner().invoke(app, [*arguments, "--budget", "1", "--dry-run"]).stdout
    assert "by public figures of their models, of which no entry has any; it leaves none out" in printed
    assert not server.requests
    assert sorted(tmp_path.iterdir()) == before


def test_a_judge_that_is_among_the_models_is_named_before_anything_is_paid(
    server: KindServer, tmp_path: Path
) -> None:
    arguments = [*arguments_in(tmp_path, server, 75), "--budget", "1", "--dry-run"]
    words = "dear will grade its own answers too"
    assert words in CliRunner().invoke(app, [*arguments, "--judge", "dear"]).stdout
    other = CliRunner().invoke(app, [*arguments, "--judge", "dear", "--models", "cheap"])
    assert other.exit_code == 0
    assert words not in other.stdout
    assert not server.requests


def test_answers_are_generated_as_the_command_says(server: KindServer, tmp_path: Path) -> None:
    arguments = arguments_in(tmp_path, server, 60)
    whole, short = (
        run(arguments, "--budget", "1", "--dry-run", *more)["pairs"][0]["cost_worst"]
        for more in ((), ("--max-tokens", "8"))
    )
    assert short < whole


def test_a_router_is_made_and_evaluated_on_held_out_questions(tuned: Run) -> None:
    found, forecast = tuned.result["found"], tuned.result["forecast"]
    assert found["cheap"]["name"] == "cheap+direct"
    assert found["best"]["name"] == "dear+direct"
    assert found["best"]["accuracy"] == 1.0
    assert found["questions"] == forecast["held_out"]
    assert found["cheap"]["accuracy"] < found["router"]["accuracy"]
    assert found["router"]["cost_nanousd"] < found["best"]["cost_nanousd"]
    assert max(asked(tuned.requests).values()) == 1
    rows = [row for _, row in outcome_rows(tuned.folder / "my-router.outcomes.parquet")]
    assert len(rows) == tuned.result["outcomes"] == len(tuned.requests) == len(paid(tuned.folder))
    assert len({row["question_id"] for row in rows if row["held_out"]}) == forecast["held_out"]
    assert tuned.result["cost_nanousd"] == sum(row["cost_nanousd"] for row in rows)


def test_the_page_has_the_money_that_was_paid(tuned: Run) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", tuned.page))
    spent, best = tuned.result["cost_nanousd"], tuned.result["found"]["best"]["cost_nanousd"]
    assert best > 0
    assert f"spent {short_usd(spent)} budget $1.00 " in text
    assert f"the best single pair, dear+direct, has 100.0% at {short_usd(best)}." in text
    assert len(re.findall(r"<svg", tuned.page)) >= 2, "the chart at two widths"
    drawn = {each["name"] for each in tuned.result["found"]["pairs"]}
    assert drawn == {"cheap+direct", "dear+direct"}
    costs = [each["cost_nanousd"] for each in tuned.result["found"]["curve"]]
    assert costs == sorted(costs)
    assert tuned.result["found"]["router"]["cost_nanousd"] in costs
    assert all(name in text for name in drawn | {"this router"})
    assert re.search(r"dear\+direct 75 100\.0% \(95\.1% to 100\.0%\) \$0\.0000\d", text)
    assert "asked different questions" not in text, "all were asked all"


def test_batch_and_solve_take_the_router(tuned: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["--budget", "1", "--router", str(tuned.folder / "my-router")]
    common += ["--catalogue", str(tuned.folder / "catalogue.toml")]
    results, ledger = tuned.folder / "routed.jsonl", ["--ledger", str(tuned.folder / "ledger.db")]
    batch = ["batch", tuned.arguments[1], "--limit", "6", "--out", str(results), *ledger, *common]
    routed = CliRunner().invoke(app, batch)
    assert routed.exit_code == 0, (routed.output, routed.exception)
    assert len(results.read_text().splitlines()) == 6
    monkeypatch.setenv("XDG_DATA_HOME", str(tuned.folder))
    solved = CliRunner().invoke(app, ["solve", "add plus coins total name7", "--json", *common])
    assert solved.exit_code == 0, (solved.output, solved.exception)
    assert json.loads(solved.stdout)["answer"] == "7"


def test_serve_takes_the_router(tuned: Run, server: KindServer) -> None:
    command = [sys.executable, "-c", "from viaticum.cli import main; main()", "serve", "--port", "0"]
    command += ["--json", "--folder", str(tuned.folder / "server")]
    command += ["--catalogue", str(tuned.folder / "catalogue.toml")]
    command += ["--budget", "1", "--router", str(tuned.folder / "my-router")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        body = {"model": "auto", "messages": [{"role": "user", "content": "add plus coins total name7"}]}
        answered = httpx.post(f"{json.loads(line)['url']}/chat/completions", json=body, timeout=240)
        assert answered.status_code == 200, answered.text
        assert answered.json()["choices"][0]["message"]["content"] == "The answer is 7."
    finally:
        process.terminate()
        process.communicate(timeout=240)
    assert len(server.requests) == 1


def test_the_finished_run_again_pays_for_nothing_and_writes_the_router_anew(
    tuned: Run, server: KindServer
) -> None:
    before = (tuned.folder / "my-router" / "router.json").stat().st_mtime_ns
    again = run(tuned.arguments, "--budget", "2")
    assert not server.requests
    assert again["outcomes"] == tuned.result["outcomes"]
    assert (tuned.folder / "my-router" / "router.json").stat().st_mtime_ns > before


# --- buying -------------------------------------------------------------------------------------------------


def test_the_budget_is_never_exceeded_and_a_larger_one_buys_on(server: KindServer, tmp_path: Path) -> None:
    small = bought(tuning(tmp_path, server, budget="0.0012"))  # some thirty answers of the expensive model
    assert 0 < small.cost_nanousd <= 1_200_000
    assert 0 < len(server.requests) == len(small.outcomes) < 90
    large = bought(tuning(tmp_path, server))
    assert set(small.outcomes) < set(large.outcomes)
    assert large.held_out == small.held_out
    assert max(asked(server.requests).values()) == 1
    assert len(set(paid(tmp_path))) == len(large.outcomes)


def test_a_run_that_was_cut_off_goes_on_and_pays_for_no_call_twice(
    server: KindServer, tmp_path: Path
) -> None:
    server.script = ["ok"] * 40 + [(401, {}, "the key was revoked")] * 1000
    with pytest.raises(ViaticumError, match="key"):
        bought(tuning(tmp_path, server))
    journal = tmp_path / "my-router.job" / "rows.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert lines
    journal.write_text("".join(lines[: len(lines) // 2]))  # a kill loses what was not flushed
    server.script, server.requests = [], []
    whole = bought(tuning(tmp_path, server))
    assert max(asked(server.requests).values()) == 1
    keys = paid(tmp_path)
    assert len(set(keys)) == len(keys) == len(whole.outcomes)
    assert len(server.requests) == len(whole.outcomes) - 40


def test_calls_that_failed_are_made_again(server: KindServer, tmp_path: Path) -> None:
    server.script = ["ok"] * 10 + [(500, {}, "overloaded"), (429, {"retry-after": "0"}, "too fast")] * 5
    whole = bought(tuning(tmp_path, server))
    assert not whole.unanswered
    assert len(server.requests) == len(whole.outcomes) + 10
    assert max(asked(server.requests).values()) == 2
    assert len(set(paid(tmp_path))) == len(whole.outcomes)


def test_a_model_that_is_down_is_named_and_asked_by_the_next_run(server: KindServer, tmp_path: Path) -> None:
    server.down = "stub-dear"
    first = bought(tuning(tmp_path, server))
    assert first.unanswered
    assert [str(each) for each in first.remaining] == ["cheap+direct"]
    requests = Counter(body["model"] for body in server.requests)
    assert requests["stub-dear"] < requests["stub-cheap"]
    server.down = None
    second = bought(tuning(tmp_path, server))
    assert not second.unanswered
    assert len(second.remaining) == 2
    assert set(first.outcomes) < set(second.outcomes)


def test_a_run_goes_on_only_with_what_it_began_with(server: KindServer, tmp_path: Path) -> None:
    bought(tuning(tmp_path, server, budget="0.001"))
    with pytest.raises(InputError, match="began with another seed: 0 then, 1 now"):
        bought(tuning(tmp_path, server, seed=1))
    with pytest.raises(InputError, match=r"other pairs: cheap\+direct, dear\+direct then, cheap\+direct now"):
        bought(tuning(tmp_path, server, models=["cheap"]))
    with pytest.raises(InputError, match=r"another settings: \{\} then, \{'temperature': 0.5\} now"):
        bought(tuning(tmp_path, server, generation=GenerationSettings(temperature=0.5)))
    questions = write_questions(tmp_path / "others.csv", 49)
    with pytest.raises(InputError, match=r"other questions: q48 is new \(48 then, 49 now\)"):
        bought(tuning(tmp_path, server, questions=questions))
    questions.write_text((tmp_path / "questions.csv").read_text().replace("total", "sum"))
    with pytest.raises(InputError, match=r"other questions: q\d+ differs"):
        bought(tuning(tmp_path, server, questions=questions))


def test_a_router_of_something_else_is_not_written_over(server: KindServer, tmp_path: Path) -> None:
    (tmp_path / "my-router").mkdir()
    with pytest.raises(InputError, match="did not make it"):
        bought(tuning(tmp_path, server))
    assert not server.requests


def test_unusable_questions_and_budgets_are_refused_before_anything_is_asked(
    server: KindServer, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="does not pay for the worst case"):
        tuning(tmp_path, server, budget="0.000001").forecast()
    few = write_questions(tmp_path / "few.csv", 20)
    with pytest.raises(DataError, match="needs 30"):
        tuning(tmp_path, server, questions=few)
    few.write_text("question\nadd plus coins\n")
    with pytest.raises(DataError, match="no answer"):
        tuning(tmp_path, server, questions=few)
    assert not server.requests
