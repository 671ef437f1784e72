"""Places for names beside points, such that none covers another, a point or an interval.

Pixels; y grows downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

HEIGHT = 14.0
GAP = 9.0


@dataclass(frozen=True, slots=True)
class Box:
    """An occupied rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def around(cls, x: float, y: float, width: float, height: float) -> Box:
        return cls(x - width / 2, y - height / 2, x + width / 2, y + height / 2)

    def meets(self, other: Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


@dataclass(frozen=True, slots=True)
class Label:
    """A text with its left end at x and its middle at y."""

    text: str
    x: float
    y: float


def along(corners: Sequence[tuple[float, float]], step: float = 4.0) -> list[Box]:
    """The boxes that a line through these corners occupies."""
    boxes = []
    for (x, y), (to_x, to_y) in pairwise(corners):
        count = max(1, int(max(abs(to_x - x), abs(to_y - y)) / step))
        for n in range(count + 1):
            boxes.append(Box.around(x + (to_x - x) * n / count, y + (to_y - y) * n / count, 3, 3))
    return boxes


def place_labels(
    wanted: Sequence[tuple[str, float, float]],
    taken: Sequence[Box],
    width: float,
    height: float,
    letter: float,
    longest: int = 30,
) -> list[Label | None]:
    """Place texts near their points, the first ones first.

    Args:
        wanted: (text, x, y) of each point.
        taken: boxes that no text may cover.
        width, height: of the drawing.
        letter: width of a letter.
        longest: letters of a text; a longer one is cut.

    Returns a label for each text; None where there is no room near its point.
    """
    boxes, found = list(taken), list[Label | None]()
    for text, x, y in wanted:
        text = text if len(text) <= longest else f"{text[: longest - 1]}…"
        found.append(_place(text, x, y, boxes, width, height, len(text) * letter))
        if (label := found[-1]) is not None:
            boxes.append(_box(label, len(text) * letter))
    return found


def _place(
    text: str, x: float, y: float, boxes: Sequence[Box], width: float, height: float, length: float
) -> Label | None:
    beside = [(x + GAP, y), (x - GAP - length, y)]
    around = [(x + side, y + step) for step in (-GAP - 5, GAP + 5) for side in (4, -length / 2, -length - 4)]
    far = [(x + side, y + step) for step in (-26, 26) for side in (4, -length / 2, -length - 4)]
    for left, middle in (*beside, *around, *far):
        label = Label(text, left, middle)
        box = _box(label, length)
        inside = box.left >= 0 and box.right <= width and box.top >= 0 and box.bottom <= height
        if inside and not any(box.meets(other) for other in boxes):
            return label
    return None


def _box(label: Label, length: float) -> Box:
    return Box(label.x, label.y - HEIGHT / 2, label.x + length, label.y + HEIGHT / 2)
