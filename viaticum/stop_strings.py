"""Stop strings in a growing text: nothing past the first one is shown. Standard library only."""

from __future__ import annotations


class StopStrings:
    """Holds back what could be the beginning of a stop string.

    Attributes:
        stopped: a stop string was found. It is cut with what follows, and further text is dropped.
    """

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self._stops = stops
        self._longest = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; returns what became safe to show."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        self.stopped = bool(found)
        safe = min(found) if found else max(0, len(text) - self._longest)
        self._held = "" if found else text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held
