"""R2R's router: it serves as trained, test questions decide nothing, and bad input is an error."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Letters, build, requests_of
from token_pairs import write_pair, write_questions
from typer.testing import CliRunner

from viaticum.catalogue import Catalogue
from viaticum.cli import app
from viaticum.decoders import MixedDecoder, Runner, TorchRunner
from viaticum.decoders.features import Features, read_features
from viaticum.errors import DataError, InputError, ModelError, PromptTooLong, UnknownName
from viaticum.models.base import Generation
from viaticum.models.local import LocalModels
from viaticum.questions import Question, read_questions
from viaticum.routers.token import Step, entropy
from viaticum.routers.token.base import argmax_token, second_choice, top_tokens
from viaticum.routers.token.drift import ShareController
from viaticum.routers.token.labels import DIVERGENT, IDENTICAL, NEUTRAL, UNKNOWN, LabelledTokens
from viaticum.routers.token.metrics import auc, measure, recall_at, share_for_recall
from viaticum.routers.token.neural import (
    DivergenceNetwork,
    Inputs,
    LearnedDivergenceRouter,
    Shape,
    TrainedRouter,
    parse_inputs,
    round_weights,
)
from viaticum.routers.token.train import TrainSettings, candidates, evaluate, score, split_questions, train
from viaticum.training.calibration import calibrate, calibrate_recall
from viaticum.training.token_labels import LabelSettings, label
from viaticum.types import Message, Query

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE, TOP = 12, 20
SMALL = Shape(SIZE, TOP, width=16, depth=1, rank=0, members=3)
QUICK = TrainSettings(epochs=6, batch=256, rate=1e-2)
MANIFEST = {
    "pair": "p",
    "small": {"name": "s", "sha256": "a" * 64},
    "large": {"name": "l", "sha256": "b" * 64},
    "settings": {"strategy": "cot"},
    "verifiers": ["outcome"],
    "vocabulary": 97,
}


def synthetic(questions: int = 40, tokens: int = 60, seed: int = 0) -> LabelledTokens:
    """High entropy where tokens differ; of these the third number of the hidden state tells which diverge."""
    generator = torch.Generator().manual_seed(seed)
    count = questions * tokens
    hidden = torch.randn(count, SIZE, generator=generator)
    differs = torch.rand(count, generator=generator) < 0.25
    entropy_of = torch.where(differs, 0.4, 0.1) + 0.08 * torch.randn(count, generator=generator)
    noise = 0.5 * torch.randn(count, generator=generator)
    divergent = differs & (hidden[:, 2] + noise > 0.3)
    labels = torch.where(divergent, DIVERGENT, torch.where(differs, NEUTRAL, IDENTICAL))
    return LabelledTokens(
        MANIFEST,
        tuple(f"q{number}" for number in range(questions)),
        owner=torch.arange(questions).repeat_interleave(tokens),
        place=torch.arange(tokens).repeat(questions),
        labels=labels,
        entropy=entropy_of.clamp(0, 1),
        top=torch.randn(count, TOP, generator=generator).sort(descending=True).values,
        hidden=hidden,
        token=torch.randint(30, (count,), generator=generator),
        second=torch.randint(30, (count,), generator=generator),
        token_ids=torch.arange(30),
        embeddings=torch.randn(30, SIZE, generator=generator),
    )


@pytest.fixture(scope="module")
def tokens() -> LabelledTokens:
    return synthetic()


@pytest.fixture(scope="module")
def trained(tokens: LabelledTokens) -> TrainedRouter:
    return train(tokens, SMALL, settings=QUICK, choose=False)


def inputs_at(small: Runner, seen: Features) -> Inputs:
    vectors = (small.embeddings[seen.tokens], small.embeddings[seen.second])
    return Inputs(seen.entropy, seen.top, seen.hidden, *vectors)


# --- serving ------------------------------------------------------------------------------------------------


def a_router(
    small: Runner, inputs: tuple[str, ...], drift: ShareController | None = None
) -> LearnedDivergenceRouter:
    """A random network, standardised on the model's features of random texts; its threshold is its median."""
    rng = random.Random(1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = DivergenceNetwork(Shape(32, TOP, inputs, width=16, depth=2, rank=8, members=3))
    text = [rng.randrange(97) for _ in range(300)]
    seen = read_features(TorchRunner(small.model), text[:5], text[5:])
    args = inputs_at(small, seen)
    network.fit_features(args)
    round_weights(network)
    network.eval()
    with torch.inference_mode():
        middle = float(torch.sigmoid(network.logits(args)).median())
    return LearnedDivergenceRouter(network, small.embeddings, middle, drift)


@pytest.mark.parametrize("inputs", ["all", "r2r", "entropy", "logits", "hidden", "embedding", "second"])
@pytest.mark.parametrize("slots", [1, 4])
def test_the_served_decision_is_the_routers(inputs: str, slots: int) -> None:
    """At every position an offline pass finds the served score and the model that decoded."""
    small, large = (TorchRunner(build(seed=seed), slots=slots) for seed in (0, 100))
    router = a_router(small, parse_inputs(inputs))
    assert router.needs_hidden == ("hidden" in parse_inputs(inputs))
    requests = requests_of(5, 5, max_new_tokens=20)
    results = MixedDecoder(large, small, tokenizer=Letters(), router=router).generate_all(requests)
    reader, made = TorchRunner(small.model), []
    for request, result in zip(requests, results, strict=True):
        trace = result.trace
        seen = read_features(reader, request.prompt, trace.tokens)
        odds = router.network.logits(inputs_at(small, seen))
        torch.testing.assert_close(torch.tensor(trace.scores), torch.sigmoid(odds), atol=1e-4, rtol=1e-3)
        probabilities = torch.sigmoid(odds).tolist()
        for position, (by, probability) in enumerate(zip(trace.made_by, probabilities, strict=True)):
            if abs(probability - router.threshold) > 1e-4:
                assert by == int(probability > router.threshold), f"token {position}"
            if by == 0:
                assert trace.tokens[position] == int(seen.tokens[position])
        made += trace.made_by
    assert 0.1 < sum(made) / len(made) < 0.9, "else the threshold tests nothing"


def test_with_drift_the_served_share_comes_to_its_target() -> None:
    small, large = (TorchRunner(build(seed=seed), slots=2) for seed in (0, 100))
    shares = []
    for target in (None, 0.2):
        controller = None if target is None else ShareController(target, gain=0.1)
        router = a_router(small, parse_inputs("r2r"), controller)
        results = MixedDecoder(
            large, small, tokenizer=Letters(), router=router, loop_guard=None
        ).generate_all(requests_of(5, 4, max_new_tokens=90))
        made = [by for result in results for by in result.trace.made_by[40:]]
        shares.append(sum(made) / len(made))
    assert shares[0] > 0.3
    assert shares[1] == pytest.approx(0.2, abs=0.06)


def test_a_row_is_judged_by_itself() -> None:
    small = TorchRunner(build(seed=0))
    router = a_router(small, parse_inputs("all"))
    logits, hidden = torch.randn(5, 97), torch.randn(5, 32)
    step = Step(logits, entropy(logits), list(range(5)), [0] * 5, logits.argmax(-1), hidden)
    together = router.score(step)
    for row in range(5):
        one = Step(
            *(each[row : row + 1] for each in (logits, step.entropy)),
            [row],
            [0],
            step.tokens[row : row + 1],
            hidden[row : row + 1],
        )
        torch.testing.assert_close(router.score(one), together[row : row + 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [2, 100])
@pytest.mark.parametrize("size", [97, 25_600, 30_011])
def test_the_largest_logits_of_a_large_vocabulary(size: int, count: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(5, size, generator=generator)
    logits[1, 256:384] += 20  # many in one block
    logits[2] = 0
    logits[3, -3:] += 20  # where a block may not be whole
    values, tokens = top_tokens(logits, count)
    assert torch.equal(values, logits.topk(min(count, size)).values)
    assert torch.equal(logits.gather(1, tokens), values)
    assert all(len(set(row)) == len(row) for row in tokens.tolist()), "no token twice"


@pytest.mark.parametrize("size", [97, 256, 25_600])
def test_the_likeliest_token_is_the_first_of_the_largest(size: int) -> None:
    logits = torch.randn(6, size, generator=torch.Generator().manual_seed(size)).round()  # many equals
    logits[1] = 0
    logits[2] = float("-inf")
    logits[2, 5] = logits[2, -1] = -3
    logits[3, 40] = float("nan")
    assert torch.equal(argmax_token(logits), logits.argmax(-1))
    assert argmax_token(logits[:, 1:]).tolist() == logits[:, 1:].argmax(-1).tolist(), (
        "rows that are not next to each other"
    )


def test_the_second_choice_is_the_most_likely_token_beside_the_one_at_hand() -> None:
    best = top_tokens(torch.tensor([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0], [2.0, 2.0, 0.0]]), 2)[1]
    assert second_choice(best, torch.tensor([1, 0, 0])).tolist() == [2, 1, 1]


def test_an_embedding_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match="embeddings of 12 numbers, and the model has 32"):
        LearnedDivergenceRouter(DivergenceNetwork(SMALL), TorchRunner(build(seed=0)).embeddings)


# --- training -----------------------------------------------------------------------------------------------


def test_it_learns_what_entropy_cannot_tell(tokens: LabelledTokens, trained: TrainedRouter) -> None:
    metrics = trained.metadata["metrics"]
    assert metrics["router"]["differing"]["auc"] > 0.72
    assert 0.4 < metrics["entropy"]["differing"]["auc"] < 0.6
    ours, theirs = (metrics[name]["all"]["recall_at_share"]["0.1"] for name in ("router", "entropy"))
    assert ours > theirs + 0.05
    low, high = metrics["router"]["all"]["auc_95"]
    assert low < metrics["router"]["all"]["auc"] < high


def test_inputs_that_know_nothing_learn_nothing(tokens: LabelledTokens) -> None:
    found = train(tokens, replace(SMALL, inputs=("logits",)), settings=QUICK, choose=False)
    assert found.metadata["metrics"]["router"]["differing"]["auc"] < 0.65


def test_a_seed_gives_the_same_router(tokens: LabelledTokens, trained: TrainedRouter) -> None:
    again = train(tokens, SMALL, settings=QUICK, choose=False)
    other = train(tokens, SMALL, settings=replace(QUICK, seed=1), choose=False)
    same = [
        [
            torch.equal(a, b)
            for a, b in zip(trained.network.parameters(), each.network.parameters(), strict=True)
        ]
        for each in (again, other)
    ]
    assert all(same[0])
    assert not all(same[1])
    assert again.metadata == trained.metadata
    assert other.metadata["split"]["test"] != trained.metadata["split"]["test"]


def test_questions_are_split_and_the_test_ones_are_kept_out() -> None:
    names = [f"q{number}" for number in range(50)]
    split = split_questions(names, 4)
    assert len(split.test) == 10
    assert len(split.folds) == 4
    assert sorted([*split.test, *split.train]) == sorted(names)
    assert split == split_questions(names[::-1], 4)
    fewer = split_questions(names, 4, most=12)
    assert fewer.test == split.test
    assert len(fewer.train) == 12
    assert set(fewer.train) < set(split.train)
    with pytest.raises(DataError, match="too few"):
        split_questions(names[:4], 5)


def test_labels_of_test_questions_decide_nothing() -> None:
    tokens = synthetic(20, 30)
    split = split_questions(tokens.questions, SMALL.members)
    test = torch.tensor([name in split.test for name in tokens.questions])[tokens.owner]
    lied = replace(tokens, labels=torch.where(test, DIVERGENT - tokens.labels, tokens.labels))
    ours, theirs = (train(each, SMALL, settings=replace(QUICK, epochs=2)) for each in (tokens, lied))
    assert ours.network.shape == theirs.network.shape
    assert all(
        torch.equal(a, b) for a, b in zip(ours.network.parameters(), theirs.network.parameters(), strict=True)
    )
    assert ours.threshold == theirs.threshold
    assert ours.metadata["metrics"] != theirs.metadata["metrics"]
    assert len(ours.metadata["tried"]) == 6


def test_a_weight_of_neutral_tokens_that_is_given_is_the_one_that_is_tried() -> None:
    def tried(settings: TrainSettings) -> set[float]:
        return {with_.neutral_weight for _, with_ in candidates(SMALL, settings)}

    assert tried(TrainSettings()) == {1.0, 5.0}
    assert tried(TrainSettings(neutral=3.0)) == {3.0}
    assert tried(TrainSettings(neutral=1.0)) == {1.0}
    assert TrainSettings().neutral_weight == 1.0
    with pytest.raises(InputError, match="neutral and rate above 0"):
        TrainSettings(neutral=0.0)


def test_the_first_threshold_keeps_the_recall(tokens: LabelledTokens, trained: TrainedRouter) -> None:
    unseen = tokens.of(trained.metadata["split"]["test"])
    over = score(trained.network, unseen) > trained.threshold
    found = float(over[unseen.labels == DIVERGENT].float().mean())
    assert found > 0.85, "0.95 was asked for, on other questions"
    assert float(over.float().mean()) == pytest.approx(trained.metadata["calibration"]["share"], abs=0.02)


def test_a_share_becomes_a_threshold(tokens: LabelledTokens, trained: TrainedRouter) -> None:
    scores = score(trained.network, tokens.of(trained.metadata["split"]["test"]))
    for share in (0.05, 0.3, 0.8):
        assert float((scores > trained.threshold_for(share)).float().mean()) == pytest.approx(share, abs=0.01)
    with pytest.raises(InputError, match="share"):
        trained.threshold_for(1.2)


def test_unknown_labels_are_left_out_and_one_kind_alone_is_refused(tokens: LabelledTokens) -> None:
    some = torch.arange(len(tokens)) % 3 == 0
    partly = replace(tokens, labels=torch.where(some & tokens.differing, UNKNOWN, tokens.labels))
    found = train(partly, SMALL, settings=QUICK, choose=False)
    split = found.metadata["split"]["train"]
    assert found.metadata["tokens"]["train"] == int((partly.of(split).labels != UNKNOWN).sum())
    neutral = replace(tokens, labels=tokens.labels.clamp_max(NEUTRAL))
    with pytest.raises(DataError, match=r"0 of .* labelled tokens diverge"):
        train(neutral, SMALL, settings=QUICK)


def test_evaluation_takes_questions_that_were_not_learned_from(
    tokens: LabelledTokens, trained: TrainedRouter
) -> None:
    report = evaluate({"full": trained, "entropy": trained}, tokens)  # a folder may have any name
    assert report["questions"] == len(trained.metadata["split"]["test"])
    assert report["routers"] == dict.fromkeys(("full", "entropy"), trained.metadata["metrics"]["router"])
    assert report["entropy"] == trained.metadata["metrics"]["entropy"]
    with pytest.raises(DataError, match="learned from every question"):
        evaluate({"full": trained}, tokens.of(trained.metadata["split"]["train"]))
    other = replace(tokens, manifest={**MANIFEST, "small": {"name": "t", "sha256": "c" * 64}})
    with pytest.raises(InputError, match="made for s with sha256 aaaaaaaaaaaa, and t has cccccccccccc"):
        evaluate({"full": trained}, other)


def test_a_router_keeps_whose_labels_it_learned_from(tokens: LabelledTokens) -> None:
    judged = replace(tokens, verifier="semantic")
    assert train(judged, SMALL, settings=QUICK, choose=False).metadata["verifier"] == "semantic"


def test_a_question_is_known_by_its_text(tokens: LabelledTokens, trained: TrainedRouter) -> None:
    """Not by its id alone, which is the number of a line where a file gives none."""

    def with_texts(questions: Sequence[str], texts: Sequence[str]) -> LabelledTokens:
        digests = dict(zip(questions, texts, strict=True))
        return replace(tokens, questions=tuple(questions), manifest={**MANIFEST, "digests": digests})

    names = tokens.questions
    texts = [f"text of {name}" for name in names]
    router = train(with_texts(names, texts), SMALL, settings=QUICK, choose=False)
    test = len(router.metadata["split"]["test"])

    def unseen(labels: LabelledTokens, by: TrainedRouter = router) -> int:
        return int(evaluate({"r": by}, labels)["questions"])

    assert unseen(with_texts(names, texts)) == test
    assert unseen(with_texts([f"other {name}" for name in names], texts)) == test, "the same texts"
    assert unseen(with_texts(names, [f"other {text}" for text in texts])) == len(names), "the same ids"
    assert unseen(tokens) == test, "labels without texts: by ids"
    assert unseen(with_texts(names, [f"other {text}" for text in texts]), trained) == test, "such a router"


def test_metrics_by_hand() -> None:
    scores = torch.tensor([0.9, 0.8, 0.8, 0.1, 0.5])
    positive = torch.tensor([True, True, False, False, False])
    assert auc(scores, positive) == pytest.approx((3 + 2.5) / 6)
    assert auc(scores, torch.zeros(5, dtype=torch.bool)) is None
    assert recall_at(scores, positive, 0.2) == pytest.approx(0.5)
    assert recall_at(scores, positive, 0.4) == pytest.approx(0.75)  # one of two equals
    assert recall_at(scores, positive, 1.0) == 1
    assert share_for_recall(scores, positive, 0.5) == pytest.approx(0.2)
    assert share_for_recall(torch.tensor([3.0, 2, 1]), torch.tensor([True, False, True]), 1.0) == 1
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(20, (300,), generator=generator).float()
    positive = torch.rand(300, generator=generator) < 0.3
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a in scores[positive].tolist()
        for b in scores[~positive].tolist()
    ]
    assert auc(scores, positive) == pytest.approx(sum(wins) / len(wins))
    nothing = synthetic(3, 10)
    assert measure(replace(nothing, labels=nothing.labels * 0), nothing.entropy)["all"]["auc"] is None


# --- on disk ------------------------------------------------------------------------------------------------


def test_a_router_comes_back_as_it_was(
    trained: TrainedRouter, tokens: LabelledTokens, tmp_path: Path
) -> None:
    trained.save(tmp_path / "r")
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["router.json", "router.safetensors"]
    back = TrainedRouter.load(tmp_path / "r")
    assert torch.equal(score(back.network, tokens), score(trained.network, tokens))
    assert back.threshold == trained.threshold
    assert back.metadata["split"] == trained.metadata["split"]


def test_the_default_router_is_small_and_the_papers_is_the_papers(tmp_path: Path) -> None:
    TrainedRouter(DivergenceNetwork(Shape(896)), {"threshold": 0.5}).save(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 20e6
    with torch.device("meta"):
        papers = DivergenceNetwork(Shape(1536, width=1024, depth=6, rank=0, members=1))
    assert sum(each.numel() for each in papers.parameters()) == pytest.approx(55e6, rel=0.05)


def test_damaged_routers_are_named(trained: TrainedRouter, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no token router in"):
        TrainedRouter.load(tmp_path)
    trained.save(tmp_path)
    weights, facts = tmp_path / "router.safetensors", tmp_path / "router.json"
    whole, metadata = weights.read_bytes(), facts.read_text()
    weights.write_bytes(whole[:-10])
    with pytest.raises(DataError, match="cut short"):
        TrainedRouter.load(tmp_path)
    tensors = load_file_of(whole, tmp_path)
    tensors["head.bias"][0] = float("nan")
    save_file(tensors, weights)
    import hashlib

    facts.write_text(
        json.dumps(json.loads(metadata) | {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()})
    )
    with pytest.raises(DataError, match="not finite"):
        TrainedRouter.load(tmp_path)
    unsigned = {name: each for name, each in json.loads(metadata).items() if name != "sha256"}
    for broken in (
        "{",
        "[]",
        json.dumps({"format": 9}),
        json.dumps({"format": 1, "shape": {}}),
        json.dumps(unsigned),
    ):
        facts.write_text(broken)
        with pytest.raises(DataError):
            TrainedRouter.load(tmp_path)


def load_file_of(content: bytes, folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "copy"
    path.write_bytes(content)
    return load_file(path)


@pytest.mark.parametrize(
    "values", [{"inputs": ("colour",)}, {"inputs": ()}, {"width": 0}, {"depth": -1}, {"dropout": 1.0}]
)
def test_shapes_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Shape(**{"hidden": 8, **values})


def test_inputs_by_name() -> None:
    assert parse_inputs("hidden+entropy") == ("entropy", "hidden")
    assert parse_inputs("r2r") == ("logits", "hidden", "embedding")
    with pytest.raises(InputError, match="unknown input 'hiden'"):
        parse_inputs("hiden")


# --- a pair of the catalogue --------------------------------------------------------------------------------

CHAT: list[Message] = [{"role": "user", "content": "How many eggs?"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair, questions, labels, and a router in `r` for the catalogue's pair `near-r2r`."""
    folder = tmp_path_factory.mktemp("home")
    file = write_pair(folder)
    asked = read_questions(write_questions(folder / "q.jsonl", 16))
    label(
        asked,
        "near",
        folder / "labels",
        catalogue=Catalogue.load(file),
        settings=LabelSettings("direct"),
        slots=6,
    )
    with file.open("a") as catalogue:
        for name, small in (("near-r2r", "near-small"), ("far-r2r", "near-other")):
            catalogue.write(
                f'\n[models.{name}]\ndescription = "both"\nkind = "pair"\nsmall = "{small}"\n'
                f'large = "near-large"\nrouter = "r2r"\nmode = "routed"\nrouter_path = "{folder / "r"}"\n'
            )
    trained = run(
        "train", folder / "labels", "--out", folder / "r", "--members", 3, "--width", 16, "--depth", 1
    )
    assert trained.exit_code == 0, trained.output
    assert "threshold" in trained.stdout
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["tokens", *map(str, arguments)])


def share_of(home: Path, **changes: object) -> float:
    catalogue = Catalogue.load(home / "catalogue.toml")
    spec = catalogue["near-r2r"].model_copy(update=changes)
    model = LocalModels(catalogue.with_models(spec), slots=4).model("near-r2r")
    chats: list[list[Message]] = [[{"role": "user", "content": f"How many {n}?"}] for n in range(6)]
    made = [
        by
        for _, completion in model.generate_all(chats, Generation(24))
        if completion.trace is not None
        for by in completion.trace.made_by
    ]
    return sum(made) / len(made)


def test_a_pair_of_the_catalogue_is_served_by_its_router(home: Path) -> None:
    router = TrainedRouter.load(home / "r")
    assert router.metadata["pair"] == "near"
    completion = (
        LocalModels(Catalogue.load(home / "catalogue.toml")).model("near-r2r").generate(CHAT, Generation(24))
    )
    assert completion.trace is not None
    assert completion.trace.scores
    for by, probability in zip(completion.trace.made_by, completion.trace.scores, strict=True):
        assert by == int(probability > router.threshold)


def test_threshold_share_and_drift_of_an_entry(home: Path) -> None:
    assert share_of(home, threshold=1.0) == 0
    assert share_of(home, threshold=0.0) > 0.95
    assert share_of(home, share=0.05) < share_of(home, share=0.9)
    assert 0 < share_of(home, share=0.4, drift=True) < 1


def test_a_router_of_other_weights_is_refused(home: Path) -> None:
    catalogue = Catalogue.load(home / "catalogue.toml")
    with pytest.raises(
        InputError, match=r"made for near-small with sha256 \w{12}, and near-other has \w{12}"
    ):
        LocalModels(catalogue).model("far-r2r").generate(CHAT, Generation(4))
    nowhere = catalogue["near-r2r"].model_copy(update={"router_path": str(home / "nowhere")})
    with pytest.raises(InputError, match="no token router in"):
        LocalModels(catalogue.with_models(nowhere)).model("near-r2r").generate(CHAT, Generation(4))
    packaged = catalogue["near-r2r"].model_copy(update={"router_path": None})
    with pytest.raises(InputError, match="no router is packaged"):
        LocalModels(catalogue.with_models(packaged)).model("near-r2r").generate(CHAT, Generation(4))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('router = "r-stitch"', "needs tau"),
        ('router = "r-stitch"\ntau = 0.1\nshare = 0.3', "r-stitch takes no share"),
        ('router = "r2r"\ntau = 0.1', "r2r takes no tau"),
        ('router = "r2r"\nshare = 0.1\nthreshold = 0.2', "not both"),
        ('router = "r2r"\nshare = 1.0', "less than 1"),
    ],
)
def test_entries_whose_fields_do_not_fit_the_router(
    home: Path, tmp_path: Path, lines: str, message: str
) -> None:
    text = (home / "catalogue.toml").read_text().partition("[models.near-r2r]")[0]
    (tmp_path / "c.toml").write_text(
        f'{text}\n[models.x]\ndescription = "x"\nkind = "pair"\n'
        f'small = "near-small"\nlarge = "near-large"\n{lines}\n'
    )
    with pytest.raises(InputError, match=message):
        Catalogue.load(tmp_path / "c.toml")


def test_commands_evaluate_and_calibrate(home: Path, tmp_path: Path) -> None:
    again = ["train", home / "labels", "--members", 2, "--questions", 10, "--inputs", "entropy", "--depth", 0]
    made = json.loads(run(*again, "--out", tmp_path / "e", "--json").stdout)
    assert made["bytes"] < 50_000
    evaluated = run("evaluate", tmp_path / "e", home / "labels", "--beside", home / "r", "--json")
    report = json.loads(evaluated.stdout)
    assert set(report["routers"]) == {str(tmp_path / "e"), str(home / "r")}
    assert "entropy" in report
    shown = run("evaluate", home / "r", home / "labels", "--beside", tmp_path / "e").stdout
    assert len(shown.splitlines()) >= 1 + 3 + 1, "a head, entropy, two routers, the counts"
    assert "differ" in shown
    shared = [home / "q.jsonl", "--catalogue", home / "catalogue.toml", "--slots", 6, "--json"]
    for share in (0.2,):
        found = json.loads(run("calibrate", tmp_path / "e", *shared, "--share", share).stdout)
        assert found["calibration"]["share"] == pytest.approx(share, abs=0.1)
        assert TrainedRouter.load(tmp_path / "e").threshold == found["threshold"]
    speed = found["calibration"]["tokens_per_second"]
    faster = json.loads(run("calibrate", tmp_path / "e", *shared, "--tokens-per-second", speed / 2).stdout)
    assert faster["calibration"]["wanted"] == pytest.approx(speed / 2)
    recall = json.loads(run("calibrate", home / "r", home / "labels", "--recall", 0.9, "--json").stdout)
    router, labels = TrainedRouter.load(home / "r"), LabelledTokens.load(home / "labels")
    unseen = labels.of(router.metadata["split"]["test"])
    over = score(router.network, unseen) > recall["threshold"]
    assert float(over[unseen.labels == DIVERGENT].float().mean()) >= 0.9
    assert float(over.float().mean()) == pytest.approx(recall["calibration"]["share"], abs=0.02)


def test_a_text_that_fails_ends_a_calibration_and_names_its_question(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out, it would move share and threshold."""
    catalogue = Catalogue.load(home / "catalogue.toml")
    (unknown,) = LocalModels(catalogue).model("near").tokenizer.encode("Z")
    load = LocalModels.runners

    def damaged(pool: LocalModels, name: str) -> list[Runner]:
        runners = load(pool, name)
        for runner in runners:
            with torch.no_grad():
                runner.model.get_input_embeddings().weight[unknown] = float("nan")
        return runners

    monkeypatch.setattr(LocalModels, "runners", damaged)
    asked = [Question("bad", Query("How many Z?"), None), *read_questions(home / "q.jsonl", limit=2)]
    before = (home / "r" / "router.json").read_bytes()
    with pytest.raises(ModelError, match=r"question 'bad': .*not finite"):
        calibrate(home / "r", asked, catalogue=catalogue, share=0.3, slots=3)
    assert (home / "r" / "router.json").read_bytes() == before


def test_calibration_names_a_question_that_does_not_fit_both_models(home: Path) -> None:
    catalogue = Catalogue.load(home / "catalogue.toml")
    asked = [*read_questions(home / "q.jsonl", limit=2), Question("long", Query("How many? " * 30), None)]
    small = catalogue["near-small"].model_copy(update={"context_length": 300})
    with pytest.raises(PromptTooLong, match=r"question 'long': .* the context of near-small \(300\)"):
        calibrate(home / "r", asked, catalogue=catalogue.with_models(small), share=0.3, slots=3)


def test_recall_is_counted_on_the_labels_that_were_learned_from(home: Path, tmp_path: Path) -> None:
    labels, router = tmp_path / "labels", tmp_path / "r"
    shutil.copytree(home / "labels", labels)
    shutil.copytree(home / "r", router)
    manifest = json.loads((labels / "manifest.json").read_text())
    (labels / "manifest.json").write_text(json.dumps(manifest | {"verifiers": ["semantic", "outcome"]}))
    assert TrainedRouter.load(router).metadata["verifier"] == "outcome"
    found = calibrate_recall(router, labels, 0.9)
    assert found.threshold == calibrate_recall(home / "r", home / "labels", 0.9).threshold
    report = json.loads(run("evaluate", router, labels, "--json").stdout)
    assert report["divergent"] > 0
    assert report["unknown"] == 0
    named = json.loads(run("evaluate", router, labels, "--verifier", "semantic", "--json").stdout)
    assert named["unknown"] == named["differing"]


def test_recall_is_counted_on_texts_that_were_not_learned_from(home: Path, tmp_path: Path) -> None:
    labels, router = tmp_path / "labels", tmp_path / "r"
    shutil.copytree(home / "labels", labels)
    shutil.copytree(home / "r", router)
    before = calibrate_recall(router, labels, 0.9).metadata["calibration"]["questions"]
    manifest = json.loads((labels / "manifest.json").read_text())
    others = {name: digest[::-1] for name, digest in manifest["digests"].items()}
    (labels / "manifest.json").write_text(json.dumps(manifest | {"digests": others}))
    assert calibrate_recall(router, labels, 0.9).metadata["calibration"]["questions"] > before


def failure(*arguments: object) -> str:
    shown = run(*arguments)
    assert isinstance(shown.exception, InputError), shown.output
    return str(shown.exception)


def test_calibration_refuses_what_cannot_be(home: Path, tmp_path: Path) -> None:
    shared = ["calibrate", home / "r", home / "q.jsonl", "--catalogue", home / "catalogue.toml", "--limit", 2]
    assert "give one of" in failure(*shared)
    assert "give one of" in failure(*shared, "--share", 0.2, "--recall", 0.9)
    assert "is no folder of them" in failure(*shared, "--recall", 0.9)
    assert "between 0 and 1" in failure(*shared, "--share", 1.5)
    assert "cannot be reached" in failure(*shared, "--tokens-per-second", 1e9)
    assert "above 0" in failure(*shared, "--tokens-per-second", -1)
    assert "above 0 and at most 1" in failure("calibrate", home / "r", home / "labels", "--recall", 1.5)
    assert "made for near-small" in failure(*shared, "--share", 0.2, "--pair", "far")
    assert "is a local model" in failure(*shared, "--share", 0.2, "--pair", "near-small")
    assert "no token router in" in failure("calibrate", tmp_path, *shared[2:], "--share", 0.2)
    (tmp_path / "none.jsonl").write_text("\n")
    assert "no questions" in failure("calibrate", home / "r", tmp_path / "none.jsonl", "--share", 0.2)
    assert isinstance(run(*shared, "--share", 0.2, "--strategy", "cott").exception, UnknownName)
