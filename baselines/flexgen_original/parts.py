"""What the original's steps consist of, and which of it can run beside the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto


class Runs(Enum):
    """Beside what a part of a step can run. Parts of one kind follow one another."""

    ON_MAIN = (
        auto()
    )  # on the one thread that also starts everything, or in the GPU's default stream, which it waits for
    LINK = auto()  # to the GPU
    KV_COPY = auto()  # caches to the GPU, at the pace of copies out of pageable memory
    DISK = auto()  # in the copy threads
    STORE = auto()  # caches from the GPU


@dataclass(frozen=True)
class Part:
    """Seconds of one kind of work. name: "lane: what", for reports."""

    name: str
    seconds: float
    runs: Runs


@dataclass
class Phase:
    """Seconds of a phase, and of each part that it consists of."""

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, parts: Iterable[Part], count: int = 1) -> None:
        """``count`` times: parts begin together, and everything waits for the slowest."""
        together: dict[Runs, float] = defaultdict(float)
        for part in parts:
            together[part.runs] += part.seconds
            self.parts[part.name] += count * part.seconds
        self.seconds += count * max(together.values(), default=0.0)

    def add_phase(self, other: Phase, count: float = 1) -> None:
        """``count`` times another phase."""
        self.seconds += count * other.seconds
        for name, seconds in other.parts.items():
            self.parts[name] += count * seconds
