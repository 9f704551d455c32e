"""A model whose every layer is shared by several ranks (tensor parallelism): which slice of a layer a rank has.

A **slice** is an equal share of a layer's query heads, key/value heads and of the width of its MLPs: the rows of the
projections to them, and the columns of the two projections back (Shoeybi et al. 2019, Megatron-LM, section 3). What
these make is a part of a sum over all ranks. Embedding, norms, routers and head are on every rank, and so are hidden
states: all ranks run the same steps on the same sequences, and choose the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_bench.core.errors import UserError


@dataclass(frozen=True)
class Slice:
    """What rank ``rank`` of ``ranks`` has of every layer."""

    rank: int
    ranks: int

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise UserError("gpu.tensor_parallel", self.ranks, "1 or more ranks")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank = {self.rank}: must be one of {self.ranks}")

    @property
    def adds(self) -> bool:
        """Whether it is the one of all that adds what a sum has once: biases."""
        return self.rank == 0

    def of(self, count: int, what: str) -> range:
        """Its own of ``count`` neighbours, which all ranks have equally many of. UserError, which says ``what`` they
        are, if they cannot be divided so."""
        if count % self.ranks:
            raise UserError(
                "gpu.tensor_parallel",
                self.ranks,
                f"a divisor of the model's {count} {what}, which ranks divide among them",
                "Use fewer ranks, or ranks of a pipeline (gpu.count).",
            )
        own = count // self.ranks
        return range(self.rank * own, (self.rank + 1) * own)
