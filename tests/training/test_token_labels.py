"""Labels over a tiny pair: features equal the served ones, texts are the large model's, nothing is lost."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, Letters, build, requests_of
from token_pairs import write_pair, write_questions
from typer.testing import CliRunner

from viaticum.catalogue import Catalogue
from viaticum.cli import app
from viaticum.decoders import MixedDecoder, TorchRunner
from viaticum.decoders.features import Features, read_features
from viaticum.errors import (
    DataError,
    InputError,
    ModelError,
    PromptTooLong,
    UnknownName,
    VocabularyMismatch,
)
from viaticum.models.local import LocalModels, stop_ids
from viaticum.models.scripted import ScriptedModel
from viaticum.questions import digest_of, read_questions
from viaticum.routers.token import DivergenceRouter, Step, entropy
from viaticum.routers.token.label_stats import statistics
from viaticum.routers.token.labels import (
    DIVERGENT,
    IDENTICAL,
    NEUTRAL,
    UNKNOWN,
    LabelledTokens,
    Shard,
    read_rows,
    shard_paths,
)
from viaticum.strategies import get as get_strategy
from viaticum.training.continuations import distinct_tokens
from viaticum.training.label_journal import Journal, Response
from viaticum.training.sentences import DivergenceSpan
from viaticum.training.token_labels import LabelSettings, label, verify
from viaticum.training.verifiers import (
    Difference,
    ModelVerifier,
    OutcomeVerifier,
    SemanticVerifier,
    numbers_in,
    read_verdict,
)
from viaticum.types import Query

pytestmark = pytest.mark.usefixtures("one_thread")
DIRECT = LabelSettings("direct")
COUNT = 8


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def catalogue(pair_file: Path) -> Catalogue:
    return Catalogue.load(pair_file)


@pytest.fixture(scope="module")
def labelled(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    asked = read_questions(write_questions(folder / "q.jsonl", COUNT))
    label(asked, "near", folder / "labels", catalogue=catalogue, settings=DIRECT, slots=3)
    return folder / "labels"


# --- features -----------------------------------------------------------------------------------------------


class Recorder(DivergenceRouter):
    """Keeps what it is shown, and lets the large model write every third token."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.seen: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}

    def score(self, step: Step) -> torch.Tensor:
        assert step.hidden is not None
        top = step.top_logits()
        for row, key in enumerate(zip(step.requests, step.positions, strict=True)):
            self.seen[key] = (step.tokens[row], top[row], step.hidden[row], step.entropy[row])
        return torch.tensor([float(position % 3 == 2) for position in step.positions])


def served_and_offline(
    dtype: torch.dtype, slots: int, step_tokens: int
) -> list[tuple[tuple[torch.Tensor, ...], Features, int]]:
    small, large = (TorchRunner(build(seed=seed).to(dtype), slots=slots) for seed in (0, 100))
    router = Recorder()
    requests = requests_of(4, 6, max_new_tokens=23)
    results = MixedDecoder(large, small, tokenizer=Letters(), router=router).generate_all(requests)
    reader = TorchRunner(small.model, slots=1)
    found = []
    for number, (request, result) in enumerate(zip(requests, results, strict=True)):
        features = read_features(reader, request.prompt, result.trace.tokens, step_tokens=step_tokens)
        assert len(features) == len(result.trace.tokens)
        for index in range(len(features)):
            found.append((router.seen[number, index], features, index))
    assert len(found) > 100
    return found


@pytest.mark.parametrize(("slots", "step_tokens"), [(1, 4), (3, 4), (4, 1), (2, 64)])
def test_the_offline_pass_sees_what_the_served_decode_was_shown(slots: int, step_tokens: int) -> None:
    for (token, top, hidden, chance), features, index in served_and_offline(
        torch.float32, slots, step_tokens
    ):
        assert int(token) == int(features.tokens[index])
        torch.testing.assert_close(top, features.top[index], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(hidden, features.hidden[index], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(chance, features.entropy[index], atol=1e-5, rtol=1e-4)


def test_in_bfloat16_only_the_last_digits_differ() -> None:
    """The dtype of the store is the model's own, in which logits and hidden states are exact."""
    apart, scale, same, rows = 0.0, 0.0, 0, served_and_offline(torch.bfloat16, 4, 4)
    for (token, _, hidden, _), features, index in rows:
        assert features.hidden.dtype == features.top.dtype == torch.bfloat16
        apart = max(apart, float((hidden - features.hidden[index]).abs().max()))
        scale = max(scale, float(hidden.abs().max()))
        same += int(token) == int(features.tokens[index])
    assert apart < 0.1 * scale
    assert same > 0.9 * len(rows)


def test_features_are_those_of_the_whole_text_at_once() -> None:
    model = build(seed=0)
    prompt, text = [5, 9, 2, 11], [7, 1, 88, 30, 30, 4, 9]
    features = read_features(TorchRunner(model), prompt, text, step_tokens=3, count=20)
    out = build(seed=0)(input_ids=torch.tensor([prompt + text[:-1]]), output_hidden_states=True)
    logits = out.logits[0, len(prompt) - 1 :].float()
    assert features.tokens.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(features.top, logits.topk(20).values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        features.hidden, out.hidden_states[-1][0, len(prompt) - 1 :], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(features.entropy, entropy(logits), atol=1e-5, rtol=1e-4)


def test_damaged_weights_give_no_features() -> None:
    model = build(seed=0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        read_features(TorchRunner(model), [1, 2], [3, 4])
    with pytest.raises(InputError, match="empty"):
        read_features(TorchRunner(build()), [1], [])
    with pytest.raises(InputError, match="step_tokens"):
        read_features(TorchRunner(build()), [1], [VOCABULARY - 1], step_tokens=0)


# --- what is labelled ---------------------------------------------------------------------------------------


def large_text(catalogue: Catalogue, prompt: list[int], tokens: list[int], most: int) -> list[int]:
    """What the large model writes after these tokens, alone and with nothing cached."""
    pool = LocalModels(catalogue)
    model, runner = pool.model("near"), pool.runner("near-large")
    decoder = MixedDecoder(runner, tokenizer=model.tokenizer, stop_ids=stop_ids([runner], model.tokenizer))
    from viaticum.decoders import Request

    return list(decoder.generate(Request(prompt + tokens, max_new_tokens=most)).trace.tokens)


def test_every_difference_has_a_continuation_by_the_large_model(catalogue: Catalogue, labelled: Path) -> None:
    journal = [json.loads(line) for line in (labelled / "journal.jsonl").read_text().splitlines()]
    responses = {row["response"]["id"]: row["response"] for row in journal if "response" in row}
    continuations = {
        (row["branch"]["id"], row["branch"]["place"]): row["branch"] for row in journal if "branch" in row
    }
    model = LocalModels(catalogue).model("near")
    strategy = get_strategy("direct")
    assert len(responses) == COUNT
    finished = {name: each for name, each in responses.items() if each["finish"] == "stop"}
    assert 0 < len(finished) < COUNT, "else nothing tells that unfinished texts are left out"
    assert {name for name, _ in continuations} <= set(finished)
    pool = LocalModels(catalogue)
    followed = 0
    for name, each in finished.items():
        prompt = model.prompt(strategy.messages(Query(each["question"])))
        assert each["tokens"] == large_text(catalogue, prompt, [], strategy.max_new_tokens)
        features = read_features(pool.runner("near-small"), prompt, each["tokens"])
        differ = [
            index
            for index, (ours, theirs) in enumerate(zip(each["tokens"], features.tokens.tolist(), strict=True))
            if ours != theirs and ours != model.tokenizer.eos_token_id
        ]
        assert sorted(index for key, index in continuations if key == name) == differ
        for index in differ[::3]:
            continuation = continuations[name, index]
            assert continuation["token"] == int(features.tokens[index])
            before = [*each["tokens"][:index], continuation["token"]]
            if continuation["token"] == model.tokenizer.eos_token_id:
                assert continuation["tokens"] == []
                continue
            most = strategy.max_new_tokens - len(before)
            assert continuation["tokens"] == large_text(catalogue, prompt, before, most)
            followed += 1
    assert followed > 3


def test_the_end_of_a_text_is_no_difference(catalogue: Catalogue, labelled: Path) -> None:
    shard = Shard.load(shard_paths(labelled)[0])
    ends = shard.target == LocalModels(catalogue).model("near").tokenizer.eos_token_id
    assert int(ends.sum()) == len(shard.questions)
    assert bool((shard.known[shard.token] != shard.target)[ends].any()), "else this tests nothing"
    assert not bool(shard.differs[ends].any())


def test_labels_join_features_and_verdicts(labelled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    shutil.copytree(labelled, folder)
    first, *rest = (folder / "labels.jsonl").read_text().splitlines()  # texts of tiny models seldom agree
    neutral = json.loads(first) | {"verdicts": {"outcome": False}}
    (folder / "labels.jsonl").write_text("\n".join([json.dumps(neutral), *rest]) + "\n")
    tokens = LabelledTokens.load(folder)
    rows = list(read_rows(folder))
    assert len(rows) == int(tokens.differing.sum()) > 10
    by_place = {(row["question"], row["place"]): row for row in rows}
    for index in range(len(tokens)):
        row = by_place.get((tokens.questions[int(tokens.owner[index])], int(tokens.place[index])))
        expected = IDENTICAL if row is None else DIVERGENT if row["verdicts"]["outcome"] else NEUTRAL
        assert int(tokens.labels[index]) == expected
    assert {IDENTICAL, NEUTRAL, DIVERGENT} == set(tokens.labels.tolist())
    assert all(row["original"] != row["other"] and row["nats"] > row["entropy"] for row in rows)
    some = tokens.of(tokens.questions[:2])
    assert 0 < len(some) < len(tokens)
    assert set(some.owner.tolist()) == {0, 1}


def test_a_verifier_may_be_preferred_and_is_kept(labelled: Path, tmp_path: Path) -> None:
    folder = copied(labelled, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"verifiers": ["llm", "outcome"]}))
    assert LabelledTokens.load(folder).verifier == "llm"
    assert LabelledTokens.load(folder, prefer="outcome").verifier == "outcome"
    assert LabelledTokens.load(folder, prefer="semantic").verifier == "llm"
    assert LabelledTokens.load(folder, "llm", prefer="outcome").verifier == "llm"


def test_a_folder_keeps_a_digest_of_each_questions_text(
    catalogue: Catalogue, labelled: Path, tmp_path: Path
) -> None:
    asked = read_questions(write_questions(tmp_path / "q.jsonl", COUNT))
    expected = {each.id: digest_of(each.query.text) for each in asked}
    assert LabelledTokens.load(labelled).digests == expected
    folder = copied(labelled, tmp_path)  # as it was made before there were any
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digests"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert LabelledTokens.load(folder).digests == {}
    verify(folder, ["outcome"], catalogue=catalogue)
    assert LabelledTokens.load(folder).digests == expected


def test_embeddings_are_the_small_models(catalogue: Catalogue, labelled: Path) -> None:
    runner = LocalModels(catalogue).runner("near-small")
    shard, tokens = Shard.load(shard_paths(labelled)[0]), LabelledTokens.load(labelled)
    expected = runner.embeddings[shard.known[shard.token]]
    assert torch.equal(tokens.embeddings[tokens.token[: len(expected)]], expected)


def test_prefixes_are_read_once(labelled: Path) -> None:
    work = json.loads((labelled / "manifest.json").read_text())["work"]
    assert work["continuations"]["texts"] > 8
    for stage in ("responses", "continuations"):
        assert work[stage]["read"] <= 1.02 * work[stage]["needed"]
        assert work[stage]["read"] < 0.5 * work[stage]["unshared"]


def test_tokens_that_have_to_be_read() -> None:
    assert distinct_tokens([]) == 0
    assert distinct_tokens([[1, 2, 3], [1, 2, 4], [1, 2, 3, 5], [9]]) == 6


def test_more_questions_join_a_folder(catalogue: Catalogue, labelled: Path, tmp_path: Path) -> None:
    asked = read_questions(write_questions(tmp_path / "q.jsonl", COUNT))
    for some in (asked[:3], asked):
        label(some, "near", tmp_path / "labels", catalogue=catalogue, settings=DIRECT, slots=3)
    grown, whole = LabelledTokens.load(tmp_path / "labels"), LabelledTokens.load(labelled)
    assert len(shard_paths(tmp_path / "labels")) == 2
    assert grown.questions == whole.questions
    assert torch.equal(grown.labels, whole.labels)
    torch.testing.assert_close(grown.hidden, whole.hidden)


KILLED = Path(__file__).resolve().parents[1] / "support" / "killed_at_line.py"


@pytest.mark.timeout(900)  # two more processes have to start, on a machine that may be busy
def test_a_killed_run_resumes_where_it_was(pair_file: Path, labelled: Path, tmp_path: Path) -> None:
    """Killed midway, the last line cut in half: no text is written twice, and the labels are the same."""
    out, journal = tmp_path / "labels", tmp_path / "labels" / "journal.jsonl"
    command = [
        sys.executable,
        "-c",
        "import torch; torch.set_num_threads(1); from viaticum.cli import main; main()",
    ]
    arguments = [
        "tokens",
        "label",
        str(write_questions(tmp_path / "q.jsonl", COUNT)),
        "--pair",
        "near",
        "--out",
        str(out),
        "--strategy",
        "direct",
        "--slots",
        "2",
        "--catalogue",
        str(pair_file),
        "--json",
    ]
    whole = (labelled / "journal.jsonl").read_text().splitlines()
    enough = COUNT + 3  # all responses and some continuations
    killed = [sys.executable, str(KILLED), journal.name, str(enough)]
    assert subprocess.run([*killed, *arguments], capture_output=True).returncode == -signal.SIGKILL
    done = journal.read_bytes().count(b"\n")
    with journal.open("ab") as half:
        half.write(b'{"branch": {"id": "q1", "pl')
    assert enough <= done < len(whole)
    finished = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600, check=True)
    assert json.loads(finished.stdout)["tokens"] == len(LabelledTokens.load(labelled))
    assert "continuations: " in finished.stderr

    def lines(path: Path) -> list[str]:
        return sorted(path.read_text().splitlines())

    assert lines(journal) == sorted(whole)
    assert lines(out / "labels.jsonl") == lines(labelled / "labels.jsonl")


# --- verifiers ----------------------------------------------------------------------------------------------


def a_difference(ours: str, theirs: str | None, sentences: tuple[str, str] = ("a.", "b.")) -> Difference:
    return Difference(Query("How many?", "number"), DivergenceSpan("So.", *sentences), ours, theirs)


def test_outcome_compares_the_texts_with_each_other() -> None:
    verifier = OutcomeVerifier(get_strategy("cot"))
    found = dict(
        verifier.judge(
            [
                a_difference("The answer is 1,000.", "Thus it is so.\nThe answer is $1000.00."),
                a_difference("The answer is 5.", "The answer is 6."),
                a_difference("The answer is 5.", "It goes on"),
                a_difference("The answer is 5.", None),
            ]
        )
    )
    assert found == {0: False, 1: True, 2: True, 3: None}


def test_semantic_needs_equal_numbers_and_similar_sentences() -> None:
    angles_of = {"She eats 3.": 0.0, "He eats 3.": 0.1, "She eats 4.": 0.0, "Cars are 3 times as red.": 1.5}

    def embed(texts: Any) -> torch.Tensor:
        angles = torch.tensor([angles_of[text] for text in texts])
        return torch.stack([angles.cos(), angles.sin()], 1)

    verifier = SemanticVerifier(embed)
    originals = [" She eats 3.", "She eats 3."]
    pairs = [
        (originals[0], "He eats 3."),
        (originals[1], "She eats 4."),
        (originals[0], "Cars are 3 times as red."),
    ]
    assert dict(verifier.judge([a_difference("", None, each) for each in pairs])) == {
        0: False,
        1: True,
        2: True,
    }
    assert list(verifier.judge([])) == []
    assert numbers_in("$1,000.50 and 3, 4.") == [1000.5, 3, 4]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("1", True),
        ("0", False),
        (" 1.", True),
        ("Answer: 0", False),
        ("", None),
        ("0 or 1", None),
        ("10", None),
        ("maybe", None),
        ("0.1", None),
    ],
)
def test_a_models_verdict_is_read(text: str, verdict: bool | None) -> None:
    assert read_verdict(text) is verdict


def test_a_model_is_shown_the_difference_and_what_cannot_be_read_is_dropped(
    catalogue: Catalogue, labelled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "labels"
    folder.mkdir()
    for path in labelled.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    judge = ScriptedModel(["1", "0", "dunno", "0", "0"])
    result = verify(folder, ["llm"], catalogue=catalogue, models=lambda name: judge)
    assert result["verifiers"] == ["outcome", "llm"]
    shown = judge.calls[0][0][-1]["content"]
    assert "How many" in shown
    assert "<<" in shown
    tokens = LabelledTokens.load(folder, "llm")
    assert int((tokens.labels == UNKNOWN).sum()) == 1
    assert int((tokens.labels == DIVERGENT).sum()) == 1
    agreement = statistics(folder)["agreement"]
    assert agreement[0]["verifiers"] == ["outcome", "llm"]
    assert agreement[0]["differences"] == len(judge.calls) - 1
    assert -1 <= agreement[0]["kappa"] <= 1
    assert 0 <= agreement[0]["share"] <= 1
    verify(folder, ["llm"], catalogue=catalogue, models=lambda name: judge)
    assert len(judge.calls) == agreement[0]["differences"] + 1, "verdicts are kept, dropped ones too"


def test_a_verifier_may_judge_a_part_of_the_differences(
    catalogue: Catalogue, labelled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "labels"
    shutil.copytree(labelled, folder)
    of, judge = len(list(read_rows(folder))), ScriptedModel("0")
    for _ in range(2):  # the same ones again
        verify(folder, ["llm"], catalogue=catalogue, limit=3, models=lambda name: judge)
        assert len(judge.calls) == 3
    tokens = LabelledTokens.load(folder, "llm")
    assert int((tokens.labels == UNKNOWN).sum()) == of - 3
    assert statistics(folder)["agreement"][0]["differences"] == 3
    verify(folder, ["llm"], catalogue=catalogue, models=lambda name: judge)
    assert len(judge.calls) == of, "the others come later"


def test_an_asked_model_of_the_catalogue_answers(catalogue: Catalogue) -> None:
    verifier = ModelVerifier(LocalModels(catalogue, slots=2).model("near-large"))
    found = dict(verifier.judge([a_difference("a", "b"), a_difference("c", "d")]))
    assert set(found) == {0, 1}


def test_without_outcome_continuations_end_with_a_sentence(catalogue: Catalogue, tmp_path: Path) -> None:
    asked = read_questions(write_questions(tmp_path / "q.jsonl", COUNT))
    out, judge = tmp_path / "labels", ScriptedModel("0")
    short = label(
        asked,
        "near",
        out,
        catalogue=catalogue,
        verifiers=["llm"],
        settings=LabelSettings("direct", sentence_cap=2),
        slots=3,
        models=lambda name: judge,
    )
    rows = list(read_rows(out))
    assert any(row["other_finish"] == "sentence" and row["other_text"] is None for row in rows)
    with pytest.raises(InputError, match="end with a sentence"):
        verify(out, ["outcome"], catalogue=catalogue)
    whole = label(
        asked, "near", out, catalogue=catalogue, settings=LabelSettings("direct", sentence_cap=2), slots=3
    )
    assert whole["verifiers"] == ["llm", "outcome"]
    assert short["work"]["continuations"]["made"] < whole["work"]["continuations"]["made"]
    assert all(row["other_finish"] != "sentence" for row in read_rows(out))


def test_outcome_judges_no_text_before_its_end_and_loses_no_verdict(
    catalogue: Catalogue, labelled: Path, tmp_path: Path
) -> None:
    """Also where a run has judged texts that ended with a sentence, and stored "unknown"."""
    asked = read_questions(write_questions(tmp_path / "q.jsonl", COUNT))
    out, settings = tmp_path / "labels", LabelSettings("direct", sentence_cap=2)
    half, judge = COUNT // 2, ScriptedModel("0")
    for some, verifier in ((asked[:half], "llm"), (asked[half:], "outcome")):
        label(
            some,
            "near",
            out,
            catalogue=catalogue,
            verifiers=[verifier],
            settings=settings,
            slots=3,
            models=lambda name: judge,
        )
    short = [row for row in read_rows(out) if row["other_finish"] == "sentence"]
    assert short
    assert not any("outcome" in row["verdicts"] for row in short)
    with (out / "journal.jsonl").open("a") as journal:
        rows = [[row["question"], row["place"], None] for row in short]
        journal.write(json.dumps({"verdicts": rows, "by": "outcome"}) + "\n")
    label(asked, "near", out, catalogue=catalogue, settings=settings, slots=3)
    assert torch.equal(LabelledTokens.load(out, "outcome").labels, LabelledTokens.load(labelled).labels)


def test_resumed_continuations_equal_those_written_at_once(
    catalogue: Catalogue, labelled: Path, tmp_path: Path
) -> None:
    asked = read_questions(write_questions(tmp_path / "q.jsonl", COUNT))
    for verifiers in (["llm"], ["outcome"]):
        label(
            asked,
            "near",
            tmp_path / "labels",
            catalogue=catalogue,
            verifiers=verifiers,
            settings=LabelSettings("direct", sentence_cap=2),
            slots=3,
            models=lambda name: ScriptedModel("0"),
        )

    def texts(folder: Path) -> dict[tuple[str, int], str]:
        return {(row["question"], row["place"]): row["other_text"] for row in read_rows(folder)}

    assert texts(tmp_path / "labels") == texts(labelled)


# --- commands and bad input ---------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["tokens", *map(str, arguments)])


def test_the_table_has_a_row_a_token_with_every_verdict(labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens.parquet"
    assert run("table", labelled, out).exit_code == 0
    rows, tokens = parquet.read_table(out).to_pylist(), LabelledTokens.load(labelled)
    assert len(rows) == len(tokens)
    judged = {(row["question"], row["place"]): row for row in read_rows(labelled)}
    for row in rows:
        label = judged.get((row["question"], row["place"]))
        if label is None:
            assert row["outcome"] == "identical"
            continue
        assert row["token"] == label["token"]
        assert row["nats"] == pytest.approx(label["nats"], abs=1e-3)
        assert (
            row["outcome"]
            == {True: "divergent", False: "neutral", None: "unknown"}[label["verdicts"].get("outcome")]
        )


def test_statistics_are_printed(labelled: Path) -> None:
    result = json.loads(run("stats", labelled, "--json").stdout)
    of = result["verifiers"]["outcome"]
    assert (
        sum(of[kind]["tokens"] for kind in ("identical", "neutral", "divergent", "unknown"))
        == result["tokens"]
    )
    assert of["identical"]["nats"] == pytest.approx(of["identical"]["entropy"] * 5.549, rel=1e-3)  # ln 257
    tokens = LabelledTokens.load(labelled)
    assert of["divergent"]["entropy"] == pytest.approx(
        float(tokens.entropy[tokens.labels == DIVERGENT].mean()), rel=1e-5
    )
    shown = run("stats", labelled).stdout
    assert "divergent" in shown
    assert f"{result['differing']} differ" in shown


def failure(*arguments: object) -> BaseException:
    shown = run(*arguments)
    assert shown.exception is not None
    return shown.exception


def test_bad_input_is_reported_before_anything_is_computed(
    pair_file: Path, catalogue: Catalogue, labelled: Path, tmp_path: Path
) -> None:
    file = write_questions(tmp_path / "q.jsonl", 2)
    asked = read_questions(file)
    shared = ["--pair", "near", "--out", tmp_path / "labels", "--catalogue", pair_file]
    assert isinstance(unknown := failure("label", file, *shared, "--verifier", "outcom"), UnknownName)
    assert "did you mean 'outcome'" in str(unknown)
    (empty := tmp_path / "empty.jsonl").write_text("")
    assert "no questions" in str(failure("label", empty, *shared))
    assert not (tmp_path / "labels").exists()
    with pytest.raises(InputError, match="near-small is a local model"):
        label(asked, "near-small", tmp_path / "labels", catalogue=catalogue)
    with pytest.raises(InputError, match=r"another strategy|another settings"):
        label(asked, "near", labelled, catalogue=catalogue)
    swapped = [replace(each, id=f"q{1 - n}") for n, each in enumerate(asked)]
    with pytest.raises(InputError, match="another question with the id 'q1'"):
        label(swapped, "near", labelled, catalogue=catalogue, settings=DIRECT)
    with pytest.raises(InputError, match="no labels by 'llm'"):
        LabelledTokens.load(labelled, "llm")
    assert "no labels in" in str(failure("stats", tmp_path))


def test_a_question_that_does_not_fit_both_models_is_named_before_anything_is_written(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    asked = read_questions(write_questions(tmp_path / "q.jsonl", 2))
    asked.append(replace(asked[0], id="long", query=Query("How many? " * 30)))
    for name in ("near-small", "near-large"):
        tight = catalogue.with_models(catalogue[name].model_copy(update={"context_length": 300}))
        with pytest.raises(PromptTooLong, match=rf"question 'long': .* the context of {name} \(300\)"):
            label(asked, "near", tmp_path / name, catalogue=tight, settings=DIRECT, slots=3)
        assert not (tmp_path / name / "journal.jsonl").exists()


def test_a_response_that_the_small_model_cannot_read_names_its_question(
    catalogue: Catalogue, labelled: Path, tmp_path: Path
) -> None:
    folder = copied(labelled, tmp_path)
    for path in shard_paths(folder):
        path.unlink()
    tight = catalogue.with_models(catalogue["near-small"].model_copy(update={"context_length": 80}))
    asked = read_questions(write_questions(tmp_path / "q.jsonl", COUNT))
    with pytest.raises(PromptTooLong, match=r"question 'q\d': .* the context of near-small \(80\)"):
        label(asked, "near", folder, catalogue=tight, settings=DIRECT, slots=3)


def test_two_runs_do_not_write_into_one_folder(catalogue: Catalogue, labelled: Path) -> None:
    with FileLock(labelled / ".lock"), pytest.raises(InputError, match="another run is labelling"):
        verify(labelled, ["outcome"], catalogue=catalogue)


def test_labels_of_other_weights_are_refused(catalogue: Catalogue, labelled: Path, tmp_path: Path) -> None:
    other = catalogue["near-other"]
    swapped = catalogue.with_models(
        catalogue["near-small"].model_copy(update={"sources": other.sources}),
    )
    asked = read_questions(write_questions(tmp_path / "q.jsonl", 2))
    with pytest.raises(
        InputError, match=r"another small: near-small with sha256 \w{12}, now near-small with"
    ):
        label(asked, "near", labelled, catalogue=swapped, settings=DIRECT)


def test_a_pair_with_different_vocabularies_is_refused(
    pair_file: Path, catalogue: Catalogue, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in (pair_file.parent / "small").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    text = (folder / "tokenizer.json").read_text()
    vocabulary = json.loads(text)
    words = vocabulary["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    small = catalogue["near-small"]
    changed = catalogue.with_models(
        small.model_copy(update={"sources": (small.sources[0].model_copy(update={"path": str(folder)}),)})
    )
    asked = read_questions(write_questions(tmp_path / "q.jsonl", 2))
    with pytest.raises(VocabularyMismatch):
        label(asked, "near", tmp_path / "labels", catalogue=changed, settings=DIRECT)


def copied(labelled: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in labelled.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_truncated_shard_and_broken_numbers_are_named(labelled: Path, tmp_path: Path) -> None:
    folder = copied(labelled, tmp_path)
    path = shard_paths(folder)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"features-00000\.safetensors is damaged"):
        LabelledTokens.load(folder)
    path.write_bytes(whole)
    tensors = load_file(path)
    tensors["hidden"][3, 1] = float("nan")
    save_file(tensors, path, {"questions": json.dumps(Shard.load(shard_paths(labelled)[0]).questions)})
    with pytest.raises(DataError, match="hidden has values that are not finite"):
        LabelledTokens.load(folder)
    path.unlink()
    with pytest.raises(DataError, match="holds no features"):
        LabelledTokens.load(folder)


def test_broken_files_of_a_folder_are_named(labelled: Path, tmp_path: Path) -> None:
    folder = copied(labelled, tmp_path)
    (folder / "labels.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(DataError, match=r"labels\.jsonl, line 1"):
        LabelledTokens.load(folder)
    (folder / "labels.jsonl").unlink()
    with pytest.raises(DataError, match="not labelled to the end"):
        LabelledTokens.load(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="manifest"):
        LabelledTokens.load(folder)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_a_text_may_hold_what_unicode_calls_a_line_break(labelled: Path, tmp_path: Path, mark: str) -> None:
    folder = copied(labelled, tmp_path)
    rows = [row | {"other_text": f"4{mark}5"} for row in read_rows(folder)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "labels.jsonl").write_text(text, encoding="utf-8")
    assert list(read_rows(folder)) == rows
    response = Response("q", f"How{mark}many?", "number", (1, 2), "stop")
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add(response)
    journal.close()
    assert Journal(tmp_path / "journal.jsonl").responses == {"q": response}


def test_a_folder_that_was_only_begun_is_named(labelled: Path, tmp_path: Path) -> None:
    folder = copied(labelled, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"verifiers": []}))
    for verifier in ("", "outcome"):
        with pytest.raises(DataError, match="is not labelled to the end; run `viaticum tokens label` again"):
            LabelledTokens.load(folder, verifier)
    with pytest.raises(DataError, match="is not labelled to the end"):
        statistics(folder)
