"""Text from tokens: characters over token borders, stop strings, what is held back."""

from __future__ import annotations

import random

import pytest

from viaticum.decoders.text import INCOMPLETE, TextStream
from viaticum.thinking import ThinkingSplitter, format_named


class Bytes:
    """Token i is byte i."""

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


class Pieces:
    """Token i is the i-th string."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.pieces[token] for token in token_ids)


def run(
    tokenizer: Bytes | Pieces, tokens: list[int], stops: tuple[str, ...] = ()
) -> tuple[TextStream, list[str]]:
    stream = TextStream(tokenizer, stops)
    shown = []
    for token in tokens:
        shown.append(stream.push(token).text)
        if stream.stopped:
            break
    shown.append(stream.finish().text)
    assert "".join(shown) == stream.text
    return stream, shown


def test_characters_appear_whole() -> None:
    stream, shown = run(Bytes(), list("aé€😀b".encode()))
    assert stream.text == "aé€😀b"
    assert shown == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_incomplete_bytes_at_the_end_are_shown_by_finish() -> None:
    stream, shown = run(Bytes(), list("a😀".encode())[:-1])
    assert stream.text == "a" + INCOMPLETE
    assert shown[-1] == INCOMPLETE


def test_incomplete_bytes_at_the_end_with_stops() -> None:
    stream, shown = run(Bytes(), list("xyz😀".encode())[:-1], ("yzw",))
    assert stream.text == "xyz" + INCOMPLETE
    assert shown[-1] == "yz" + INCOMPLETE


def test_bytes_that_never_become_a_character_are_not_held_for_ever() -> None:
    stream = TextStream(Bytes())
    assert "".join(stream.push(0xFF).text for _ in range(20))
    stream.push(ord("a"))
    stream.finish()
    assert stream.text == INCOMPLETE * 20 + "a"


def test_stop_over_token_borders() -> None:
    stream, shown = run(Pieces("Hi", " \nS", "TO", "P and more"), [0, 1, 2, 3], ("\nSTOP",))
    assert stream.stopped
    assert stream.text == "Hi "
    assert "S" not in "".join(shown)


def test_held_back_text_is_released_when_it_is_no_stop() -> None:
    stream, shown = run(Pieces("one E", "N", "d"), [0, 1, 2], ("END",))
    assert not stream.stopped
    assert stream.text == "one ENd"
    assert shown[0] == "one"


def test_the_earliest_of_several_stops_wins() -> None:
    stream, _ = run(Pieces("ab|cd##ef"), [0], ("##", "|"))
    assert stream.text == "ab"


def test_stop_before_incomplete_bytes_at_the_end() -> None:
    stream, shown = run(Pieces("ab", "END" + INCOMPLETE), [0, 1], ("END",))
    assert stream.stopped
    assert shown == ["", "", "ab"]


@pytest.mark.parametrize("seed", range(20))
def test_random_text_equals_one_cut_of_the_whole(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(30):
        text = "".join(dice.choice("abé€😀") for _ in range(dice.randrange(1, 30)))
        stops = tuple(
            "".join(dice.choice("abé") for _ in range(dice.randrange(1, 4))) for _ in range(dice.randrange(3))
        )
        stream, _ = run(Bytes(), list(text.encode()), stops)
        ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
        first_end = min((end for end, _ in ends), default=0)
        # Bytes come one by one, so the stop string that is complete first ends the text.
        begin = min((at for end, at in ends if end == first_end), default=len(text))
        assert stream.text == text[:begin]
        assert stream.stopped == bool(ends)


def test_stop_strings_are_looked_for_in_the_text_alone() -> None:
    pieces = Pieces("<thi", "nk>a\n\nb", "</think>", "\n\nc", "\n", "\nd")
    stream = TextStream(pieces, ("\n\n",), ThinkingSplitter(format_named("think")))
    shown = [stream.push(token) for token in range(6)]
    assert (stream.thinking, stream.text, stream.stopped) == ("a\n\nb", "c", True)
    assert "".join(each.thinking for each in shown) == "a\n\nb"
    assert "".join(each.text for each in shown) == "c"


def test_a_thought_over_token_borders_and_incomplete_bytes() -> None:
    tokens = list("<think>é😀</think>€".encode())
    stream = TextStream(Bytes(), ("nothing",), ThinkingSplitter(format_named("think")))
    inside = [stream.inside_thought for token in tokens if stream.push(token) is not None]
    assert stream.finish().text == "€"
    assert (stream.thinking, stream.text) == ("é😀", "€")
    assert sum(inside) == len("é😀</think>".encode())
