"""Text that questions share is found and left out of embeddings; long texts are read in windows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_outcomes import PAIRS, Words, outcomes

from viaticum.routers.query.encoder import SHORT, WINDOWS, Encoder
from viaticum.routers.query.fit import fit
from viaticum.routers.query.outcome_matrix import OutcomeMatrix
from viaticum.routers.query.rtr import RTRRouter
from viaticum.routers.query.shared_text import KEPT, PREFIX, SharedText, find_shared
from viaticum.types import Pair

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = (
    "Answer the question as in these examples.\n"
    + "".join(f"Q: what is {n} plus {n}?\nA: we add, that makes {2 * n}.\n" for n in range(10))
    + "Now it is your turn.\nQ: "
)
OPTIONS = "\nOptions:\n(A) the sentence is plausible\n(B) the sentence is not plausible\nAnswer:"


def test_examples_and_options_are_found() -> None:
    questions = [f"who is the uncle of number {n}?" for n in range(40)]
    texts = [EXAMPLES + each for each in questions] + [f"{each} {OPTIONS}" for each in questions]
    shared = find_shared(texts)
    assert len(EXAMPLES) > PREFIX
    assert shared.prefixes[0] + "Q: " == EXAMPLES, (
        "up to a line: what questions of one kind share is no example"
    )
    read = shared.without(texts[0])
    assert read.endswith("Q: who is the uncle of number 0?")
    assert len(read) < KEPT + 40
    assert read.startswith("Answer the question as in these"), "the beginning tells the kind of question"
    assert shared.without(texts[-1]).endswith("number 39?")
    assert shared.without("another text altogether") == "another text altogether"
    assert SharedText.from_json(shared.to_json()) == shared
    assert SharedText.from_json(None) == SharedText()


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["one text"],
        [EXAMPLES] * 50,  # one text, many times
        [f"{n} {EXAMPLES} {n}" for n in range(50)],  # nothing begins or ends alike
        [f"What is {n} plus {n}?" for n in range(50)],  # a short template is part of the question
        # five of many
        [EXAMPLES + f"question {n}?" for n in range(5)] + [f"{n} is short" for n in range(200)],
    ],
    ids=["nothing", "one", "one many times", "unlike", "template", "few"],
)
def test_what_few_share_or_is_short_stays(texts: list[str]) -> None:
    shared = find_shared(texts)
    assert [shared.without(each) for each in texts] == texts or not shared.prefixes
    assert not shared.prefixes


def test_nothing_is_left_out_where_nothing_would_be_left() -> None:
    shared = SharedText((EXAMPLES,), (OPTIONS,))
    for text in (EXAMPLES, EXAMPLES + "why?", EXAMPLES + OPTIONS):
        assert shared.without(text) == text


def with_examples(count: int, seed: int, prefix: str) -> OutcomeMatrix:
    return OutcomeMatrix.from_outcomes(
        [replace(row, question=prefix + row.question) for row in outcomes(count, seed)]
    )


def test_a_router_reads_the_question_behind_its_examples(tmp_path: Path) -> None:
    """An encoder that adds up words sees hardly more than the examples; without them, as much as before."""
    words: object = Words()
    with_, without = with_examples(240, 0, EXAMPLES), with_examples(240, 0, "")
    router, plain = (fit(each, words) for each in (with_, without))  # type: ignore[arg-type]
    losses = [each.parameters.facts["unseen"]["log_loss"] for each in (router, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert router.parameters.facts["groups"] > 100, "examples make no near-duplicates"
    router.save(tmp_path)
    loaded = RTRRouter.load(tmp_path, words)  # type: ignore[arg-type]
    new = with_examples(30, 9, EXAMPLES)
    assert torch.allclose(
        loaded.predict_texts(new.texts).accuracy, router.predict_texts(new.texts).accuracy, atol=2e-3
    )
    big = PAIRS.index(Pair("big", "cot"))
    assert float(router.predict_texts(new.texts).accuracy[:, big].std()) > 0.0
    assert float(router.predict_texts(new.texts).trust.mean()) > 0.7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer with random weights and 64 words, that reads 34 tokens with those around them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(59))]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=98,
    )
    BertModel(config).save_pretrained(folder / "bert")
    vocabulary = {word: number for number, word in enumerate(words)}
    BertTokenizerFast(vocab=vocabulary, model_max_length=98).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"), max_seq_length=98)
    pooling = Pooling(16)
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder / "model"))
    return folder / "model"


def some_words(count: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(f"w{n}" for n in rng.integers(0, 59, count))


def test_a_long_text_is_read_to_its_end(model: Path, tmp_path: Path) -> None:
    cut, windows = (Encoder(str(model), cache=tmp_path / "cache.db", windows=each) for each in (False, True))
    start, end, other = some_words(200, 1), some_words(100, 2), some_words(100, 3)
    texts = [f"{start} {end}", f"{start} {other}"]
    assert torch.equal(*cut(texts)), "cut, both are the same"
    one, two = windows(texts)
    assert not torch.allclose(one, two, atol=1e-4)
    assert one.norm() == pytest.approx(1.0, abs=1e-5)
    short = ["w1 w2 w3", some_words(60, 4)]
    assert len(short[1]) > SHORT
    assert torch.allclose(cut(short), windows(short), atol=1e-6), "what fits is read as it was"
    assert torch.equal(windows(texts[::-1]), torch.stack((two, one))), "from the cache too"


def test_windows_cover_a_text_and_are_few(model: Path) -> None:
    encoder = Encoder(str(model), cache=None, windows=True)
    for count in (96, 97, 150, 300, 5_000):
        text = some_words(count, count)
        windows = encoder._split(text)
        assert len(windows) <= WINDOWS
        assert text.startswith(windows[0][0])
        assert text.endswith(windows[-1][0])
        assert all(len(window.split()) <= 96 for window, _ in windows)
        if count <= 300:
            covered = np.zeros(len(text), dtype=bool)
            for window, _ in windows:
                at = text.index(window)
                covered[at : at + len(window)] = True
            assert covered.mean() > 0.99
    assert len(encoder._split(some_words(96, 1))) == 1
