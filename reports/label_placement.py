"""Places for names beside points, such that none covers another, a point or an interval.

Pixels; y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

HEIGHT = 14.0
GAP = 9.0
FAR_STEP = 7.0  # between the places that are tried for a text with a line to its point


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
    """A text with its left end at x and its middle at y.

    leader: (x, y, x, y) of a line from the point to the text, where the text is not beside its point.
    """

    text: str
    x: float
    y: float
    leader: tuple[float, float, float, float] | None = None


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

    Returns a label for each text: beside its point, else as near as there is room, with a line to it; None
    where the drawing is full.
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

    def is_free(label: Label) -> bool:
        box = _box(label, length)
        inside = box.left >= 0 and box.right <= width and box.top >= 0 and box.bottom <= height
        return inside and not any(box.meets(other) for other in boxes)

    for left, middle in (*beside, *around):
        if is_free(label := Label(text, left, middle)):
            return label
    far = [
        _led(Label(text, left, middle), x, y, length)
        for left in np.arange(0.0, width - length + 1, FAR_STEP).tolist()
        for middle in np.arange(HEIGHT / 2, height - HEIGHT / 2 + 1, FAR_STEP).tolist()
    ]
    return min(filter(is_free, far), key=_leader_length, default=None)


def _led(label: Label, x: float, y: float, length: float) -> Label:
    """The label with a line from the point at (x, y) to the nearest place of its box."""
    box = _box(label, length)
    to = (min(max(x, box.left), box.right), min(max(y, box.top), box.bottom))
    return replace(label, leader=(x, y, *to))


def _leader_length(label: Label) -> float:
    assert label.leader is not None
    x, y, to_x, to_y = label.leader
    return math.hypot(to_x - x, to_y - y)


def _box(label: Label, length: float) -> Box:
    return Box(label.x, label.y - HEIGHT / 2, label.x + length, label.y + HEIGHT / 2)
