"""Keys and values that outlive their sequence, so that one that begins with the same tokens does not compute them
again: the turns of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.cache import KVCache
from flexgen_bench.engine.generation import KeptTokens, Running
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.schedule.micro_batch import MicroBatch
from flexgen_bench.schedule.scheduled_job import UnitKind
from flexgen_bench.schedule.sequence_group import SequenceGroup


@dataclass
class KeptPrefixes:
    """Takes keys and values out of the cache when a sequence leaves that wants them kept, and puts them back when one
    starts that goes on from them. Between passes, when nobody else touches the cache."""

    cache: KVCache
    sequences: Mapping[int, Running]

    def begin(self, batches: Sequence[MicroBatch]) -> None:
        """Before a pass: what starting sequences have kept goes into their places."""
        for batch in batches:
            for member in batch.members:
                group = member.group
                if not member.token and group.kept and member.start == group.kept:
                    self._restore(group)

    def left(self, group: SequenceGroup, gone: Sequence[int]) -> None:
        """After a pass: sequences have left their group."""
        for number in gone:
            sequence = self.sequences.get(number)
            if sequence is not None and sequence.keep and sequence.new:
                sequence.kept = self._taken(group.whole, number, sequence)

    def _taken(self, group: SequenceGroup, number: int, sequence: Running) -> KeptTokens:
        """All that was fed: the last new token never was."""
        place, fed = group.sequences.index(number), len(sequence.new) - 1
        layers = tuple(
            tuple(t.clone() for t in region.fed(raw, place, len(sequence.prompt), fed))
            for region, raw in self.cache.homes(group)
        )
        tokens = (*sequence.prompt, *sequence.new[:fed])
        # What has been overwritten in a ring is wanted again by all but the last of these, and what follows on them.
        complete = all(stored[0].shape[2] == len(tokens) for stored in layers)
        return KeptTokens(tokens, layers, 0 if complete else len(tokens) - 1)

    def _restore(self, group: SequenceGroup) -> None:
        prefix = self.sequences[group.sequences[0]].prefix
        assert prefix is not None, "its request was made with it"
        for (region, raw), layer in zip(self.cache.homes(group), prefix.layers, strict=True):
            first = len(prefix.tokens) - layer[0].shape[2]
            region.put_kept(raw, 0, tuple(t[:, :, : group.kept - first] for t in layer), first)
        if torch.cuda.is_available():  # lanes have streams of their own
            torch.cuda.synchronize()


def can_keep(plan: MemoryPlan) -> bool:
    """Whether every cache of a plan lies in the memory of what computes with it."""
    layers = [unit.site.tier for unit in plan.job.units if unit.kind is UnitKind.LAYER]
    tiers = {span.tier for kv_slot in plan.groups.kv_slots for span in kv_slot.kv}
    return Tier.DISK not in tiers and not (Tier.CPU in tiers and any(tier is not Tier.CPU for tier in layers))
