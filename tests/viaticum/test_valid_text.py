"""Halves of characters: joined where they belong together, replaced elsewhere."""

from __future__ import annotations

import random

import pytest

from viaticum.types import Completion, ThinkingDelta, Usage
from viaticum.valid_text import ValidPieces, valid_json, valid_text

HIGH, LOW, WHOLE, MARK = "\ud83d", "\ude00", "\U0001f600", "\ufffd"


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("", ""),
        ("plain", "plain"),
        (f"é{WHOLE}", f"é{WHOLE}"),
        (HIGH + LOW, WHOLE),
        (f"a{HIGH}b", f"a{MARK}b"),
        (LOW + HIGH, MARK + MARK),
        (HIGH + HIGH + LOW, MARK + WHOLE),
        ("\udc80", MARK),
    ],
)
def test_halves_are_joined_or_replaced(text: str, valid: str) -> None:
    assert valid_text(text) == valid
    assert valid_json({text: [text, 7, None, {"a": text}]}) == {valid: [valid, 7, None, {"a": valid}]}


def test_pieces_of_any_size_make_the_text_of_the_whole() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice([HIGH, LOW, WHOLE, "a", "é", "\x00"]) for _ in range(rng.randrange(8)))
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(4)))
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        stream = ValidPieces()
        made = [piece for part in parts for piece in stream.add(part)]
        *rest, done = stream.add(Completion(text, Usage(), "stop"))
        assert "".join(str(piece) for piece in [*made, *rest]) == valid_text(text)
        assert isinstance(done, Completion)
        assert done.text == valid_text(text)


def test_a_half_thought_ends_before_the_text() -> None:
    stream = ValidPieces()
    made = [*stream.add(ThinkingDelta(f"hm {HIGH}")), *stream.add(f"{LOW} yes")]
    assert made == [ThinkingDelta("hm "), ThinkingDelta(MARK), f"{MARK} yes"]


def test_a_completion_is_valid_in_all_its_parts() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": f'{{"a": "{HIGH}"}}'}}
    completion = Completion(
        HIGH, Usage(), "stop", tool_calls=(call,), logprobs=({"token": HIGH, "logprob": -1.0},), thinking=LOW
    )
    (done,) = ValidPieces().add(completion)
    assert isinstance(done, Completion)
    assert (done.text, done.thinking) == (MARK, MARK)
    assert done.tool_calls[0]["function"]["arguments"] == f'{{"a": "{MARK}"}}'
    assert done.logprobs == ({"token": MARK, "logprob": -1.0},)
