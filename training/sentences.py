"""Where sentences end, in text that may still be growing; and the sentence in which two texts part.

A sentence ends after . ! or ? before white space, after their CJK forms, and at the end of a line; not inside brackets,
in numbers (3.14, $1,000.50), after the number of a list item, after common abbreviations, nor after a line that
ends with a colon (R2R, arXiv 2505.21600, cuts by tokens; this cuts by characters). Knows no model and no tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OPEN, CLOSE, STOPS, WIDE_STOPS = "([{（【「", ")]}）】」", ".!?…", "。！？"
QUOTES = "\"'”’*_"  # may follow a full stop and belong to its sentence
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:e\.g|i\.e|etc|vs|cf|Mr|Mrs|Ms|Dr|approx|Fig|Eq)$")
_ITEM = re.compile(r"[\s>*#-]*\d{1,3}$")


def sentence_ends(text: str, *, complete: bool = True) -> list[int]:
    """The places just after each sentence, rising.

    complete: the text is all there is, so that its own end may end a sentence; else an end counts only once the
    character after it is known.
    """
    ends: list[int] = []
    depth = line = begin = 0
    for place, letter in enumerate(text):
        if letter in OPEN:
            depth += 1
        elif letter in CLOSE:
            depth = max(0, depth - 1)
        if letter == "\n":
            if not text[line:place].strip():
                depth = 0  # a bracket that nobody closed does not reach over an empty line
            said = text[begin:place].strip()
            if said and not depth and not said.endswith(":"):
                ends.append(place + 1)
                begin = place + 1
            line = place + 1
        elif letter in STOPS or letter in WIDE_STOPS:
            after = place + 1
            while after < len(text) and text[after] in QUOTES:
                after += 1
            follows = text[after : after + 1]
            over = follows.isspace() or letter in WIDE_STOPS if follows else complete
            if depth or not over or (letter == "." and _is_no_end(text[line:place])):
                continue
            ends.append(after)
            begin = after
    return ends


def _is_no_end(before: str) -> bool:
    """Whether a full stop after this, on its line, ends no sentence: that of a list item or an abbreviation."""
    return bool(_ITEM.fullmatch(before) or _ABBREVIATION.search(before))


def has_ended(text: str, at: int, sentences: int = 2) -> bool:
    """Whether a growing text has reached so many sentence ends after the character `at`."""
    begin = _begin(text, at)
    return sum(begin + end > at for end in sentence_ends(text[begin:], complete=False)) >= sentences


@dataclass(frozen=True, slots=True)
class DivergenceSpan:
    """Two texts around the place where they part: what both say before, then what each says, to a sentence's end."""

    context: str
    original: str
    other: str


def part(original: str, other: str, at: int, lengths: tuple[int, int]) -> DivergenceSpan:
    """The sentences that hold a difference; both texts are the same before the character `at`.

    lengths: the characters of the token in which each differs. Where either one's sentence ends within that token, the
    difference sits on the end itself and the next sentence is shown too.
    """
    begin = _begin(original, at)
    ends = [_ends_after(text, begin, at) for text in (original, other)]
    on_end = any(found[0] <= at + length for found, length in zip(ends, lengths, strict=True))
    cut = [found[min(int(on_end), len(found) - 1)] for found in ends]
    return DivergenceSpan(original[:begin], original[begin : cut[0]], other[begin : cut[1]])


def _begin(text: str, at: int) -> int:
    """Where the sentence begins that the character `at` is in."""
    return max((end for end in sentence_ends(text[:at], complete=False) if end <= at), default=0)


def _ends_after(text: str, begin: int, at: int) -> list[int]:
    """Sentence ends after the character `at`; at least one, the text's own end."""
    found = [begin + end for end in sentence_ends(text[begin:]) if begin + end > at]
    return found or [len(text)]
