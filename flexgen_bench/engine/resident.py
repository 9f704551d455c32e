"""LAYER steps: a decoding micro-batch whose cache lies where its layers are computed goes through a layer in one step.

What all layers of a pass have in common (places of the new token, what it attends to, masks, angles) is made with the
first of them, so that each takes little more than its operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexgen_bench.core.tiers import Lane
from flexgen_bench.engine.cache import KVCache
from flexgen_bench.engine.decode_graphs import DecodeGraphs
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.hidden import HiddenStates
from flexgen_bench.engine.layers import Layers
from flexgen_bench.engine.nan_checks import Health
from flexgen_bench.engine.resident_cache import Attend, ResidentCache, SinksOf
from flexgen_bench.engine.resident_native import processor_attention
from flexgen_bench.kernels.attention import decode_attention
from flexgen_bench.memory.kv_cache import KVForm
from flexgen_bench.models import parts
from flexgen_bench.schedule.micro_batch import MicroBatch
from flexgen_bench.schedule.scheduled_job import ScheduledJob, UnitKind
from flexgen_bench.schedule.steps import Step


@dataclass(frozen=True, slots=True)
class DecodePass:
    """A micro-batch on its way through the layers of one site. last: the unit of the last of them; cache: where what
    all of them have appended is judged in the end, if it was not before."""

    micro_batch: MicroBatch
    angles: Any
    attend: Attend
    last: int
    cache: ResidentCache | None


class ResidentLayers:
    """Carries out LAYER steps. angles_of: what a step's layer needs to know of the positions of its rows (N,
    hidden); leave: takes what a layer makes."""

    def __init__(
        self,
        job: ScheduledJob,
        layers: Layers,
        hidden: HiddenStates,
        cache: KVCache,
        form: KVForm,
        device: Device,
        health: Health,
        decoder_layers: Sequence[parts.Layer],
        value_share: float,
        angles_of: Callable[[Step, Tensor], Any],
        sinks_of: SinksOf,
        leave: Callable[[Step, Any], None],
        graphs: DecodeGraphs,
    ) -> None:
        self._graphs = graphs
        self._job, self._layers, self._hidden = job, layers, hidden
        self._cache, self._form, self._device, self._health = cache, form, device, health
        self._attentions = [layer.attention for layer in decoder_layers]
        self._value_share, self._angles_of, self._sinks_of = value_share, angles_of, sinks_of
        self._has_sinks = any(attention.sinks for attention in self._attentions)
        # A ring holds nothing that is outside of the window.
        units = [unit for unit in job.units if unit.kind is UnitKind.LAYER]
        self._mods = [
            a.mod if unit.ring is None else a.mod.unwindowed for a, unit in zip(self._attentions, units, strict=True)
        ]
        scales = {attention.scale for attention in self._attentions}
        # Of all layers, where scores are multiplied with the same and nothing else is done to them.
        self._scale = scales.pop() if len(scales) == 1 and all(mod.is_none for mod in self._mods) else None
        self._passes: dict[tuple[Lane, int], DecodePass] = {}  # by site and micro-batch
        self._last = {unit.site: unit.index for unit in units if not unit.elsewhere}  # layer of a site
        self._rings = {
            site: [ring for ring, alike in job.rings.items() if any(unit.site is site for unit in alike)]
            for site in self._last
        }
        self._leave = leave

    def begin_pass(self) -> None:
        """The micro-batches of the last pass are done with. Also at a job's end: what a pass calls refers back to this
        object, so the cache would linger until it is collected."""
        self._passes.clear()

    def run(self, step: Step) -> None:
        """LAYER. Whatever is called here is called for every layer and micro-batch: see benchmarks/host_cost.py."""
        if self._graphs.now and self._graphs.layer(step):
            return
        x = self._hidden.take(step)
        micro_batch = step.micro_batch
        now = self._passes.get((step.lane, micro_batch.index))
        if now is None or now.micro_batch is not micro_batch:
            now = self._passes[step.lane, micro_batch.index] = self._begin(step, micro_batch, x)
        layer = self._layers.decoding(step, x, now.angles)
        q, k, v = layer.project(x, now.angles)
        self._leave(step, layer.output(x, now.attend(step, q, k, v)))
        if step.unit == now.last and now.cache is not None:
            self._health.watch_cache(step, now.cache.new_sums(), now.cache.units)

    def _begin(self, step: Step, micro_batch: MicroBatch, x: Tensor) -> DecodePass:
        site = self._job.units[step.unit].site
        cache = ResidentCache.of(self._cache, micro_batch, site.tier, self._rings[site], x.device, self._has_sinks)
        attend: Attend | None = None
        launches = site.is_accelerator and self._device.launches_kernels
        if cache is not None and launches and self._value_share == 1 and self._scale is not None:
            attend = cache.attention(self._form, x, self._scale, self._sinks_of)
        if attend is None and cache is not None and self._form.compression is None:
            if x.device.type == "cpu" and self._value_share == 1:
                attend = processor_attention(cache, self._attentions, self._mods, x, self._sinks_of)
            attend = attend or self._attend_watched_later
        watched = cache if attend is not None else None
        attend = attend or self._attend_in_segments
        return DecodePass(micro_batch, self._angles_of(step, x), attend, self._last[site], watched)

    def _attend_in_segments(self, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Any form of cache on any device: its parts, and of each the prompt and what came after, one after the
        other."""
        self._health.watch(step, k, v)
        return self._attend_watched_later(step, q, k, v)

    def _attend_watched_later(self, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same, where new keys and values of all layers are judged at the end."""
        outs, attention = [], self._attentions[step.unit - 1]
        for part in step.micro_batch.kv_parts:
            rows, ring = slice(part.row, part.stop), self._cache.ring(step, part)
            new = (self._form.encode(k[rows]), self._form.encode(v[rows]))
            segments = self._cache.attend_in_memory(step, part, new)
            outs.append(
                decode_attention(
                    q[rows],
                    segments,
                    self._cache.padding(part, q.device, ring),
                    attention.scale,
                    self._value_share,
                    self._cache.live_slots(part),
                    self._mods[step.unit - 1],
                    self._sinks_of(step),
                    part.newest(ring) if self._value_share < 1 else None,
                )
            )
        return joined(outs)


def joined(outs: Sequence[Tensor]) -> Tensor:
    """Outputs of the parts of a micro-batch, one after the other."""
    return outs[0] if len(outs) == 1 else torch.cat(list(outs))
