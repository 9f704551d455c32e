"""The one place that engines come from: of one device, or of several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.policy import Policy
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import Engine
from flexgen_bench.ranks.ranked_engine import RankedEngine, refused
from flexgen_bench.ranks.ranks import Ranks
from flexgen_bench.schedule.sequence_groups import Request

AnyEngine = Engine | RankedEngine


class Engines:
    """Engines of a model, one after the other. ranks: None where one device computes all of it."""

    def __init__(self, weights: PackedWeights, device: Device, offload_dir: Path, ranks: Ranks | None = None) -> None:
        self._weights, self._device, self._offload_dir, self._ranks = weights, device, offload_dir, ranks
        if ranks is not None:
            self._device = ranks.own(device, offload_dir)
            ranks.pack(weights)

    @property
    def count(self) -> int:
        """Ranks."""
        return 1 if self._ranks is None else len(self._ranks.stages)

    def make(self, policy: Policy) -> AnyEngine:
        """Weights placed by ``policy``. Raises what an Engine raises."""
        if self._ranks is None:
            return self._weights.engine(policy, self._device, self._offload_dir)
        return RankedEngine(self._weights, policy, self._device, self._offload_dir, self._ranks)

    def one(self, engine: AnyEngine, what: str) -> Engine:
        """An engine that does ``what``; UserError for several ranks, which do not."""
        if isinstance(engine, RankedEngine):
            assert self._ranks is not None
            raise refused(what, self._ranks)
        return engine

    def check_one(self, what: str) -> None:
        """UserError for several ranks, which do not do ``what``."""
        if self._ranks is not None:
            raise refused(what, self._ranks)

    def choose_policy(
        self,
        requests: Sequence[Request],
        block_size: int | None = None,
        lossy: Lossy = EXACT,
        scored_rows: int = 0,
        max_latency_s: float | None = None,
    ) -> Policy:
        """A policy for these requests, on one device or on each rank of several (``PackedWeights.choose_policy``)."""
        of_ranks = () if self._ranks is None else self._ranks.stages
        return self._weights.choose_policy(
            *(self._device, self._offload_dir, requests, block_size, lossy, scored_rows, max_latency_s),
            stages=[stage for stage in of_ranks if stage is not None],
        )
