"""The memory of a job's KV cache: KV slots on every tier, and staging buffers, allocated from its plan."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.arenas import Arenas
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.schedule.scheduled_job import Unit

Home = tuple[int, int, int]  # KV slot, span of the KV slot, layer unit


class KVRooms:
    """memory: where caches in memory lie; stacks: of all layers of a span on a tier whose caches are alike (L, bytes),
    and their units in this order, by KV slot, span, tier and ring. offset: where caches on disk lie in the spill file,
    of which they take ``spilled`` bytes; tails: their unfinished segments.

    prompts (by tier), prompts_host, slots, host_slots: staging buffers.
    """

    def __init__(self, plan: MemoryPlan, arenas: Arenas) -> None:
        self.memory: dict[Home, Tensor] = {}
        self.stacks: dict[tuple[int, int, Tier, int | None], tuple[Tensor, list[int]]] = {}
        self.offset: dict[Home, int] = {}
        self.tails: dict[Home, Tensor] = {}
        self.spilled = 0
        if plan.job.keep_kv:
            self._make_homes(plan, arenas)
        sizes, compute = plan.staging, plan.job.compute_tier

        def make(tier: Tier, name: str, size: int) -> list[Tensor]:
            return [arenas.allocate(tier, name, size) for _ in range(sizes.num_buffers if size else 0)]

        self.prompts = {site.tier: make(site.tier, "kv prompts", size) for site, size in sizes.prompt.items()}
        self.prompts_host = make(Tier.CPU, "kv prompts from accelerator", sizes.prompt_host)
        self.slots = make(compute, "kv slots", sizes.kv_buffer)
        self.host_slots = make(Tier.CPU, "kv host slots", sizes.kv_host)

    def _make_homes(self, plan: MemoryPlan, arenas: Arenas) -> None:
        for kv_slot, sizes in zip(plan.groups.kv_slots, plan.kv_slots, strict=True):
            for number, span in enumerate(kv_slot.kv):
                for ring, layers in plan.job.rings.items():
                    size = sizes.kv[ring][number]
                    if span.tier is Tier.DISK:
                        self._on_disk(arenas, kv_slot.index, number, layers, size, sizes.tails[ring][number])
                    else:
                        self._in_memory(arenas, kv_slot.index, number, span.tier, ring, layers, size)

    def _on_disk(self, arenas: Arenas, kv_slot: int, number: int, layers: Sequence[Unit], size: int, tail: int) -> None:
        arenas.note(Tier.DISK, "kv_cache", size * len(layers))
        tails = arenas.allocate(Tier.CPU, "kv tails", tail * len(layers))
        for place, unit in enumerate(layers):
            self.offset[kv_slot, number, unit.index] = self.spilled
            self.spilled += size
            self.tails[kv_slot, number, unit.index] = tails[place * tail :][:tail]

    def _in_memory(
        self, arenas: Arenas, kv_slot: int, number: int, span: Tier, ring: int | None, layers: Sequence[Unit], size: int
    ) -> None:
        # Layers computed on the cpu keep their cache there.
        tiers = [Tier.CPU if span is Tier.CPU else unit.site.tier for unit in layers]
        for tier in set(tiers):
            mine = [u for u, t in zip(layers, tiers, strict=True) if t is tier]
            arena = arenas.allocate(tier, "kv_cache", size * len(mine))
            stack = arena[: size * len(mine)].view(len(mine), size)
            self.stacks[kv_slot, number, tier, ring] = (stack, [u.index for u in mine])
            for place, unit in enumerate(mine):
                self.memory[kv_slot, number, unit.index] = arena[place * size :][:size]
