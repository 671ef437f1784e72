"""Do two models share their tokens? A pair decodes one text, so token n must mean the same to both.

Special tokens (of a chat template, or that end a text) may differ, as they do between a base model and a
model tuned from it with another template: each model reads its own prompt, and the pair writes none that only
one of them knows. Reads small files only: no torch, no transformers. Leaves out padding: rows of logits may
differ where the tokens do not (`viaticum.decoders.vocabulary`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from viaticum.errors import VocabularyMismatch, WeightsError


class _Token(NamedTuple):
    text: str
    special: bool  # is no part of a text


def check_same_vocabulary(path_a: Path, path_b: Path) -> frozenset[int]:
    """Check that two folders hold tokenizers of one vocabulary.

    Returns:
        Ids of special tokens that only one of them has, or that are others in each; a pair does not write
        them.

    Raises:
        VocabularyMismatch: a token that can stand in a text differs; the message names the first one.
        WeightsError: a folder has no readable tokenizer.json.
    """
    text_a, text_b = _read(path_a), _read(path_b)
    if text_a == text_b:
        return frozenset()
    a, b = _tokens(text_a, path_a), _tokens(text_b, path_b)
    names = f"{path_a.name} and {path_b.name} cannot be a pair"
    unshared = {number for number in a.keys() & b.keys() if a[number].text != b[number].text}
    for number in sorted(unshared):
        if not (a[number].special and b[number].special):
            raise VocabularyMismatch(
                f"{names}: token {number} is {a[number].text!r} in one and {b[number].text!r} in the other"
            )
    alone = {number: (a | b)[number] for number in a.keys() ^ b.keys()}
    written = sorted(number for number, token in alone.items() if not token.special)
    if written and len(a) != len(b):
        raise VocabularyMismatch(
            f"{names}: their vocabularies have {len(a)} and {len(b)} tokens; the first that only one of them "
            f"has is {written[0]}, {alone[written[0]].text!r}"
        )
    if written:
        raise VocabularyMismatch(
            f"{names}: only one of them has a token {written[0]}, {alone[written[0]].text!r}"
        )
    return frozenset(unshared | alone.keys())


def logits_rows(folder: Path) -> int | None:
    """Rows of logits of the model in a folder by its config.json; None where that does not say."""
    config = _json(folder / "config.json")
    text = config.get("text_config") or {}
    rows = text.get("vocab_size") or config.get("vocab_size")
    return int(rows) if isinstance(rows, int) else None


def configured_stop_ids(folder: Path) -> frozenset[int]:
    """Token ids that end a text by the settings in a folder of weights."""
    for name in ("generation_config.json", "config.json"):
        configured = _json(folder / name).get("eos_token_id")
        if configured is not None:
            many = configured if isinstance(configured, list) else [configured]
            return frozenset(int(token) for token in many)
    return frozenset()


def _json(path: Path) -> dict[str, Any]:
    """An object of a file; empty where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(folder: Path) -> bytes:
    try:
        return (folder / "tokenizer.json").read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read {folder / 'tokenizer.json'}: {error.strerror}") from None


def _tokens(text: bytes, folder: Path) -> dict[int, _Token]:
    """Token by number; added tokens are written over those of the model, as the tokenizers library does."""
    try:
        document: dict[str, Any] = json.loads(text)
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram models list [token, score]
            tokens = {number: _Token(token, False) for number, (token, _) in enumerate(vocabulary)}
        else:
            tokens = {number: _Token(token, False) for token, number in vocabulary.items()}
        for added in document.get("added_tokens") or ():
            tokens[added["id"]] = _Token(added["content"], bool(added.get("special")))
        return tokens
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(
            f"{folder / 'tokenizer.json'} is not a tokenizer of the tokenizers library"
        ) from None
