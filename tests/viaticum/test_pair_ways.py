"""Pairs of models as ways to answer: profiled with seconds, learned by a router, chosen as the fastest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from demo_models import LARGE, PAIR, SMALL, write_tiny_demo
from typer.testing import CliRunner

from viaticum import Viaticum
from viaticum.catalogue import Catalogue
from viaticum.cli import app
from viaticum.demo.questions import TOPIC, shipped, training_questions
from viaticum.jobs import read_rows
from viaticum.models.local import LocalModel
from viaticum.outcomes import read_outcomes, write_outcomes
from viaticum.types import Outcome, Query

pytestmark = pytest.mark.usefixtures("one_thread")
SPECULATIVE, AUTO = "qwen2.5-coder-speculative", "qwen2.5-coder-auto"
WAYS = (SMALL, LARGE, PAIR, SPECULATIVE, AUTO)
QUESTIONS = 40


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_demo(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def here(catalogue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIATICUM_CATALOGUE", str(catalogue))


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def profiled(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the outcomes of all ways on some training questions, and their texts."""
    folder = tmp_path_factory.mktemp("profiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIATICUM_CATALOGUE", str(catalogue))
        run(
            *(
                "profile",
                shipped("training.jsonl"),
                "--out",
                folder / "outcomes.jsonl",
                "--limit",
                str(QUESTIONS),
            ),
            *(each for name in WAYS for each in ("--model", name)),
            *("--strategy", "direct", "--max-tokens", "24", "--completions", folder / "texts.jsonl"),
        )
    return folder


def test_every_way_is_profiled_with_its_seconds(profiled: Path) -> None:
    rows = read_outcomes(profiled / "outcomes.jsonl")
    assert {row.model for row in rows} == set(WAYS)
    assert len(rows) == QUESTIONS * len(WAYS)
    for row in rows:
        assert row.seconds is not None
        assert row.seconds > 0
        assert row.cost_nanousd
    texts: dict[str, dict[str, list[str]]] = {}
    for line in map(json.loads, (profiled / "texts.jsonl").read_text().splitlines()):
        texts.setdefault(line["model"], {})[line["question_id"]] = line["texts"]
    assert texts[SPECULATIVE] == texts[LARGE], "what the small model drafts changes nothing"
    assert texts[PAIR] != texts[LARGE], "the token router decided, not the fastest way"
    assert texts[PAIR] != texts[SMALL]


# Of each kind of questions the way that is right, and what a right or wrong answer takes, in seconds.
RIGHT = {"arithmetic": SPECULATIVE, "program": AUTO, "fact": PAIR, "choice": SMALL}
SECONDS = {SMALL: 1.0, LARGE: 9.0, PAIR: 3.0, SPECULATIVE: 4.0, AUTO: 5.0}


@pytest.fixture(scope="module")
def router(catalogue: Path, profiled: Path) -> Path:
    """A router of these ways, fitted by the command on all training questions with made-up results."""
    of_way = {row.model: row for row in read_outcomes(profiled / "outcomes.jsonl")}
    rows: list[Outcome] = []
    for question in training_questions():
        for name in WAYS:
            right = name in (RIGHT[str(question.columns[TOPIC])], LARGE)
            text = question.query.text
            changes: dict[str, Any] = {"question_id": question.id, "question": text, "seconds": SECONDS[name]}
            rows.append(replace(of_way[name], correct=right, answer="1" if right else "0", **changes))
    write_outcomes(profiled / "known.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIATICUM_CATALOGUE", str(catalogue))
        run("router", "fit", profiled / "known.jsonl", "--out", profiled / "router")
    return profiled / "router"


def test_a_routers_table_shows_seconds(router: Path) -> None:
    text = question_of("fact").text
    assert "seconds" in run("router", "show", router, text).splitlines()[0]
    shown = json.loads(run("router", "show", router, text, "--json"))
    seconds = {row["pair"].partition("+")[0]: row["seconds"] for row in shown["table"]}
    assert seconds == pytest.approx(SECONDS)
    assert all(each["seconds"] is not None for each in shown["plans"])


def question_of(topic: str) -> Query:
    return next(each.query for each in training_questions() if each.columns[TOPIC] == topic)


@pytest.mark.parametrize("topic", list(RIGHT))
def test_the_fastest_way_that_is_right_is_asked_and_paid_for(
    topic: str, router: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIATICUM_HOME", str(tmp_path))
    options = (
        "--router",
        router,
        "--policy",
        "fastest:0.7",
        "--max-tokens",
        "8",
        "--budget",
        "0.01",
        "--json",
    )
    result = CliRunner().invoke(app, ["solve", question_of(topic).text, *map(str, options)])
    answer = json.loads(result.stdout)
    assert result.exit_code == (1 if answer["answer"] is None else 0), "random models write noise"
    assert answer["routes"][0] == f"{RIGHT[topic]}+direct"
    if len(answer["routes"]) == 1:
        assert "fastest of" in answer["route"]["why"]
        assert 0 < answer["route"]["seconds"] <= SECONDS[RIGHT[topic]], "of a text that ends at its limit"
    assert answer["cost_nanousd"] > 0


def test_what_a_router_learned_of_a_pair_is_what_its_calls_do(router: Path, tmp_path: Path) -> None:
    """Calls of a pair run in the mode that was profiled; without such a router in the fastest one."""
    with Viaticum("0.01", folder=tmp_path, router=router) as viaticum:
        model = viaticum.model(PAIR)
        assert isinstance(model, LocalModel)
        assert model.spec.mode == "routed"
        other = viaticum.model(AUTO)
        assert isinstance(other, LocalModel)
        assert other.spec.mode == "auto"
    with Viaticum("0.01", folder=tmp_path) as viaticum:
        model = viaticum.model(PAIR)
        assert isinstance(model, LocalModel)
        assert model.spec.mode is None


def test_a_job_chooses_them_too(router: Path, tmp_path: Path) -> None:
    lines = [{"id": topic, "question": question_of(topic).text} for topic in RIGHT]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(
        *("batch", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--budget", "0.01"),
        *(
            "--router",
            router,
            "--policy",
            "fastest:0.7",
            "--max-tokens",
            "8",
            "--ledger",
            tmp_path / "ledger.db",
        ),
    )
    routes = {row.id: row.calls[0].pair for row in read_rows(tmp_path / "out.jsonl.job")}
    assert routes == {topic: f"{name}+direct" for topic, name in RIGHT.items()}


def test_pairs_of_the_catalogue_alone_do_not_change_the_packaged_table(tmp_path: Path) -> None:
    """They have no price of their own and no outcomes, so that nothing can be estimated of them."""
    assert not any(Catalogue.load()[name].default for name in (SPECULATIVE, AUTO))
    with Viaticum("0.01", folder=tmp_path) as viaticum:
        assert {SPECULATIVE, AUTO}.isdisjoint(
            row.pair.model for row in viaticum.router.table(Query("1 + 1?"))
        )
