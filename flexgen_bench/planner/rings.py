"""Which layers keep a window's tokens alone, in a ring, and what that takes while prompts are computed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from flexgen_bench.models.model import Model
from flexgen_bench.models.parts import Attention, Decoder
from flexgen_bench.schedule.sequence_group import SequenceGroup
from flexgen_bench.schedule.sequence_groups import Request


def ring_windows(decoder: Decoder) -> set[int]:
    """Windows of layers whose caches may be rings. Not with ALiBi: distances of tokens are not to be seen in one."""
    mods = [layer.attention.mod for layer in decoder.kinds]
    return set() if any(mod.slopes for mod in mods) else {mod.window for mod in mods if mod.window is not None}


def cached_tokens(attention: Attention, group: SequenceGroup) -> int:
    """Tokens of its longest sequence that a layer attends to in decode."""
    tokens = max(group.prompt_lens) + group.gen_len
    window = attention.mod.window
    return min(tokens, window) if window is not None and window in group.rings else tokens


def gathered_tokens(attention: Attention, group: SequenceGroup, rows: int) -> int:
    """Of a prompt's chunk of so many rows: its own tokens and those of a ring before them, which attention sees in one
    piece."""
    window = attention.mod.window
    return rows + min(window, max(group.prompt_lens)) if window is not None and window in group.rings else 0


@dataclass(frozen=True)
class LayerKinds:
    """The layers of a model by what their caches keep in a job of like requests: the windows of those that are rings,
    None for those that keep every token."""

    rings: tuple[int | None, ...]

    @staticmethod
    def of(model: Model, request: Request) -> LayerKinds:
        windows: set[int] = set()
        if request.gen_len > 1:
            positions = request.prompt_len + request.gen_len - 1
            windows = {window for window in ring_windows(model.decoder) if window < positions}
        of_layers = (layer.attention.mod.window for layer in model.decoder.layers)
        return LayerKinds(tuple(window if window in windows else None for window in of_layers))

    @property
    def few(self) -> int:
        """The fewest of the first layers among which there is one of every kind."""
        return 1 + max(self.rings.index(ring) for ring in self._counts)

    def cached(self, positions: int) -> int:
        """Tokens of one sequence that all layers together keep."""
        return sum(count * (positions if ring is None else ring) for ring, count in self._counts.items())

    def times(self, number: int) -> float:
        """For how many layers the ``number``-th of the first ``few`` stands, with those of its kind among them."""
        ring = self.rings[number]
        return self._counts[ring] / self.rings[: self.few].count(ring)

    @cached_property
    def _counts(self) -> Counter[int | None]:
        return Counter(self.rings)
