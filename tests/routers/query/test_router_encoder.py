"""The encoder and its cache, with a real, tiny sentence-transformers model."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import torch

from viaticum.errors import InputError, WeightsError
from viaticum.routers.query.encoder import Encoder

WORDS = ["how", "many", "apples", "are", "left", "who", "is", "her", "uncle"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An encoder that counts nine words."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    SentenceTransformer(modules=[BoW(WORDS)], device="cpu").save(str(tmp_path / "model"))
    return tmp_path / "model"


def test_embeddings_have_length_one_and_keep_the_order(model: Path, tmp_path: Path) -> None:
    encoder = Encoder(str(model), cache=tmp_path / "cache.db")
    texts = ["how many apples are left", "who is her uncle", "how many", "who is her uncle"]
    embeddings = encoder(texts)
    assert embeddings.shape == (4, len(WORDS))
    assert embeddings.norm(dim=1) == pytest.approx(torch.ones(4))
    assert torch.equal(embeddings[1], embeddings[3])
    assert float(embeddings[0] @ embeddings[1]) == 0
    assert float(embeddings[0] @ embeddings[2]) > 0.5
    assert torch.allclose(encoder(texts[::-1]), embeddings.flip(0))


def test_cached_embeddings_are_not_computed_again(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.db"
    first = Encoder(str(model), cache=cache)(["how many apples", "who is"])
    reports: list[tuple[int, int]] = []
    second = Encoder(str(model), cache=cache)
    embeddings = second(["who is", "how many apples"], lambda done, of: reports.append((done, of)))
    assert torch.equal(embeddings, first.flip(0))
    assert second._model is None, "the model was not needed"
    assert reports == []
    second(["who is", "her uncle"], lambda done, of: reports.append((done, of)))
    assert reports == [(2, 2)]
    assert sqlite3.connect(cache).execute("select count(*) from embeddings").fetchone() == (3,)
    without = Encoder(str(model), cache=None)
    assert torch.allclose(without(["who is"]), first[1:])


def test_two_models_do_not_share_embeddings(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model.rename(other)
    Encoder(str(other), cache=tmp_path / "cache.db")(["who is"])
    with pytest.raises(InputError, match="cannot load the encoder"):
        Encoder(str(model), cache=tmp_path / "cache.db")(["who is"])


def test_a_file_that_is_not_a_cache_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "cache.db").write_bytes(b"not a database at all, but long enough to be looked at" * 30)
    with pytest.raises(InputError, match="no cache of embeddings"):
        Encoder(str(model), cache=tmp_path / "cache.db")(["who is"])


def test_missing_weights_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="pull"):
        Encoder()


def test_a_cache_that_cannot_be_written_is_left_out(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a disk that is read-only, or full."""
    (tmp_path / "file").write_text("no folder")
    encoder = Encoder(str(model), cache=tmp_path / "file" / "cache.db")
    assert torch.equal(
        encoder(["who is", "how many"]), Encoder(str(model), cache=None)(["who is", "how many"])
    )
    encoder(["her uncle"])
    assert len([each for each in caplog.messages if "embeddings are not kept" in each]) == 1


def test_a_cache_without_room_is_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache.db"
    Encoder(str(model), cache=cache)(["who is"])
    opened = Encoder._open

    def read_only(self: Encoder, path: Path) -> sqlite3.Connection:
        connection: sqlite3.Connection = opened(self, path)
        connection.execute("pragma query_only = on")
        return connection

    monkeypatch.setattr(Encoder, "_open", read_only)
    assert Encoder(str(model), cache=cache)(["who is", "how many"]).shape == (2, len(WORDS))
    assert "attempt to write a readonly database" in caplog.text


def test_no_texts_give_no_embeddings(model: Path) -> None:
    assert Encoder(str(model), cache=None)([]).shape == (0, len(WORDS))


def test_a_model_of_the_same_name_elsewhere_has_other_embeddings(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative name in another folder, and files that were replaced."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    cache = tmp_path / "cache.db"
    for number, words in enumerate((WORDS, WORDS[::-1], WORDS[:4])):
        folder = tmp_path / str(min(number, 1))
        folder.mkdir(exist_ok=True)
        SentenceTransformer(modules=[BoW(words)], device="cpu").save(str(folder / "mine"))
        monkeypatch.chdir(folder)
        found = Encoder("mine", cache=cache)(["how many apples"])
        assert torch.equal(found, Encoder("mine", cache=None)(["how many apples"]))
