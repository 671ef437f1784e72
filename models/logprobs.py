"""Log-probabilities of a local model's tokens in the form of OpenAI's API.

An entry names its token as text and as bytes; the bytes of all entries make the text, up to a stop string
that it was cut at. Leaves out how they are computed (`viaticum.decoders.logits`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from viaticum.decoders import Result

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a token that is one byte, of a SentencePiece vocabulary
_SPACE = "\u2581"  # stands for a space in SentencePiece


def openai_logprobs(result: Result, tokenizer: Any) -> tuple[Mapping[str, Any], ...]:
    """The items of `logprobs.content`, one a token of the text; none if the request asked for none."""
    entries = list(result.logprobs)
    if not entries:
        return ()
    added = frozenset(tokenizer.added_tokens_decoder)  # built anew at each use, hundreds of tokens long
    bytes_of = cache(lambda token: token_bytes(tokenizer, token, added))
    written = [bytes_of(each.token) for each in entries]
    text = result.text.lstrip()  # space behind a thought is not shown
    while result.stop_string and written and _joined(written[:-1]).startswith(text):
        written.pop()  # of the stop string
    return tuple(
        {
            **_named(bytes_of(each.token), each.logprob),
            "top_logprobs": [_named(bytes_of(token), logprob) for token, logprob in each.top],
        }
        for each in entries[: len(written)]
    )


def _joined(written: Sequence[bytes]) -> str:
    return b"".join(written).decode(errors="replace").lstrip()


def _named(raw: bytes, logprob: float) -> dict[str, Any]:
    # A sampled token may be impossible before its bias: JSON has no infinity, and OpenAI writes -9999.
    return {
        "token": raw.decode(errors="replace"),
        "logprob": max(logprob, -9999.0),
        "bytes": list(raw),
    }


def token_bytes(tokenizer: Any, token: int, added: Collection[int]) -> bytes:
    """The bytes that a token adds to a text; those of a part of a character are not valid UTF-8.

    added: ids of the tokens that were added to the vocabulary, which stand in a text as they are.
    """
    piece: str | None = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return b""
    if token in added:
        return piece.encode()
    if match := _BYTE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    text: str = tokenizer.decode([token])
    if "\ufffd" in text and all(letter in _byte_letters() for letter in piece):
        return bytes(_byte_letters()[letter] for letter in piece)
    # A decoder may drop the space before a word that it takes for the first.
    return (piece.replace(_SPACE, " ") if piece.startswith(_SPACE) else text).encode()


@cache
def _byte_letters() -> dict[str, int]:
    """The alphabet of byte-level BPE: its letter for each byte (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}
