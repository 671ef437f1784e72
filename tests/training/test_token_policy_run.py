"""Learning R-Stitch+'s policy on a tiny pair: results, resumed runs, pairs of the catalogue, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from token_pairs import write_pair, write_questions
from typer.testing import CliRunner

from viaticum.catalogue import Catalogue
from viaticum.cli import app
from viaticum.decoders.call_times import CallTimes
from viaticum.decoders.cost import CostModel
from viaticum.errors import DataError, InputError, UnknownName, VocabularyMismatch
from viaticum.models.base import Generation
from viaticum.models.local import LocalModels, completion_of
from viaticum.questions import Question, read_questions
from viaticum.routers.token.policy import Policy, PolicyShape, TrainedPolicy
from viaticum.training.policy import PolicySettings, learn, split
from viaticum.training.policy_environment import PolicyEnvironment
from viaticum.training.policy_evaluation import compare, evaluate
from viaticum.types import Query

pytestmark = pytest.mark.usefixtures("one_thread")
TAU = 0.75
COSTS = CostModel(
    CallTimes((1, 4), (1, 9), ((0.01, 0.02), (0.016, 0.05))),
    CallTimes((1, 4), (1, 9), ((0.05, 0.09), (0.08, 0.25))),
    {"device": "cpu", "context": 0},
)
QUICK = PolicySettings(
    TAU,
    "direct",
    latency_weight=0.1,
    group=3,
    questions=2,
    most=4,
    held_out=2,
    rank=4,
    width=8,
    start=1.0,
    epochs=2,
    minibatches=2,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pair `near` and a policy of it.

    Right answers of the questions are those of R-Stitch. The policy is in `p`, learned in two steps and
    served by the pair `near-plus`. The times of calls are in costs.json.
    """
    folder = tmp_path_factory.mktemp("home")
    file = write_pair(folder)
    asked = read_questions(write_questions(folder / "blank.jsonl", 10))
    environment = PolicyEnvironment(Catalogue.load(file), "near", "direct", 1, 6, COSTS)
    served = environment.writer.generate(
        Policy(PolicyShape(32)), TAU, [environment.request(each) for each in asked]
    )
    answers = [
        environment.strategy.read(completion_of(each.result), question.query).value
        for each, question in zip(served, asked, strict=True)
    ]
    rows = [
        {"id": each.id, "question": each.query.text, "answer": answer or "7"}
        for each, answer in zip(asked, answers, strict=True)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    COSTS.save(folder / "costs.json")
    with file.open("a") as catalogue:
        for name, small in (("near-plus", "near-small"), ("far-plus", "near-other")):
            catalogue.write(
                f'\n[models.{name}]\ndescription = "both"\nkind = "pair"\nsmall = "{small}"\n'
                f'large = "near-large"\nmode = "routed"\nrouter = "r-stitch+"\n'
                f'router_path = "{folder / "p"}"\n'
            )
    run_learn(folder, folder / "p")
    return folder


def questions_of(home: Path) -> list[Question]:
    return read_questions(home / "q.jsonl")


def run_learn(
    home: Path, out: Path, settings: PolicySettings = QUICK, steps: int = 2, **values: Any
) -> TrainedPolicy:
    return learn(
        questions_of(home),
        "near",
        out,
        catalogue=Catalogue.load(home / "catalogue.toml"),
        settings=settings,
        steps=steps,
        slots=6,
        costs=COSTS,
        **values,
    )


def curve_of(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# --- what a run keeps ---------------------------------------------------------------------------------------


def test_a_run_keeps_its_curve_its_policy_and_what_it_is_worth(home: Path) -> None:
    rows = curve_of(home / "p")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["questions"] - row["dropped"] <= QUICK.questions
        assert row["questions"] <= QUICK.most
        assert row["texts"] == row["questions"] * QUICK.group
        assert 0 < row["asked_share"] <= 1
        assert 0 < row["called_share"] < 1
        assert 0 < row["large_share"] < 1
        assert 0 <= row["accuracy"] <= 1
        assert row["reward"] <= row["accuracy"]
        assert row["latency"] > 0
    trained = TrainedPolicy.load(home / "p")
    assert (trained.tau, trained.threshold) == (TAU, 0.5)
    assert trained.metadata["steps"] == 2
    assert trained.metadata["learned"] >= 1
    assert bool(trained.policy.head.weight.any()), "it learned"
    result = trained.metadata["evaluation"]
    assert result["questions"] == QUICK.held_out
    assert [row["id"] for row in result["rows"]["before"]] == trained.metadata["split"]["held_out"]
    assert not set(trained.metadata["split"]["held_out"]) & set(trained.metadata["split"]["learned"])
    assert result["before"]["correct"] == 1.0 or result["before"]["correct"] < 1.0
    for name in ("reward", "correct", "large_share", "latency", "tokens"):
        low, high = result["difference"][name]["95%"]
        assert low <= result["difference"][name]["mean"] + 1e-9
        assert high >= result["difference"][name]["mean"] - 1e-9
        assert result["after"][name] - result["before"][name] == pytest.approx(
            result["difference"][name]["mean"]
        )


def test_a_stopped_run_resumes_to_the_same_policy(home: Path, tmp_path: Path) -> None:
    run_learn(home, tmp_path / "r", steps=1)
    resumed = run_learn(home, tmp_path / "r", steps=2)
    assert curve_of(tmp_path / "r") == curve_of(home / "p")
    assert_same_policy(resumed, TrainedPolicy.load(home / "p"))
    again = run_learn(home, tmp_path / "r", steps=2)
    assert_same_policy(again, resumed)


def assert_same_policy(ours: TrainedPolicy, theirs: TrainedPolicy) -> None:
    for name, each in ours.policy.state_dict().items():
        assert torch.equal(each, theirs.policy.state_dict()[name]), name
    assert ours.metadata["evaluation"] == theirs.metadata["evaluation"]
    assert ours.metadata["split"] == theirs.metadata["split"]


def test_a_killed_run_resumes(home: Path, tmp_path: Path) -> None:
    """Killed hard, somewhere in its second step."""
    out = tmp_path / "r"
    arguments = [
        "tokens",
        "policy",
        str(home / "q.jsonl"),
        "--pair",
        "near",
        "--out",
        str(out),
        "--tau",
        str(TAU),
        "--strategy",
        "direct",
        "--lambda",
        "0.1",
        "--group",
        "3",
        "--questions-per-step",
        "2",
        "--most-per-step",
        "4",
        "--held-out",
        "2",
        "--rank",
        "4",
        "--width",
        "8",
        "--start",
        "1",
        "--epochs",
        "2",
        "--minibatches",
        "2",
        "--slots",
        "6",
        "--costs",
        str(home / "costs.json"),
        "--catalogue",
        str(home / "catalogue.toml"),
        "--json",
    ]
    program = "import torch; torch.set_num_threads(1); from viaticum.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--steps", "50"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 200
        while not (out / "curve.jsonl").exists():  # written after the checkpoint
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = len(curve_of(out))
    assert 1 <= done < 50
    steps = done + 1  # the checkpoint may have as many where it was killed before the curve was written
    shown = CliRunner().invoke(app, [*arguments, "--steps", str(steps)])
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.stdout)
    assert result["steps"] == steps
    assert curve_of(out)[:2] == curve_of(home / "p")
    if result["steps"] == 2:
        assert_same_policy(TrainedPolicy.load(out), TrainedPolicy.load(home / "p"))


def test_no_minutes_are_no_steps_and_the_policy_is_r_stitch(home: Path, tmp_path: Path) -> None:
    found = run_learn(home, tmp_path / "r", minutes=0.0)
    assert found.metadata["steps"] == 0
    assert found.metadata["evaluation"] is None
    result = evaluate(
        tmp_path / "r",
        questions_of(home)[:3],
        catalogue=Catalogue.load(home / "catalogue.toml"),
        slots=3,
        costs=COSTS,
    )
    assert result["learned_from"] == 0
    assert result["rows"]["before"] == result["rows"]["after"]


def test_what_was_learned_from_is_known_by_its_text(home: Path, tmp_path: Path) -> None:
    """Not by its id alone, which is the number of a line where a file gives none."""
    trained = TrainedPolicy.load(home / "p")
    first, second = [each for each in questions_of(home) if each.id in trained.metadata["split"]["learned"]][
        :2
    ]
    asked = [
        replace(first, id="new"),
        replace(second, id="newer"),
        replace(first, query=Query("Another question?")),
    ]
    values: dict[str, Any] = {
        "catalogue": Catalogue.load(home / "catalogue.toml"),
        "slots": 3,
        "costs": COSTS,
    }
    assert evaluate(home / "p", asked, **values)["learned_from"] == 2
    older = {name: value for name, value in trained.metadata.items() if name != "digests"}
    TrainedPolicy(trained.policy, older).save(tmp_path)
    assert evaluate(tmp_path, asked, **values)["learned_from"] == 1, "by ids, where it has no texts"


def test_questions_are_split_by_their_ids(home: Path) -> None:
    asked = questions_of(home)
    held, rest = split(asked, 3, 0)
    assert len(held) == 3
    assert {each.id for each in (*held, *rest)} == {each.id for each in asked}
    assert ({each.id for each in held}) == {each.id for each in split(asked[::-1], 3, 0)[0]}
    assert [each.id for each in held] != [each.id for each in split(asked, 3, 1)[0]]


def test_intervals_are_of_paired_differences() -> None:
    before = [
        {"reward": n, "correct": True, "large_share": 0.5, "latency": 2.0, "tokens": 10} for n in range(8)
    ]
    after = [{**row, "reward": row["reward"] + 0.25} for row in before]
    result = compare(before, after)["difference"]["reward"]
    assert result["mean"] == pytest.approx(0.25)
    assert result["95%"] == pytest.approx([0.25, 0.25]), "the questions differ widely, the differences do not"


# --- a pair of the catalogue --------------------------------------------------------------------------------


def share_of(home: Path, **changes: object) -> tuple[float, float]:
    """The large model's share, and that of the places at which the policy was asked."""
    catalogue = Catalogue.load(home / "catalogue.toml")
    spec = catalogue["near-plus"].model_copy(update=changes)
    model = LocalModels(catalogue.with_models(spec), slots=4).model("near-plus")
    traces = [
        completion.trace
        for _, completion in model.generate_all(
            [[{"role": "user", "content": f"How many {n}?"}] for n in range(4)], Generation(24)
        )
    ]
    made = [by for trace in traces if trace is not None for by in trace.made_by]
    scores = [score for trace in traces if trace is not None for score in trace.scores]
    return sum(made) / len(made), sum(score == score for score in scores) / len(made)


def test_a_pair_of_the_catalogue_is_served_by_its_policy(home: Path) -> None:
    share, asked = share_of(home)
    assert 0 < share < 1
    assert asked > 0
    assert share_of(home, tau=1.0) == (0, 0), "tau of the entry is taken"
    assert share_of(home, threshold=1.0)[0] == 0
    assert share_of(home, threshold=0.0)[0] >= share


def test_a_policy_of_other_weights_is_refused(home: Path) -> None:
    catalogue = Catalogue.load(home / "catalogue.toml")
    with pytest.raises(
        InputError, match=r"made for near-small with sha256 \w{12}, and near-other has \w{12}"
    ):
        LocalModels(catalogue).model("far-plus").generate([{"role": "user", "content": "?"}], Generation(4))
    with pytest.raises(InputError, match="made for near-small"):
        evaluate(home / "p", questions_of(home), catalogue=catalogue, pair="far", costs=COSTS)
    packaged = catalogue["near-plus"].model_copy(update={"router_path": None})
    with pytest.raises(
        InputError, match=r"no router is packaged for it; train one with `viaticum tokens policy`"
    ):
        LocalModels(catalogue.with_models(packaged)).model("near-plus").generate(
            [{"role": "user", "content": "?"}], Generation(4)
        )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('router = "r-stitch+"\nshare = 0.3', r"r-stitch\+ takes no share"),
        ('router = "r-stitch+"\ndrift = true', r"r-stitch\+ takes no drift"),
        ('router = "r-stitch"\ntau = 0.1\nrouter_path = "x"', "r-stitch takes no router_path"),
        ('router = "r-stitch+"\nthreshold = 1.5', "less than or equal to 1"),
    ],
)
def test_entries_whose_fields_do_not_fit_the_router(
    home: Path, tmp_path: Path, lines: str, message: str
) -> None:
    text = (home / "catalogue.toml").read_text().partition("[models.near-plus]")[0]
    (tmp_path / "c.toml").write_text(
        f'{text}\n[models.x]\ndescription = "x"\nkind = "pair"\nsmall = "near-small"\n'
        f'large = "near-large"\n{lines}\n'
    )
    with pytest.raises(InputError, match=message):
        Catalogue.load(tmp_path / "c.toml")


# --- bad input ----------------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="begun with another settings"):
        run_learn(home, home / "p", replace(QUICK, seed=7))
    catalogue = Catalogue.load(home / "catalogue.toml")
    values: dict[str, Any] = {"catalogue": catalogue, "settings": QUICK, "costs": COSTS}
    with pytest.raises(InputError, match="another pair"):
        learn(questions_of(home), "far", home / "p", **values)
    with pytest.raises(InputError, match="another questions_sha256"):
        learn(questions_of(home)[1:], "near", home / "p", **values)
    with pytest.raises(InputError, match="another costs_sha256"):
        learn(
            questions_of(home), "near", home / "p", **{**values, "costs": replace(COSTS, cached=(1e-6, 0.0))}
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        run_learn(home, tmp_path / "file" / "r")


def test_a_damaged_checkpoint_is_named(home: Path, tmp_path: Path) -> None:
    run_learn(home, tmp_path / "r", steps=1)
    path = tmp_path / "r" / "checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(DataError, match=r"checkpoint.safetensors is damaged"):
        run_learn(home, tmp_path / "r")
    path.write_bytes(whole)
    (tmp_path / "r" / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run.json is damaged"):
        run_learn(home, tmp_path / "r")
    assert {name.partition(".")[0] for name in load_file(path)} == {"policy", "adam"}


def test_equal_rewards_are_reported_with_advice(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the policy was asked 0 times\); lower tau from 1.0"):
        run_learn(home, tmp_path / "a", replace(QUICK, tau=1.0))
    hopeless = [replace(each, gold="no such thing") for each in questions_of(home)]
    with pytest.raises(
        DataError,
        match=r"no question of 4 has texts with different rewards \(0 of 12 right.*give other questions",
    ):
        learn(
            hopeless,
            "near",
            tmp_path / "b",
            catalogue=Catalogue.load(home / "catalogue.toml"),
            settings=QUICK,
            slots=6,
            costs=COSTS,
        )
    assert not (tmp_path / "b" / "checkpoint.safetensors").exists()


def test_dynamic_sampling_asks_other_questions_and_counts(home: Path, tmp_path: Path) -> None:
    """Half of the questions have no reachable answer: they are dropped, counted and replaced."""
    asked = [
        replace(each, gold="no such thing") if number % 2 else each
        for number, each in enumerate(questions_of(home))
    ]
    settings = replace(QUICK, questions=2, most=10, held_out=0)
    learn(
        asked,
        "near",
        tmp_path / "r",
        catalogue=Catalogue.load(home / "catalogue.toml"),
        settings=settings,
        steps=1,
        slots=6,
        costs=COSTS,
    )
    row = curve_of(tmp_path / "r")[0]
    assert row["dropped"] > 0
    assert row["questions"] == row["dropped"] + 2


def test_a_policy_without_its_facts_is_refused(home: Path, tmp_path: Path) -> None:
    trained = TrainedPolicy.load(home / "p")
    facts = {name: value for name, value in trained.metadata.items() if name != "costs"}
    TrainedPolicy(trained.policy, facts).save(tmp_path)
    with pytest.raises(DataError, match="does not say its costs"):
        evaluate(tmp_path, questions_of(home), catalogue=Catalogue.load(home / "catalogue.toml"))


def test_answers_are_needed(home: Path, tmp_path: Path) -> None:
    blank = read_questions(home / "blank.jsonl")
    catalogue = Catalogue.load(home / "catalogue.toml")
    with pytest.raises(DataError, match=r"10 of 10 questions have no right answer, e\.g\. 'q0'"):
        learn(blank, "near", tmp_path / "r", catalogue=catalogue, settings=QUICK, costs=COSTS)
    with pytest.raises(DataError, match="no right answer"):
        evaluate(home / "p", blank, catalogue=catalogue, costs=COSTS)
    with pytest.raises(DataError, match="held out, which leaves none"):
        run_learn(home, tmp_path / "r", replace(QUICK, held_out=10))


def test_a_pair_with_other_vocabularies_is_refused(home: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(home / "small", tmp_path / "small")
    result = json.loads((tmp_path / "small" / "tokenizer.json").read_text())
    vocabulary = result["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "small" / "tokenizer.json").write_text(json.dumps(result))
    file = tmp_path / "c.toml"
    file.write_text(
        (home / "catalogue.toml").read_text().replace(str(home / "small"), str(tmp_path / "small"))
    )
    with pytest.raises(VocabularyMismatch):
        learn(
            questions_of(home),
            "near",
            tmp_path / "r",
            catalogue=Catalogue.load(file),
            settings=QUICK,
            costs=COSTS,
        )


def test_commands_refuse_impossible_options(home: Path, tmp_path: Path) -> None:
    def failure(*arguments: object) -> Exception:
        shared = [
            home / "q.jsonl",
            "--out",
            tmp_path / "r",
            "--catalogue",
            home / "catalogue.toml",
            "--costs",
            home / "costs.json",
        ]
        shown = CliRunner().invoke(app, ["tokens", "policy", *map(str, [*shared, *arguments])])
        assert isinstance(shown.exception, InputError), shown.output
        return shown.exception

    assert "tau is a normalised entropy" in str(failure("--pair", "near", "--tau", 1.5))
    assert "lambda" in str(failure("--pair", "near", "--lambda", -1))
    assert "is a local model" in str(failure("--pair", "near-small"))
    assert "asks at least the 4 questions" in str(failure("--pair", "near", "--most-per-step", 2))
    assert "is not graded text by text" in str(
        failure("--pair", "near", "--strategy", "self-consistency:cot:3")
    )
    assert "start is a logit" in str(failure("--pair", "near", "--start", 0))
    assert "cannot read the cost model" in str(failure("--pair", "near", "--costs", tmp_path / "none"))
    assert "rate, low, high" in str(failure("--pair", "near", "--rate", 0))
    assert isinstance(failure("--pair", "neer"), UnknownName)


def test_costs_have_to_be_measured(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("viaticum.models.decoding_modes.cache_dir", lambda: tmp_path)
    with pytest.raises(InputError, match="viaticum models measure near"):
        learn(
            questions_of(home),
            "near",
            tmp_path / "r",
            catalogue=Catalogue.load(home / "catalogue.toml"),
            settings=QUICK,
        )


def test_a_policy_is_evaluated_by_a_command(home: Path) -> None:
    arguments = [
        "tokens",
        "policy-evaluate",
        home / "p",
        home / "q.jsonl",
        "--limit",
        3,
        "--catalogue",
        home / "catalogue.toml",
    ]
    shown = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.stdout)
    assert result["questions"] == 3
    assert "R-Stitch+" in CliRunner().invoke(app, list(map(str, arguments))).stdout
