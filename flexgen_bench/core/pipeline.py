"""A model over several ranks: which of them computes which layers.

A **rank** is a process with a device of its own; a **stage** is what it computes of the model: neighbouring layers, the
embedding before the first of them, the head behind the last. Hidden states go from each stage to the next one, tokens
from the last rank to all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_bench.core.errors import UserError


@dataclass(frozen=True)
class Stage:
    """What rank ``rank`` of ``ranks`` computes: the decoder layers ``first`` to ``stop`` - 1, counted from 0."""

    rank: int
    ranks: int
    first: int
    stop: int

    @property
    def is_first(self) -> bool:
        """Whether it embeds tokens."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether it makes logits."""
        return self.rank == self.ranks - 1

    @property
    def layers(self) -> range:
        return range(self.first, self.stop)

    def holds(self, unit: int, num_layers: int) -> bool:
        """Whether a unit of the sweep is part of it: 0 = embedding, 1..L = layers, L+1 = head."""
        if unit == 0:
            return self.is_first
        if unit == num_layers + 1:
            return self.is_last
        return self.first <= unit - 1 < self.stop


def divided(num_layers: int, ranks: int, layers: Sequence[int] | None = None) -> tuple[Stage, ...]:
    """Stages of as many layers as stated, else as even as can be. UserError if they are not all of the model's."""
    return even_stages(num_layers, ranks) if layers is None else stages_of(layers, num_layers)


def even_stages(num_layers: int, ranks: int) -> tuple[Stage, ...]:
    """As nearly the same number of layers for every rank as whole layers allow, the larger ones in the middle: the
    first rank has the embedding beside them, the last one the head."""
    if not 1 <= ranks <= num_layers:
        raise UserError("gpu.count", ranks, f"1 to {num_layers}, one layer for each rank at least", "Use fewer ranks.")
    size, more = divmod(num_layers, ranks)
    first_larger = (ranks - more) // 2
    return stages_of([size + (first_larger <= rank < first_larger + more) for rank in range(ranks)], num_layers)


def stages_of(layers: Sequence[int], num_layers: int) -> tuple[Stage, ...]:
    """Stages of so many layers each. UserError if they are not all of the model's, or one has none."""
    if any(count < 1 for count in layers) or sum(layers) != num_layers:
        raise UserError(
            "gpu.layers_per_rank",
            list(layers),
            f"one number for each rank, 1 or more, together the {num_layers} layers of the model",
            f"They are {sum(layers)} together.",
        )
    ends = [sum(layers[: rank + 1]) for rank in range(len(layers))]
    return tuple(Stage(rank, len(ends), stop - layers[rank], stop) for rank, stop in enumerate(ends))
