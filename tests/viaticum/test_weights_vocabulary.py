"""Two tokenizers that agree, and each way they can differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from viaticum.errors import VocabularyMismatch, WeightsError
from viaticum.vocabulary import check_same_vocabulary


def tokenizer(folder: Path, vocab: Any, added: dict[str, int] | None = None, **more: object) -> Path:
    folder.mkdir()
    document = {
        "model": {"vocab": vocab},
        "added_tokens": [{"id": n, "content": t} for t, n in (added or {}).items()],
    }
    (folder / "tokenizer.json").write_text(json.dumps(document | more))
    return folder


def test_same_tokens_match_whatever_their_order(tmp_path: Path) -> None:
    a = tokenizer(tmp_path / "a", {"x": 0, "y": 1}, {"<end>": 2})
    b = tokenizer(tmp_path / "b", {"y": 1, "x": 0, "<end>": 2}, version="1.0")
    c = tokenizer(tmp_path / "c", [["x", -1.0], ["y", -2.0], ["<end>", 0.0]])
    check_same_vocabulary(a, a)
    check_same_vocabulary(a, b)
    check_same_vocabulary(a, c)


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ({"x": 0, "z": 1, "w": 2}, "a and b cannot be a pair: token 1 is 'y' in one and 'z' in the other"),
        ({"x": 0, "y": 1}, "their vocabularies have 3 and 2 tokens"),
        ({"x": 0, "y": 1, "<end>": 3}, "only one of them has a token 2, '<end>'"),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, vocab: dict[str, int], message: str) -> None:
    a = tokenizer(tmp_path / "a", {"x": 0, "y": 1}, {"<end>": 2})
    with pytest.raises(VocabularyMismatch) as caught:
        check_same_vocabulary(a, tokenizer(tmp_path / "b", vocab))
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"vocab": 3}}'])
def test_no_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    a = tokenizer(tmp_path / "a", {"x": 0})
    (tmp_path / "b").mkdir()
    with pytest.raises(WeightsError, match=r"cannot read .*b/tokenizer\.json: No such file"):
        check_same_vocabulary(a, tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").write_text(text)
    with pytest.raises(WeightsError, match="is not a tokenizer"):
        check_same_vocabulary(a, tmp_path / "b")
