"""Where sentences end, and the sentences around a difference."""

from __future__ import annotations

import pytest

from viaticum.training.sentences import divergence_span, has_ended, sentence_ends


def sentences(text: str, *, complete: bool = True) -> list[str]:
    ends = sentence_ends(text, complete=complete)
    return [text[a:b].strip() for a, b in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?"]),
        (
            "It costs $1,000.50 in all. Pi is 3.14. Yes.",
            ["It costs $1,000.50 in all.", "Pi is 3.14.", "Yes."],
        ),
        ("That is 5. Then 6", ["That is 5."]),
        ("It holds (so he said. Twice) 3 cups. Next.", ["It holds (so he said. Twice) 3 cups.", "Next."]),
        ("x = f(a\n, b)\nThen", ["x = f(a\n, b)"]),
        ("An open ( bracket.\n\nNew. ", ["An open ( bracket.", "New."]),
        ("1. Add 2.\n2. Take 3.\n", ["1. Add 2.", "2. Take 3."]),
        ("The steps are:\nadd them\nDone", ["The steps are:\nadd them"]),
        ("Some fruit, e.g. pears, vs. nuts. Good.", ["Some fruit, e.g. pears, vs. nuts.", "Good."]),
        ('He said "go." She went.', ['He said "go."', "She went."]),
        ("三。四！", ["三。", "四！"]),
        ("One.\n\n\nTwo.\n", ["One.", "Two."]),
        ("", []),
    ],
)
def test_sentence_ends(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_a_growing_text_ends_a_sentence_once_the_next_character_is_there() -> None:
    assert sentences("That is 3.", complete=False) == []
    assert sentences("That is 3.1", complete=False) == []
    assert sentences("That is 3. ", complete=False) == ["That is 3."]


def test_two_ends_after_the_place_end_a_continuation() -> None:
    text = "First one. Now 4 + 5 = 9. Then 3.5 more. And"
    at = text.index("4")
    reached = [n for n in range(len(text)) if has_ended(text[:n], at)]
    assert reached[0] == text.index(" And") + 1
    assert not has_ended("First one. Second one. Third", 24)


def test_the_sentence_that_holds_a_difference_is_shown() -> None:
    original = "She has 9. She eats 3 of them. The rest is 6."
    other = "She has 9. She eats 4 of them. The rest is 5."
    found = divergence_span(original, other, original.index("3"), (1, 1))
    assert (found.context, found.original, found.other) == (
        "She has 9.",
        " She eats 3 of them.",
        " She eats 4 of them.",
    )


def test_a_difference_on_the_end_itself_shows_the_next_sentence_too() -> None:
    original = "She has 9. She eats 3."
    other = "She has 9 eggs. She eats 3."
    found = divergence_span(original, other, len("She has 9"), (1, 5))
    assert found.original == "She has 9. She eats 3."
    assert found.other == "She has 9 eggs. She eats 3."
    unfinished = divergence_span("It is 9", "It is so", 6, (1, 2))
    assert (unfinished.original, unfinished.other) == ("It is 9", "It is so")
