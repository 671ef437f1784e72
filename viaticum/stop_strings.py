"""Stop strings in a growing text: nothing past the first one is shown. Standard library only.

`AnswerStream` looks for them in the text that follows a thought, for models of every kind.
"""

from __future__ import annotations

from viaticum.thinking import Piece, ThinkingSplitter


class StopStrings:
    """Holds back what could be the beginning of a stop string.

    Attributes:
        found: the stop string that was found, "" until then. It is cut with what follows, and further text is
            dropped.
    """

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self._stops = stops
        self._longest = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""
        self.found = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return bool(self.found)

    def push(self, text: str) -> str:
        """Add text; returns what became safe to show."""
        if self.stopped:
            return ""
        text = self._held + text
        safe, self.found = min(
            ((index, stop) for stop in self._stops if (index := text.find(stop)) >= 0),
            default=(max(0, len(text) - self._longest), ""),
        )
        self._held = "" if self.found else text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


class AnswerStream:
    """A growing text split from its thought, and cut at the first stop string after the thought.

    Args:
        splitter: knows the tags around the thought.
        stops: stop strings.
    """

    def __init__(self, splitter: ThinkingSplitter, stops: tuple[str, ...] = ()) -> None:
        self._splitter, self._stops = splitter, StopStrings(stops)
        self._shown: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._stops.stopped

    @property
    def stop_string(self) -> str:
        """The stop string that ended the text, "" for none."""
        return self._stops.found

    @property
    def text(self) -> str:
        """All text that was shown so far, without the thought."""
        return "".join(self._shown)

    @property
    def thinking(self) -> str:
        """All of the thought so far."""
        return self._splitter.thinking

    @property
    def inside_thought(self) -> bool:
        return self._splitter.inside

    def push(self, text: str) -> list[Piece]:
        """Add a piece; return what became safe to show."""
        return self._show(self._splitter.push(text))

    def follow_thought(self, text: str) -> list[Piece]:
        """Add a thought that comes by another way, such as a field of its own, before the text."""
        return self._splitter.follow_thought(text)

    def finish(self, *, ended: bool = True) -> list[Piece]:
        """What was held back for a tag or a stop string. ended: the model ended the text itself."""
        pieces = self._show(self._splitter.finish(ended=ended))
        rest = self._stops.finish()
        self._shown.append(rest)
        return [*pieces, rest] if rest else pieces

    def _show(self, pieces: list[Piece]) -> list[Piece]:
        shown: list[Piece] = []
        for piece in pieces:
            if not isinstance(piece, str):
                shown.append(piece)
            elif text := self._stops.push(piece):
                self._shown.append(text)
                shown.append(text)
        return shown
