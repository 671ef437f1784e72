"""Text that many questions of a table share: examples before them, options after them.

An encoder reads the first few hundred tokens of a text, or a mean over all of it. Where every question comes
behind the same examples, its embedding is that of the examples. What a tenth of a table's questions begin or
end with is therefore found when a router is fitted, and left out of what the encoder reads, then and later.
The beginning of such a text stays, since it tells the kind of question. Prices and lengths are those of the
whole text. Leaves out documents that a few questions are about: these are part of the question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

SHARE = 0.1  # of all questions that begin, or end, with a text
FEWEST = 10  # questions that do
PREFIX, SUFFIX = 200, 60  # characters of a text that is long enough to be left out
KEPT = 80  # characters of a prefix that stay
REST = 10  # characters of a question that are left at least


@dataclass(frozen=True)
class SharedText:
    """What is left out, the longest first."""

    prefixes: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()

    def without(self, text: str) -> str:
        """The text as the encoder reads it."""
        prefix = next((each for each in self.prefixes if text.startswith(each)), "")
        suffix = next((each for each in self.suffixes if text.endswith(each)), "")
        if not prefix and not suffix:
            return text
        rest = text[len(prefix) : len(text) - len(suffix)]
        if len(rest.strip()) < REST:
            return text
        return (_head(prefix) + rest).strip()

    def to_json(self) -> dict[str, list[str]]:
        return {"prefixes": list(self.prefixes), "suffixes": list(self.suffixes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> SharedText:
        """None, in routers of earlier versions: nothing."""
        return cls() if data is None else cls(tuple(data["prefixes"]), tuple(data["suffixes"]))


def find_shared(texts: Sequence[str]) -> SharedText:
    """The beginnings and endings that many of these texts share; equal texts count once."""
    distinct = sorted(set(texts))
    suffixes = _common(sorted(text[::-1] for text in distinct), SUFFIX, ("\n", " .", " ?"))
    return SharedText(_common(distinct, PREFIX, ("\n", ". ", "? ")), tuple(each[::-1] for each in suffixes))


def without_shared(texts: Sequence[str]) -> list[str]:
    """These texts without what many of them share."""
    shared = find_shared(texts)
    return [shared.without(text) for text in texts]


def _common(texts: Sequence[str], least: int, ends: Sequence[str]) -> tuple[str, ...]:
    """Beginnings of at least so many characters, up to the end of a line or sentence, the longest first.

    Up to there, since questions of one kind go on alike, and their wording is no example.

    Args:
        texts: sorted, so that those with a common beginning are neighbours.
        ends: of lines and sentences; the last character of one is a blank, or in texts read backwards the
            first.
    """
    window = max(FEWEST, round(SHARE * len(texts)))
    found = set()
    for first, last in zip(texts, texts[window - 1 :], strict=False):
        common = commonprefix((first, last))  # noqa: RUF071  these are texts, not paths
        if len(common) >= least:
            stops = [at + len(end.rstrip(".?")) for end in ends if (at := common.rfind(end)) >= 0]
            found.add(common[: max(stops, default=0)])
    return tuple(sorted((each for each in found if len(each) >= least), key=lambda each: (-len(each), each)))


def _head(prefix: str) -> str:
    """The first words of a prefix."""
    if len(prefix) <= KEPT:
        return prefix
    words, blank, _ = prefix[:KEPT].rpartition(" ")
    return words + blank or prefix[:KEPT]
