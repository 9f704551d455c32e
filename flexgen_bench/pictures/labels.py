"""Where the labels of points go: beside their point, where they cover neither points nor each other, or nowhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

LETTER = 0.56  # how wide a letter is, of the size of its text
AWAY = 4.0  # points between a label and the place it names


@dataclass(frozen=True)
class Box:
    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.top <= other.bottom or other.top <= self.bottom)

    def inside(self, other: Box) -> bool:
        return self.left >= other.left and self.right <= other.right and self.bottom >= other.bottom


@dataclass(frozen=True)
class Label:
    """Text whose left lower corner is at ``x``, ``y``."""

    text: str
    x: float
    y: float


def placed(named: Sequence[tuple[str, float, float]], size: float, within: Box) -> list[Label]:
    """Labels of (text, x, y), in the unit of ``size``, the height of the text. One without room is left out."""
    taken = [Box(x - AWAY / 2, y - AWAY / 2, x + AWAY / 2, y + AWAY / 2) for _, x, y in named]
    labels = []
    for text, x, y in named:
        width = LETTER * size * len(text)
        for box in _places(x, y, width, size):
            if box.inside(within) and not _covers(box, taken):
                labels.append(Label(text, box.left, box.bottom))
                taken.append(box)
                break
    return labels


def _covers(box: Box, taken: Iterable[Box]) -> bool:
    return any(box.meets(other) for other in taken)


def _places(x: float, y: float, width: float, height: float) -> Iterator[Box]:
    """Right and left, then above and below on both sides."""
    for rise in (-height / 2, AWAY, -AWAY - height):
        yield Box(x + AWAY, y + rise, x + AWAY + width, y + rise + height)
        yield Box(x - AWAY - width, y + rise, x - AWAY, y + rise + height)
