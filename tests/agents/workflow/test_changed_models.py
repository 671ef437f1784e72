"""A model behind a name changes: told once, trusted less, also after a restart, until profiled again."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from synthetic_outcomes import PAIRS, Words, a_question, outcomes
from typer.testing import CliRunner
from workflow_client import ScriptedModel, scripted_catalogue

from viaticum import Viaticum
from viaticum.agents.batch import run_batch
from viaticum.agents.workflow import watched_router
from viaticum.agents.workflow.watched_router import (
    CHANGES,
    EXPECTED,
    WatchedRouter,
    append_change,
    current_changes,
    expected_tags,
    now,
    read_changes,
)
from viaticum.budgets import Ledger
from viaticum.cli import app
from viaticum.errors import InputError
from viaticum.money import Price
from viaticum.questions import digest_of
from viaticum.routers.query import StaticRouter
from viaticum.routers.query.change_detection import Expectation, ModelChange
from viaticum.routers.query.fit import fit
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.restricted import RestrictedRouter
from viaticum.routers.query.rtr import RTRRouter
from viaticum.types import Message, Pair, Query, TokenCount

pytestmark = pytest.mark.usefixtures("one_thread")
BIG = Pair("big", "cot")
PRICE = Price(0, 40_000_000_000)


@pytest.fixture(scope="module")
def router() -> RTRRouter:
    return fit(OutcomeMatrix.from_outcomes(outcomes(300)), Words())  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_router, "REFRESH_SECONDS", 0.0)


def a_query(number: int = 0) -> Query:
    kind = ("sums", "kin", "games")[number % 3]
    return Query(a_question(kind, np.random.default_rng(1_000 + number)))


def row_of(router: WatchedRouter | RTRRouter, query: Query, pair: Pair = BIG):  # type: ignore[no-untyped-def]
    return next(row for row in router.table(query) if row.pair == pair)


def make_calls(
    ledger: Ledger, router: WatchedRouter, count: int, factor: float, first: int, result: str | None = "{}"
) -> None:
    """Settled calls of `big`, each with `factor` times the tokens that its question may lead to."""
    rng = np.random.default_rng(first)
    for number in range(first, first + count):
        query = a_query(number)
        row = row_of(router, query)
        tokens = max(1, round(90 * factor * float(np.exp(0.4 * rng.standard_normal()))))
        worst = {"big": TokenCount(20, 10_000)}
        tags = {"model": "big", "strategy": "cot"} | expected_tags(router, query, row)
        ledger.reserve("work", f"call-{number}", worst, {"big": PRICE}, tags=tags, dispatch=True)
        ledger.settle(f"call-{number}", {"big": TokenCount(20, tokens)}, result)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:  # type: ignore[misc]
    with Ledger(tmp_path / "ledger.db") as opened:
        opened.create("work", limit_nanousd=10**15)
        yield opened


def test_a_change_is_told_once_and_outlives_the_process(
    router: RTRRouter, ledger: Ledger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = WatchedRouter(router, ledger, tmp_path)
    query = a_query(5)
    before = row_of(watched, query)
    make_calls(ledger, watched, 120, 1.0, 0)
    watched.table(query)
    assert not watched.changes
    assert not (tmp_path / CHANGES).exists()
    with caplog.at_level(logging.WARNING, logger="viaticum"):
        make_calls(ledger, watched, 150, 3.0, 200)
        after = row_of(watched, query)
    warned = [record.message for record in caplog.records if "no longer as it was profiled" in record.message]
    assert len(warned) == 1
    assert warned[0].startswith("big ")
    assert set(watched.changes) == {"big"}
    assert after.tokens_p50 == pytest.approx(3 * before.tokens_p50, rel=0.4)
    assert after.cost_p50 == pytest.approx(3 * before.cost_p50, rel=0.4)
    assert after.cost_mean > 2 * before.cost_mean
    assert "big has changed" in after.origin
    assert after.cost_p90 >= after.cost_p50
    for plan in watched.plans_for(query):  # a plan with it is dearer too
        assert ("big has changed" in plan.origin) == any(pair.model == "big" for pair in plan.plan.pairs)
    other = row_of(watched, query, Pair("mid", "cot"))
    assert other == row_of(router, query, Pair("mid", "cot")), "others stay as they were"
    # Another process, which finds the line; and one that finds the calls alone.
    again = WatchedRouter(router, ledger, tmp_path)
    assert row_of(again, query) == after
    assert len((tmp_path / CHANGES).read_text().splitlines()) == 1
    (tmp_path / CHANGES).unlink()
    third = WatchedRouter(router, ledger, tmp_path)
    third.table(query)
    assert set(third.changes) == {"big"}
    # No further evidence is kept of a model that has changed, and none twice.
    assert expected_tags(third, query, row_of(third, query)) == {}
    assert len(list(read_changes(tmp_path))) == 1


def test_a_change_that_is_taken_back_stays_so(
    router: RTRRouter, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIATICUM_HOME", str(tmp_path))
    monkeypatch.delenv("VIATICUM_LEDGER", raising=False)
    watched = WatchedRouter(router, ledger, tmp_path)
    make_calls(ledger, watched, 100, 3.0, 0)
    changed = row_of(watched, a_query(5))
    router.save(tmp_path / "router")
    done = CliRunner().invoke(app, ["router", "dismiss", str(tmp_path / "router"), "big", "--json"])
    assert done.exit_code == 0, done.output
    for each in (watched, WatchedRouter(router, ledger, tmp_path)):
        row, usual = row_of(each, a_query(5)), row_of(router, a_query(5))
        assert row.origin == usual.origin != changed.origin
        assert row.tokens_p50 == usual.tokens_p50 < changed.tokens_p50 / 2
        assert row.cost_mean == pytest.approx(usual.cost_mean, rel=0.05)
        make_calls(ledger, each, 20, 1.0, 1_000 if each is watched else 2_000)
        each.table(a_query())
        assert not each.changes
    with pytest.raises(InputError, match="model that has changed"):
        CliRunner().invoke(
            app, ["router", "dismiss", str(tmp_path / "router"), "big"], catch_exceptions=False
        )
    make_calls(ledger, watched, 100, 3.0, 3_000)
    watched.table(a_query())
    assert set(watched.changes) == {"big"}, "it may change again"


def test_it_is_forgotten_once_the_model_is_profiled_again(
    router: RTRRouter, ledger: Ledger, tmp_path: Path
) -> None:
    make_calls(ledger, WatchedRouter(router, ledger, tmp_path), 150, 3.0, 0)
    watched = WatchedRouter(router, ledger, tmp_path)
    watched.table(a_query())
    assert set(watched.changes) == {"big"}
    anew = fit(OutcomeMatrix.from_outcomes(outcomes(120, seed=3)), Words())  # type: ignore[arg-type]
    fresh = WatchedRouter(anew, ledger, tmp_path)
    fresh.table(a_query())
    assert not fresh.changes
    saved = tmp_path / "router"
    router.save(saved)
    loaded = RTRRouter.load(saved, Words())  # type: ignore[arg-type]
    assert loaded.profiles() == router.profiles(), "the file keeps what a profile is known by"
    assert json.loads((saved / "router.json").read_text())["profiles"] == dict(router.profiles())
    same = WatchedRouter(loaded, ledger, tmp_path)
    same.table(a_query())
    assert set(same.changes) == {"big"}


def test_calls_that_were_cut_off_are_no_evidence(router: RTRRouter, ledger: Ledger, tmp_path: Path) -> None:
    watched = WatchedRouter(router, ledger, tmp_path)
    make_calls(ledger, watched, 200, 0.1, 0, result=None)
    watched.table(a_query())
    assert not watched.changes


def test_far_questions_and_conversations_are_no_evidence(router: RTRRouter) -> None:
    query = a_query()
    row = row_of(router, query)
    assert router.expectation(query, row) is not None
    turns: tuple[Message, ...] = ({"role": "system", "content": "Be brief."},)
    assert router.expectation(Query(query.text, messages=turns), row) is None
    far = Query("zz qq xx unheard of entirely different wording")
    if float(router.predict_texts([far.text]).trust[0]) < 0.5:
        assert router.expectation(far, row_of(router, far)) is None
    assert RestrictedRouter(router, "big", None).expectation(query, row) is not None


def test_wrong_answers_lower_accuracy(router: RTRRouter, ledger: Ledger, tmp_path: Path) -> None:
    query, lines = a_query(1), []
    profile, before = router.profiles()["big"], row_of(router, query)
    for number in range(150):
        lines.append(
            {"model": "big", "expected_accuracy": 0.85, "profile": profile, "correct": number % 3 == 0}
        )
    path = tmp_path / "outcomes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:10]) + "no json\n")
    watched = WatchedRouter(router, ledger, tmp_path)
    watched.table(query)
    assert not watched.changes, "too few"
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines[10:])
    after = row_of(watched, query)
    assert watched.changes["big"].kind == "worse"
    assert after.accuracy < before.accuracy - 0.15, "answers alone move it by a bounded amount"
    assert after.accuracy >= 0
    assert after.tokens_p50 == before.tokens_p50


def test_feedback_from_before_a_dismissal_does_not_count(
    router: RTRRouter, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIATICUM_HOME", str(tmp_path))
    monkeypatch.delenv("VIATICUM_LEDGER", raising=False)
    common = {"model": "big", "expected_accuracy": 0.85, "profile": router.profiles()["big"]}

    def add_lines(*others: dict[str, object]) -> None:
        with (tmp_path / "outcomes.jsonl").open("a") as file:
            file.writelines(json.dumps(common | {"correct": False} | each) + "\n" for each in others)

    def read_anew() -> WatchedRouter:
        watched = WatchedRouter(router, ledger, tmp_path)
        watched.table(a_query())
        return watched

    add_lines(*({"question_id": "one", "strategy": "cot", "at": now()} for _ in range(100)))
    assert not read_anew().changes, "one answer, judged a hundred times"
    add_lines(*({} for _ in range(100)), *({"at": now()} for _ in range(100)))
    assert set(read_anew().changes) == {"big"}
    router.save(tmp_path / "router")
    done = CliRunner().invoke(app, ["router", "dismiss", str(tmp_path / "router"), "big"])
    assert done.exit_code == 0, done.output
    assert not read_anew().changes
    add_lines(*({"at": now()} for _ in range(100)))
    assert set(read_anew().changes) == {"big"}, "later answers count"


def test_trust_in_its_columns_is_halved(router: RTRRouter) -> None:
    change = ModelChange("tiny", router.profiles()["tiny"], "2026-01-01", "longer", 50)
    texts = [a_query(number).text for number in range(40)]
    before, after = router.predict_texts(texts), router.with_changes({"tiny": change}).predict_texts(texts)
    share = router.parameters.trust.share(before.trust)[:, None]
    for pair, column in zip(router.pairs, router.pair_columns, strict=True):
        means = router.parameters.static_means[0][column]
        moved = after.accuracy[:, column] - before.accuracy[:, column]
        if pair.model != "tiny":
            assert float(moved.abs().max()) == 0
            continue
        wanted = 0.5 * (means - before.accuracy[:, column])
        assert np.allclose(moved.numpy(), np.where(share[:, 0] == 1, wanted, moved), atol=1e-5)
        spread = after.accuracy[:, column].std() / before.accuracy[:, column].std()
        assert float(spread) < 0.6


def test_a_client_tags_its_calls_and_says_why(router: RTRRouter, tmp_path: Path) -> None:
    names = {pair.model for pair in PAIRS}
    models = {name: ScriptedModel(name, "The answer is 5.") for name in names}
    keywords = {
        "router": router,
        "models": models,
        "catalogue": scripted_catalogue(sorted(names), "40"),
        "policy": "cheapest:0",
    }
    query = a_query(5)
    with Viaticum("1", folder=tmp_path, **keywords) as client:  # type: ignore[arg-type]
        assert isinstance(client.router, WatchedRouter)
        answer = client.solve(query.text)
        for hold in client.ledger.holds():
            assert hold.tags[EXPECTED].endswith(router.profiles()[hold.tags["model"]])
            expected = Expectation.parse(hold.tags[EXPECTED])
            assert expected is not None
            assert expected.question == digest_of(query.text)
        path = client.feedback(query.text, answer, correct=False)
        line = json.loads(path.read_text().splitlines()[-1])
        assert line["at"] <= now()
        assert line["expected_accuracy"] == pytest.approx(answer.routes[0].row.accuracy)
        assert client.ledger.check() == []
    change = ModelChange("big", router.profiles()["big"], "2026-01-02", "worse", 50, accuracy=-0.1)
    (tmp_path / CHANGES).write_text(json.dumps(change.to_json()) + "\n{}\nnothing\n")
    with Viaticum("1", folder=tmp_path, **(keywords | {"model": "big"})) as client:  # type: ignore[arg-type]
        (route,) = client.solve(query.text).routes
        assert "big has changed, by 2026-01-02: answers are right less often" in route.why
    with Viaticum(
        "1", folder=tmp_path, **(keywords | {"router": StaticRouter(router.table(query))})
    ) as client:  # type: ignore[arg-type]
        assert isinstance(client.router, StaticRouter), "a static table cannot tell questions from models"


def test_a_batch_tags_its_calls_and_keeps_its_router(router: RTRRouter, tmp_path: Path) -> None:
    names = {pair.model for pair in PAIRS}
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"id": str(n), "question": a_query(n).text}) + "\n" for n in range(6))
    )
    ended = run_batch(
        tmp_path / "in.jsonl",
        tmp_path / "out.jsonl",
        budget="1",
        router=router,
        models={name: ScriptedModel(name, "The answer is 5.") for name in names},
        catalogue=scripted_catalogue(sorted(names), "40"),
        ledger=tmp_path / "ledger.db",
        policy="cheapest:0",
    )
    with Ledger(tmp_path / "ledger.db") as ledger:
        holds = ledger.holds(ended.job.budget)
        assert len(holds) == 6
        for hold in holds:
            expected = Expectation.parse(hold.tags[EXPECTED])
            assert expected is not None
            assert expected.profile == router.profiles()[hold.tags["model"]]
            assert 0 < expected.tokens_p50 <= expected.tokens_p90
        assert ledger.folder == tmp_path
        watched = WatchedRouter(router, ledger, tmp_path)
        watched.table(a_query())
        assert sum(watch.count for watch in watched._watches.values()) == 6
    with Ledger("memory:") as ledger:
        nowhere = WatchedRouter(router, ledger, ledger.folder)
        assert nowhere.table(a_query()) == router.table(a_query())


def test_it_is_shown(router: RTRRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import UTC, datetime

    monkeypatch.setenv("VIATICUM_HOME", str(tmp_path))
    monkeypatch.delenv("VIATICUM_LEDGER", raising=False)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    change = ModelChange("big", router.profiles()["big"], now, "longer", 50, tokens=(2.0, 2.0))
    old = ModelChange("tiny", "another profile", "2020-01-01T00:00:00+00:00", "worse", 50)
    (tmp_path / CHANGES).write_text("".join(json.dumps(each.to_json()) + "\n" for each in (change, old)))
    findings = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    (found,) = [each for each in findings if each["check"] == "changes"]
    assert found["found"].startswith("big left its profile")
    assert "2 times the output tokens" in found["found"]
    router.save(tmp_path / "router")
    monkeypatch.setattr("viaticum.routers.query.rtr.Encoder", lambda name, **_: Words())
    shown = CliRunner().invoke(app, ["router", "show", str(tmp_path / "router"), a_query(5).text])
    assert shown.exit_code == 0, shown.output
    assert "big has changed" in shown.output
    assert "tiny has changed" not in shown.output
    as_json = CliRunner().invoke(app, ["router", "show", str(tmp_path / "router"), a_query(5).text, "--json"])
    assert set(json.loads(as_json.stdout)["changed_models"]) == {"big"}


def test_a_ledger_elsewhere_is_named(
    router: RTRRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIATICUM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("VIATICUM_LEDGER", raising=False)
    monkeypatch.setattr("viaticum.routers.query.rtr.Encoder", lambda name, **_: Words())
    job = tmp_path / "job"
    job.mkdir()
    change = ModelChange("big", router.profiles()["big"], "2026-01-01T00:00:00+00:00", "longer", 50)
    append_change(job, change)
    saved, ledger = str(tmp_path / "router"), str(job / "ledger.db")
    router.save(Path(saved))
    for where, changed in (([], set()), (["--ledger", ledger], {"big"})):
        shown = CliRunner().invoke(app, ["router", "show", saved, a_query(5).text, "--json", *where])
        assert shown.exit_code == 0, shown.output
        assert set(json.loads(shown.stdout)["changed_models"]) == changed
    done = CliRunner().invoke(app, ["router", "dismiss", saved, "big", "--ledger", ledger])
    assert done.exit_code == 0, done.output
    assert current_changes(job, router.profiles()) == {}
    assert not (tmp_path / "home" / CHANGES).exists()
