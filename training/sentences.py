"""Sentence ends in text that may still be growing, and the sentences in which two texts diverge.

A sentence ends after . ! or ? before white space, after their CJK forms, and at the end of a line; but not
inside brackets, in numbers (3.14, $1,000.50), after the number of a list item, after common abbreviations, or
after a line that ends with a colon. R2R (arXiv 2505.21600) cuts by tokens; this cuts by characters. Leaves
out models and tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OPENING, CLOSING, STOPS, WIDE_STOPS = "([{（【「", ")]}）】」", ".!?…", "。！？"
QUOTES = "\"'”’*_"  # may follow a full stop and belong to its sentence
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:e\.g|i\.e|etc|vs|cf|Mr|Mrs|Ms|Dr|approx|Fig|Eq)$")
_ITEM = re.compile(r"[\s>*#-]*\d{1,3}$")


def sentence_ends(text: str, *, complete: bool = True) -> list[int]:
    """Return the index just after each sentence, ascending.

    Args:
        text: the text so far.
        complete: the text has ended, so that its end may end a sentence; else an end counts only once the
            character after it is known.
    """
    ends: list[int] = []
    depth = line_start = start = 0  # depth: of open brackets
    for index, character in enumerate(text):
        if character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth = max(0, depth - 1)
        if character == "\n":
            if not text[line_start:index].strip():
                depth = 0  # an unclosed bracket does not reach over an empty line
            sentence = text[start:index].strip()
            if sentence and not depth and not sentence.endswith(":"):
                ends.append(index + 1)
                start = index + 1
            line_start = index + 1
        elif character in STOPS or character in WIDE_STOPS:
            after = index + 1
            while after < len(text) and text[after] in QUOTES:
                after += 1
            following = text[after : after + 1]
            ended = following.isspace() or character in WIDE_STOPS if following else complete
            if depth or not ended or (character == "." and _is_no_end(text[line_start:index])):
                continue
            ends.append(after)
            start = after
    return ends


def _is_no_end(before: str) -> bool:
    """Whether a full stop after this part of a line belongs to a list item or an abbreviation."""
    return bool(_ITEM.fullmatch(before) or _ABBREVIATION.search(before))


def has_ended(text: str, at: int, sentences: int = 2) -> bool:
    """Return whether a growing text has so many sentence ends after the character index `at`."""
    start = _sentence_start(text, at)
    return sum(start + end > at for end in sentence_ends(text[start:], complete=False)) >= sentences


@dataclass(frozen=True, slots=True)
class DivergenceSpan:
    """Two texts around their divergence: the common text before, then each one's to a sentence's end."""

    context: str
    original: str
    other: str


def divergence_span(original: str, other: str, at: int, lengths: tuple[int, int]) -> DivergenceSpan:
    """Return the sentences in which two texts diverge.

    Args:
        original, other: the texts, equal before the character index `at`.
        at: where they diverge.
        lengths: characters of the first token of each that differs. Where a sentence ends within such a
            token, the difference is in the end itself and the next sentence is included.
    """
    start = _sentence_start(original, at)
    ends = [_ends_after(text, start, at) for text in (original, other)]
    on_end = any(after[0] <= at + length for after, length in zip(ends, lengths, strict=True))
    cuts = [after[min(int(on_end), len(after) - 1)] for after in ends]
    return DivergenceSpan(original[:start], original[start : cuts[0]], other[start : cuts[1]])


def _sentence_start(text: str, at: int) -> int:
    """The start of the sentence that holds the character index `at`."""
    return max((end for end in sentence_ends(text[:at], complete=False) if end <= at), default=0)


def _ends_after(text: str, start: int, at: int) -> list[int]:
    """Sentence ends after the character index `at`; at least one, the end of the text."""
    ends = [start + end for end in sentence_ends(text[start:]) if start + end > at]
    return ends or [len(text)]
