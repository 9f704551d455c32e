"""From a checkpoint folder to a running engine: shape, packed store, policy, device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from flexgen_bench.checkpoints.source import open_source
from flexgen_bench.core.compression import EXACT, Compression, Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.folders import make_writable
from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.pipeline import Stage
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.slices import Slice
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import Engine
from flexgen_bench.engine.store_plan import store_plan
from flexgen_bench.engine.wire import Wire
from flexgen_bench.memory.weight_store import WeightStore, is_complete, open_or_convert
from flexgen_bench.models.family import ModelFamily
from flexgen_bench.models.model import Model
from flexgen_bench.models.packing import PackedModel
from flexgen_bench.planner.choose import choose
from flexgen_bench.planner.search_space import SearchSpace
from flexgen_bench.schedule.sequence_groups import Request, worst_of

KEPT = 0.98  # of what is free


@dataclass(frozen=True)
class PackedWeights:
    """A model whose weights are packed and ready to be placed by any policy.

    note: how the checkpoint's weights were read, in words; empty if as they are. part: the slice of a rank, where
    several share every layer; ``shape`` is that of the whole model.
    """

    family: ModelFamily
    shape: ModelShape
    dtype: DType
    packed: PackedModel
    store: WeightStore
    note: str = ""
    part: Slice | None = None

    @staticmethod
    def from_checkpoint(
        folder: Path,
        dtype: DType,
        cache: Path,
        progress: Callable[[int, int], None] = lambda done, total: None,
        compression: Compression | None = None,
        part: Slice | None = None,
    ) -> PackedWeights:
        """Open the packed store of a checkpoint, converting it first if need be.

        compression: of the weight matrices, quantized from the checkpoint's own dtype. progress gets (bytes done, bytes
        in all). part: the slice of a rank; it has a store of its own. Raises UserError or StoreError for what is wrong
        with the checkpoint.
        """
        with open_source(folder) as source:
            model = _model(source.shape, dtype, compression, part)
            plan = store_plan(source.family, model.shape, model.packed, dtype, model.part)
            store = open_or_convert(source.checkpoint, plan, _stores(cache), progress)
        return PackedWeights(source.family, source.shape, dtype, model.packed, store, source.note, model.part)

    @staticmethod
    def is_packed(
        folder: Path, dtype: DType, cache: Path, compression: Compression | None = None, part: Slice | None = None
    ) -> bool:
        """Whether ``from_checkpoint`` would have nothing to convert."""
        with open_source(folder) as source:
            model = _model(source.shape, dtype, compression, part)
            plan = store_plan(source.family, model.shape, model.packed, dtype, model.part)
            return is_complete(source.checkpoint, plan, _stores(cache))

    def choose_policy(
        self,
        device: Device,
        offload_dir: Path,
        requests: Sequence[Request],
        block_size: int | None = None,
        lossy: Lossy = EXACT,
        scored_rows: int = 0,
        max_latency_s: float | None = None,
        stages: Sequence[Stage] = (),
    ) -> Policy:
        """A policy for these requests on this device, which changes no more of the results than ``lossy`` says. Where
        the device's rates are known it is searched for, in another process. A little is kept back: the engine looks at
        what is free again. Raises DoesNotFit.

        stages: of several ranks, each with a device like this one; block_size is then that of all their waves together.
        It is looked for with the layers of the largest stage, and a wave of every rank under way.
        """
        free = device.available(make_writable(offload_dir, "offload_dir"))
        worst = worst_of(requests)
        # The search places the experts of a mixture apart, and ranks that share layers keep them together.
        is_searched = self.part is None or self.model.experts_for_one <= 1
        hardware = device.hardware if is_searched else replace(device.hardware, rates=None)
        job = Job(
            *(self.shape, self.dtype, hardware, worst.prompt_len, worst.gen_len, len(requests)),
            lossy=lossy,
            max_latency_s=max_latency_s,
            part=self.part,
        )
        available = {tier: int(count * KEPT) for tier, count in free.items()}
        ranks = max(1, len(stages))
        layers = max((len(stage.layers) for stage in stages), default=None)
        block = None if block_size is None else ceil(block_size / ranks)
        return choose(SearchSpace(job, (lossy,), available, block, scored_rows, ranks, layers))

    def engine(
        self, policy: Policy, device: Device, offload_dir: Path, stage: Stage | None = None, wire: Wire | None = None
    ) -> Engine:
        """Weights placed by ``policy`` on ``device``; of one of several ranks, those of its stage. UserError if the
        policy wants them compressed in another way."""
        if policy.lossy.weights != self.packed.compression:
            raise UserError(
                "policy.lossy.weights",
                _words(policy.lossy.weights),
                f"{_words(self.packed.compression)}: that is how these weights are packed",
                "Change the policy, or pack the weights again with this compression.",
            )
        return Engine(self.family, self.model, self.store, policy, device, offload_dir, stage, wire)

    @property
    def model(self) -> Model:
        """As this rank computes it."""
        if self.part is None:
            return Model(self.shape, self.dtype, self.packed)
        return _model(self.shape, self.dtype, self.packed.compression, self.part)


def _stores(cache: Path) -> Path:
    return cache / "packed"


def _words(compression: Compression | None) -> str:
    if compression is None:
        return "uncompressed"
    ways = [str(way) for way in (compression.along, compression.scales)]
    return f"{compression.bits} bits in groups of {compression.group_size} along {', '.join(ways)}"


def _model(shape: ModelShape, dtype: DType, compression: Compression | None, part: Slice | None) -> Model:
    model = Model.of(shape, dtype, compression)
    return model if part is None else model.sliced(part)
