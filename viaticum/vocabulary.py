"""Do two models share their tokens? A pair decodes one text, so token n must mean the same to both.

Reads tokenizer.json alone: no torch, no transformers. Leaves out the widths of the logits, which are
padded and may differ where the tokens do not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from viaticum.errors import VocabularyMismatch, WeightsError


def check_same_vocabulary(path_a: Path, path_b: Path) -> None:
    """Raise `VocabularyMismatch`, naming the first difference, unless both folders hold the same tokens.

    Raises `WeightsError` where a folder has no readable tokenizer.json.
    """
    text_a, text_b = _read(path_a), _read(path_b)
    if text_a == text_b:
        return
    a, b = _tokens(text_a, path_a), _tokens(text_b, path_b)
    names = f"{path_a.name} and {path_b.name} cannot be a pair"
    for number in sorted(a.keys() & b.keys()):
        if a[number] != b[number]:
            raise VocabularyMismatch(
                f"{names}: token {number} is {a[number]!r} in one and {b[number]!r} in the other"
            )
    if len(a) != len(b):
        raise VocabularyMismatch(f"{names}: their vocabularies have {len(a)} and {len(b)} tokens")
    if a.keys() != b.keys():
        first = min(a.keys() ^ b.keys())
        raise VocabularyMismatch(f"{names}: only one of them has a token {first}, {(a | b)[first]!r}")


def _read(folder: Path) -> bytes:
    try:
        return (folder / "tokenizer.json").read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read {folder / 'tokenizer.json'}: {error.strerror}") from None


def _tokens(text: bytes, folder: Path) -> dict[int, str]:
    """Token by number; added tokens are written over those of the model, as the tokenizers library does."""
    try:
        document: dict[str, Any] = json.loads(text)
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram models list [token, score]
            tokens = {number: token for number, (token, _) in enumerate(vocabulary)}
        else:
            tokens = {number: token for token, number in vocabulary.items()}
        return tokens | {added["id"]: added["content"] for added in document.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(
            f"{folder / 'tokenizer.json'} is not a tokenizer of the tokenizers library"
        ) from None
