"""Plans with a check: what they come to by a table of verdicts, and when a router proposes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_outcomes import PAIRS, SKILLS, Words, a_question, outcomes
from typer.testing import CliRunner

from viaticum.cli import app
from viaticum.errors import DataError, InputError
from viaticum.outcomes import checked_pair, read_outcomes, read_verdicts, write_outcomes
from viaticum.routers.query import Plan, Weighted, choose_plan
from viaticum.routers.query.evaluate import evaluate
from viaticum.routers.query.fit import fit
from viaticum.routers.query.leave_out import evaluate_leaving_out
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.parameters import RTRSettings
from viaticum.routers.query.plans import simulate
from viaticum.routers.query.rtr import RTRRouter
from viaticum.types import Outcome, Pair, Query

pytestmark = pytest.mark.usefixtures("one_thread")
TINY, BIG = Pair("tiny", "cot"), Pair("big", "cot")
PER_DOLLAR = 100.0


def verdicts(
    rows: Sequence[Outcome], *, if_right: float, if_wrong: float, dollars: float, seed: int = 5
) -> list[Outcome]:
    """Verdicts of "judge" on all answers, which say yes at these rates."""
    rng, found = np.random.default_rng(seed), []
    for row in rows:
        yes = bool(rng.random() < (if_right if row.correct else if_wrong))
        found.append(
            replace(
                row,
                model="judge",
                strategy=f"verify:{row.pair}",
                answer="yes" if yes else "no",
                correct=yes == row.correct,
                cost_nanousd=round(1e9 * dollars),
                output_tokens=30,
            )
        )
    return found


def matrix_of(count: int = 300, seed: int = 0, **judge: float) -> OutcomeMatrix:
    rows = outcomes(count, seed)
    return OutcomeMatrix.from_outcomes(rows, verdicts=verdicts(rows, **judge) if judge else ())


GOOD = {"if_right": 0.95, "if_wrong": 0.05, "dollars": 0.0001}


@pytest.fixture(scope="module")
def checking() -> RTRRouter:
    return fit(matrix_of(400, **GOOD), Words())  # type: ignore[arg-type]


def checks_of(router: RTRRouter) -> list[Plan]:
    return [plan for plan in router.plans if any(pair.is_check for pair in plan.pairs)]


def test_a_plan_with_a_check_is_validated_and_printed() -> None:
    small, check, big = Pair("small", "cot"), Pair("judge", "verify"), Pair("big", "cot")
    assert str(Plan((small, check, big), 1)) == "small+cot if judge+verify says yes, else big+cot"
    assert Plan((small, Pair("big", "verify"), big), 1)  # whoever checks may answer afterwards
    with pytest.raises(InputError, match="small does not check its own answers"):
        Plan((small, Pair("small", "verify"), big), 1)
    wrong = (((small, check, big), 2), ((check, small, big), 1), ((small, big, check), 1), ((small, big), 1))
    for pairs, need in (*wrong, ((small, check), 1), ((small, check), 2)):
        with pytest.raises(InputError):
            Plan(pairs, need)


def test_a_router_of_an_earlier_version_whose_model_checks_its_own_answers_is_read(
    checking: RTRRouter, tmp_path: Path
) -> None:
    found = checks_of(checking)[0]
    first, _, last = found.pairs
    own = Plan((first, Pair(first.model, "verify"), last), 1, stored=True)
    plans = tuple(own if plan == found else plan for plan in checking.plans)
    RTRRouter(replace(checking.parameters, plans=plans), Words()).save(tmp_path)  # type: ignore[arg-type]
    router = RTRRouter.load(tmp_path, Words())  # type: ignore[arg-type]
    assert router.plans == plans
    assert own in [row.plan for row in router.plans_for(Query("mother sister uncle"))]


def test_simulating_a_check_follows_its_rule() -> None:
    """Read literally, question by question: yes ends it, else the last pair's answer if it gives one."""
    rng = np.random.default_rng(3)
    correct = rng.integers(0, 2, (200, 3)).astype(float)
    cost, answers = rng.random((200, 3)), rng.integers(-2, 3, (200, 3))
    results, spent, calls = simulate(((0, 2, 1), 1), correct, cost, answers)
    for row in range(200):
        wanted = correct[row, 0], cost[row, 0]
        steps = 2
        if answers[row, 0] >= 0:
            wanted = wanted[0], wanted[1] + cost[row, 2]
        if answers[row, 0] < 0 or not correct[row, 2]:
            keeps = answers[row, 0] >= 0 and answers[row, 1] < 0
            wanted, steps = (correct[row, 0 if keeps else 1], wanted[1] + cost[row, 1]), 3
        assert (results[row], pytest.approx(spent[row]), calls[row]) == (*wanted, steps)


def test_a_verifier_that_pays_is_asked_where_that_is_worth_it(checking: RTRRouter) -> None:
    found = checks_of(checking)
    assert found
    assert all(plan.pairs[1] == Pair("judge", "verify") and plan.need == 1 for plan in found)
    assert any(plan.pairs[2] == BIG for plan in found)
    rng, policy = np.random.default_rng(9), Weighted(PER_DOLLAR)
    chosen = [
        choose_plan(checking.plans_for(Query(a_question(kind, rng))), None, policy).plan
        for kind in ("sums", "kin")
        for _ in range(20)
    ]
    assert sum(plan in found for plan in chosen) > 30
    assert len({plan for plan in chosen if plan in found}) > 1, "which one depends on the question"
    assert [each.models for each in checking.knowledge()] == [("big", "judge", "mid", "tiny")]
    facts = {each["pair"]: each for each in checking.parameters.facts["verifiers"]}
    assert facts[str(TINY)]["yes_if_right"] == pytest.approx(0.95, abs=0.04)
    assert facts[str(TINY)]["yes_if_wrong"] == pytest.approx(0.05, abs=0.04)
    assert facts[str(TINY)]["cost"] == pytest.approx(0.0001)


def test_the_row_of_a_check_has_the_accuracy_and_cost_that_it_comes_to(checking: RTRRouter) -> None:
    """By kind of question: by the rates that answers and verdicts were drawn with."""
    first, last = SKILLS[Pair("mid", "cot")], SKILLS[BIG]
    plan = Plan((Pair("mid", "cot"), Pair("judge", "verify"), BIG), 1)
    assert plan in checks_of(checking)
    rng = np.random.default_rng(11)
    for kind in ("sums", "kin"):
        rate = first[0][kind]
        passed = 0.95 * rate + 0.05 * (1 - rate)
        rows = [
            next(row for row in checking.plans_for(Query(a_question(kind, rng))) if row.plan == plan)
            for _ in range(60)
        ]
        accuracy = float(np.mean([row.accuracy for row in rows]))
        assert accuracy == pytest.approx(0.95 * rate + (1 - passed) * last[0][kind], abs=0.06)
        dollars = float(np.mean([row.expected_cost for row in rows])) / 1e9
        tokens = [each[1] * float(np.exp(0.08)) for each in (first, last)]  # means of log-normal lengths
        wanted = tokens[0] * first[2] + 0.0001 + (1 - passed) * tokens[1] * last[2]
        assert dollars == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize(
    "judge",
    [
        {"if_right": 0.6, "if_wrong": 0.6, "dollars": 0.0001},  # knows nothing
        {"if_right": 0.95, "if_wrong": 0.05, "dollars": 0.02},  # costs more than the best pair
        {"if_right": 1.0, "if_wrong": 1.0, "dollars": 0.0001},  # calls everything right
    ],
)
def test_a_verifier_that_does_not_pay_is_not_asked(judge: dict[str, float]) -> None:
    with_judge, without = (fit(matrix_of(300, **each), Words()) for each in (judge, {}))  # type: ignore[arg-type]
    assert not checks_of(with_judge)
    assert with_judge.plans == without.plans
    assert with_judge.knowledge() == without.knowledge()
    texts = [a_question(kind, np.random.default_rng(4)) for kind in ("sums", "kin", "games")]
    ours, theirs = (router.predict_texts(texts) for router in (with_judge, without))
    assert np.array_equal(ours.accuracy.numpy(), theirs.accuracy.numpy())
    assert np.array_equal(ours.cost.numpy(), theirs.cost.numpy())


def test_a_table_without_verdicts_gives_the_same_choices() -> None:
    """The columns besides those of checks are searched for and fitted as they were."""
    checking, plain = (fit(matrix_of(300, **each), Words()) for each in (GOOD, {}))  # type: ignore[arg-type]
    assert checks_of(checking)
    assert [plan for plan in checking.plans if plan not in checks_of(checking)] == list(plain.plans)
    assert "verifiers" not in plain.parameters.facts
    without = fit(matrix_of(300, **GOOD), Words(), settings=RTRSettings(plans=False))  # type: ignore[arg-type]
    assert not checks_of(without)


def test_few_questions_with_a_lucky_verifier_are_no_evidence() -> None:
    """A verifier that knows nothing, on 60 questions, over many draws of its verdicts."""
    rows = outcomes(60)
    found = 0
    for seed in range(12):
        said = verdicts(rows, if_right=0.5, if_wrong=0.5, dollars=0.0001, seed=seed)
        matrix = OutcomeMatrix.from_outcomes(rows, verdicts=said)
        found += bool(checks_of(fit(matrix, Words())))  # type: ignore[arg-type]
    assert found == 0


def test_it_is_saved_evaluated_and_left_out_by_kind(checking: RTRRouter, tmp_path: Path) -> None:
    checking.save(tmp_path)
    loaded = RTRRouter.load(tmp_path, Words())  # type: ignore[arg-type]
    assert loaded.plans == checking.plans
    test = matrix_of(300, seed=8, **GOOD)
    result = evaluate(loaded, test, budgets=(0.0005, 0.001, 0.003))
    plain = fit(matrix_of(400), Words())  # type: ignore[arg-type]
    before = evaluate(plain, test, budgets=(0.0005, 0.001, 0.003))
    gains = [
        ours["accuracy"] - theirs["accuracy"]
        for ours, theirs in zip(result["curve"], before["curve"], strict=True)
    ]
    assert max(gains) > 0.02, "the check is worth money that agreement is not"
    assert min(gains) > -0.02
    with pytest.raises(DataError, match="no verdicts"):
        evaluate(loaded, matrix_of(300, seed=8))
    left = evaluate_leaving_out(matrix_of(300, **GOOD), Words(), budgets=(0.001,))  # type: ignore[arg-type]
    assert all(0 < point["accuracy"] < 1 and point["cost"] > 0 for point in left["pooled"])


def test_verdicts_are_kept_apart_on_disk(tmp_path: Path) -> None:
    rows = outcomes(40)
    said = verdicts(rows, **GOOD)  # type: ignore[arg-type]
    for name in ("table.jsonl", "table.csv", "table.parquet"):
        path = tmp_path / name
        write_outcomes(path, [*rows, *said])
        assert read_outcomes(path) == rows
        assert read_verdicts(path) == said
        assert {checked_pair(row) for row in read_verdicts(path)} == set(PAIRS)
    shown = CliRunner().invoke(app, ["outcomes", "show", str(tmp_path / "table.jsonl"), "--json"])
    found = json.loads(shown.stdout)
    assert (found["outcomes"], found["complete"]) == (160, 40)
    assert {row["pair"] for row in found["verdicts"]} == {f"judge+verify:{pair}" for pair in PAIRS}
    both = ["outcomes", "merge", str(tmp_path / "table.csv"), "--out", str(tmp_path / "both.jsonl")]
    merged = CliRunner().invoke(app, [*both, "--json"])
    found = json.loads(merged.stdout)
    assert {name: found[name] for name in ("outcomes", "verdicts", "pairs", "questions")} == {
        "outcomes": 160,
        "verdicts": 160,
        "pairs": 4,
        "questions": 40,
    }
    words = "160 outcomes of 4 pairs, and 160 verdicts, on 40 questions"
    assert words in CliRunner().invoke(app, both).stdout.replace("\n", " ")
    assert "judge+verify:tiny+cot" in CliRunner().invoke(app, ["outcomes", "show", str(path)]).stdout


def test_verdicts_with_holes_and_on_other_answers() -> None:
    rows = outcomes(120)
    said = verdicts(rows, **GOOD)  # type: ignore[arg-type]
    partial = OutcomeMatrix.from_outcomes(rows, verdicts=said[1:]).without_partial_verdicts()
    assert partial.verdicts is not None
    assert len(partial.verdicts.columns) == 3, "one of tiny+direct is missing"
    none = OutcomeMatrix.from_outcomes(rows, verdicts=said[:40])
    assert none.without_partial_verdicts().verdicts is None
    assert not checks_of(fit(none, Words()))  # type: ignore[arg-type]
    stale = [replace(said[0], correct=not said[0].correct), *said[1:]]
    with pytest.raises(DataError, match="another answer"):
        OutcomeMatrix.from_outcomes(rows, verdicts=stale)
    other = replace(said[0], answer="no" if said[0].answer == "yes" else "yes")
    wrong = [replace(other, correct=not said[0].correct), *said]
    with pytest.raises(DataError, match=r"one verdict of judge on tiny\+direct says yes, another does not"):
        OutcomeMatrix.from_outcomes(rows, verdicts=wrong)
    twice = OutcomeMatrix.from_outcomes(rows, verdicts=[*said, replace(said[0], cost_nanousd=None)])
    assert twice.verdicts is not None
    assert not np.isnan(twice.verdicts.cost).any(), "one of two rows has the cost"
    prices = {pair.model: (1.0, 1.0) for pair in PAIRS}
    with pytest.raises(InputError, match="judge"):
        OutcomeMatrix.from_outcomes(rows, prices, verdicts=said)


def test_what_a_model_says_of_its_own_answers_is_left_out() -> None:
    """However well it looks: with it nothing is planned, nor told, and other models' verdicts still count."""
    rows = outcomes(300)
    of_mid = [replace(row, model="mid") for row in verdicts(rows, **GOOD)]  # type: ignore[arg-type]
    own = [row for row in of_mid if row.strategy.startswith("verify:mid+")]
    assert own
    assert OutcomeMatrix.from_outcomes(rows, verdicts=own).verdicts is None
    matrix = OutcomeMatrix.from_outcomes(rows, verdicts=[*verdicts(rows, **GOOD), *of_mid])  # type: ignore[arg-type]
    assert matrix.verdicts is not None
    assert {matrix.pairs[pair].model for pair, by in matrix.verdicts.columns if by == "mid"} == {
        "tiny",
        "big",
    }
    router = fit(matrix, Words())  # type: ignore[arg-type]
    assert {plan.pairs[1].model for plan in checks_of(router) if plan.pairs[0].model == "mid"} == {"judge"}


def test_verdicts_of_unknown_cost_count_where_no_cost_is_needed(tmp_path: Path) -> None:
    rows = outcomes(300)
    said = verdicts(rows, **GOOD)  # type: ignore[arg-type]
    third = [
        replace(row, cost_nanousd=None if number % 3 == 0 else 100_000) for number, row in enumerate(said)
    ]
    for path in (tmp_path / "known.jsonl", tmp_path / "known.parquet"):
        write_outcomes(path, [*rows, *third])
        assert read_verdicts(path) == third
    matrix = OutcomeMatrix.from_outcomes(rows, verdicts=third)
    router = fit(matrix, Words())  # type: ignore[arg-type]
    assert checks_of(router), "the other questions show what it is worth"
    facts = router.parameters.facts["verifiers"]
    assert sum(each["without_cost"] for each in facts) == len(third[::3])
    assert all(each["answers"] == 300 and each["cost"] == pytest.approx(0.0001) for each in facts)
    column = len(router.pairs) + router.plans[len(router.pairs) :].index(checks_of(router)[0])
    correct, cost = router.parameters.correct[:, column], router.parameters.cost[:, column]
    assert not correct.isnan().any()
    assert 0 < int(cost.isnan().sum()) < 200
    for row in router.plans_for(Query(a_question("kin", np.random.default_rng(1)))):
        assert row.expected_cost > 0
    result = evaluate(router, matrix, budgets=(0.001,))
    assert 0 < result["questions"] < 300
    assert 0 < result["curve"][0]["cost"] < 0.01
    assert matrix.without_partial_verdicts().verdicts is None
    evaluate_leaving_out(matrix, Words(), budgets=(0.001,))  # type: ignore[arg-type]


def test_verdicts_of_which_no_cost_is_known_say_how_often_they_are_right() -> None:
    rows = outcomes(120)
    said = [replace(row, cost_nanousd=None) for row in verdicts(rows, **GOOD)]  # type: ignore[arg-type]
    matrix = OutcomeMatrix.from_outcomes(rows, verdicts=said)
    router = fit(matrix, Words())  # type: ignore[arg-type]
    assert not checks_of(router)
    facts = router.parameters.facts["verifiers"]
    assert [(each["cost"], each["without_cost"]) for each in facts] == [(None, 120)] * 4
    assert all(each["yes_if_right"] > 0.8 for each in facts)
    prices = dict.fromkeys(("tiny", "mid", "big", "judge"), (1.0, 1.0))
    assert OutcomeMatrix.from_outcomes(rows, prices, verdicts=said).verdicts is not None


def test_one_verifier_of_unknown_cost_takes_nothing_from_another() -> None:
    rows = outcomes(300)
    said = verdicts(rows, **GOOD)  # type: ignore[arg-type]
    unpriced = [
        replace(row, model="other", cost_nanousd=None if number % 8 else 100_000)
        for number, row in enumerate(said)
    ]
    alone, beside = (
        fit(OutcomeMatrix.from_outcomes(rows, verdicts=each), Words())  # type: ignore[arg-type]
        for each in (said, [*said, *unpriced])
    )
    assert set(checks_of(alone)) <= set(checks_of(beside))


def test_a_verdict_on_no_pair_is_told_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "known.jsonl"
    row = {"dataset": "d", "question_id": "1", "model": "judge", "strategy": "verify:tiny", "correct": True}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"known\.jsonl.*verify:model\+strategy"):
        read_outcomes(path)
