"""Which micro-batches of a job decode by graphs, and the pieces that their passes are recorded in.

A piece is what one step does: the embedding; the first layer with all that follow it; every layer whose weights are
brought or unpacked first, with those that follow it; the head; the choice of tokens. Steps of layers that were done
with an earlier one do nothing. So a pass of a micro-batch whose layers are all resident takes four launches, and one
more for each layer that is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.cache import KVCache, slots_of
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.graphs import Graphs
from flexgen_bench.engine.layers import Layers
from flexgen_bench.engine.prompts import Prompts
from flexgen_bench.engine.resident_cache import SinksOf
from flexgen_bench.engine.static_decode import StaticDecode, reach
from flexgen_bench.memory.kv_cache import KVForm
from flexgen_bench.models import parts
from flexgen_bench.planner.graph_memory import MAX_SHAPES
from flexgen_bench.schedule.micro_batch import MicroBatch
from flexgen_bench.schedule.scheduled_job import ScheduledJob, Unit, UnitKind
from flexgen_bench.schedule.steps import Step

# How often a shape must have come before its tensors are made: what changes in every pass (as where sequences start and
# end all the time) is not worth recording.
SEEN = 1
_REMEMBERED = 4096  # shapes that have come, at most


class DecodeGraphs:
    """graphs: of the job. now: the micro-batches of the present pass that have a shape, by their number in it."""

    def __init__(
        self,
        job: ScheduledJob,
        graphs: Graphs,
        layers: Layers,
        cache: KVCache,
        form: KVForm,
        prompts: Prompts,
        device: Device,
        decoder: parts.Decoder,
        value_share: float,
        sinks_of: SinksOf,
    ) -> None:
        attentions = [layer.attention for layer in decoder.layers]
        scales = {attention.scale for attention in attentions}
        # What is called in a mixture depends on what its router has chosen.
        plain = all(attention.mod.is_none for attention in attentions)
        plain = plain and not any(isinstance(layer.mlp, parts.Experts) for layer in decoder.kinds)
        self._scale = min(scales)  # one, or nothing is recorded
        self._job, self._graphs, self._layers, self._sinks_of = job, graphs, layers, sinks_of
        self._cache, self._form, self._prompts, self._device = cache, form, prompts, device
        self._seen: Counter[object] = Counter()
        self._shapes: dict[object, StaticDecode] = {}
        self.now: dict[int, tuple[MicroBatch, StaticDecode]] = {}
        if not (plain and len(scales) == 1 and value_share == 1 and form.compression is None):
            graphs.refuse("the cache is compressed, values are left out, or scores are changed before the softmax")

    def begin_pass(self) -> None:
        """All pieces of the last pass are issued."""
        for _, shape in self.now.values():
            shape.end_pass()
        self.now.clear()

    def clear(self) -> None:
        """The job is over, and nothing of it is running."""
        self.now.clear()
        self._shapes.clear()

    def begin(self, step: Step) -> StaticDecode | None:
        """EMBED: the shape that this micro-batch's pass is issued by; None: as it is."""
        micro_batch = step.micro_batch
        if not self._graphs.is_on or not self._is_resident(micro_batch):
            return None
        places = tuple((part.home, part.group.kv_slot, slots_of(part)) for part in micro_batch.kv_parts)
        layouts = tuple(part.group.layouts[part.home] for part in micro_batch.kv_parts)
        padded = tuple(self._cache.padding(p, self._device.torch_device) is None for p in micro_batch.kv_parts)
        # Tokens on their way to the host lie in a tensor of the shape until that staging buffer is used again.
        key = (micro_batch.buffer_index, micro_batch.samples_on_device, places, layouts, padded)
        self._seen[key] += 1
        if self._seen[key] <= SEEN:
            if len(self._seen) > _REMEMBERED:
                self._seen.clear()
            return None
        full_key = (key, tuple(map(reach, micro_batch.kv_parts)))
        shape = self._shapes.get(full_key)
        if shape is None:
            shape = self._shapes[full_key] = self._made(micro_batch)
        self.now[micro_batch.index] = (micro_batch, shape)
        to_device: Callable[[Tensor], Tensor] = self._device.to_compute
        shape.bind(micro_batch, self._prompts.positions(micro_batch), to_device)
        return shape

    def of(self, step: Step) -> StaticDecode | None:
        """The shape that ``begin`` gave the step's micro-batch for this pass."""
        micro_batch, shape = self.now.get(step.micro_batch_index, (None, None))
        return shape if micro_batch is step.micro_batch else None

    def layer(self, step: Step) -> bool:
        """LAYER: whether it is done, with those that follow it, or was with one before."""
        shape = self.of(step)
        if shape is None:
            return False
        first = self._job.units[step.unit]
        if not self._begins_piece(first):
            return True
        covered, following = [step], step.unit + 1
        while self._job.units[following].kind is UnitKind.LAYER and not self._begins_piece(self._job.units[following]):
            covered.append(step._replace(unit=following, weight_buffer=-1, dequantized_buffer=-1))
            following += 1
        is_last = self._job.units[following].kind is not UnitKind.LAYER

        if not all(self._layers.of(one).is_fixed for one in covered):  # told in the first pass, which is not recorded
            self._graphs.refuse("a layer's formula looks at values")

        def work() -> None:
            x = shape.kept("x")
            for one in covered:
                x = shape.layer(one.unit, self._layers.of(one), x, self._scale, self._sinks_of(one))
            shape.keep("x", x)
            if is_last:
                shape.keep("sums", shape.new_sums())

        shape.run(("layers", step.unit, step.weight_buffer, step.dequantized_buffer), work)
        return True

    def _begins_piece(self, unit: Unit) -> bool:
        """Whether a layer must wait for something that those before it need not: its weights."""
        return unit.index == 1 or unit.is_streamed or unit.unpack

    def _is_resident(self, micro_batch: MicroBatch) -> bool:
        if micro_batch.is_prefill or micro_batch.hidden_tier is not Tier.GPU:
            return False
        return all(p.tier is Tier.GPU and p.group.layouts[p.home].is_joined for p in micro_batch.kv_parts)

    def _made(self, micro_batch: MicroBatch) -> StaticDecode:
        if len(self._shapes) >= MAX_SHAPES:
            self._graphs.settle()
            used = [shape for _, shape in self.now.values()]
            oldest = next(key for key, shape in self._shapes.items() if shape not in used)
            del self._shapes[oldest]
        dtype: torch.dtype = self._form.dtype
        return StaticDecode(micro_batch, self._cache, self._graphs, self._device.torch_device, dtype)
