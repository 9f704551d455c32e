"""Steps that move hidden states between their home and the site that computes a unit.

On every tier a stage has one staging buffer for all parts, since their places in it depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.micro_batch import MicroBatch, Part
from flexgen_bench.schedule.scheduled_job import ScheduledJob, Unit
from flexgen_bench.schedule.steps import Step, StepKind


def working_buffers(unit: Unit, work: MicroBatch) -> tuple[Buffer, ...]:
    """What a compute step on a micro-batch's hidden states touches: the staging buffer for parts that live
    elsewhere, and the homes of the parts that live where the unit is computed."""
    site = unit.site.tier
    found = work.known.get(site)
    if found is None:
        parts = zip(work.hidden_parts, work.hidden_homes, strict=True)
        homes = tuple(home for part, home in parts if part.tier is site)
        elsewhere = len(homes) < len(work.hidden_parts)
        found = work.known[site] = (work.buffer(f"x.{site}"), *homes) if elsewhere else homes
    return found


def load_hidden(job: ScheduledJob, unit: Unit, work: MicroBatch) -> Iterator[Step]:
    """Bring every part of the hidden states to the site of the unit."""
    for part, path in _paths(unit, work):
        source = work.hidden_homes[part.index]
        for lower, upper in pairwise(path):
            target = work.buffer(f"x.{upper}")
            yield Step(
                _LINK[lower, upper],
                StepKind.LOAD_HIDDEN,
                unit.index,
                work,
                part.index,
                reads=(source,),
                writes=(target,),
                bytes=part.rows * job.hidden_row_bytes,
            )
            source = target


def store_hidden(job: ScheduledJob, unit: Unit, work: MicroBatch) -> Iterator[Step]:
    """Bring every part of the hidden states home from the site of the unit."""
    for part, path in _paths(unit, work):
        back = path[::-1]
        source = work.buffer(f"x.{unit.site.tier}")
        for upper, lower in pairwise(back):
            home = lower is part.tier
            target = work.hidden_homes[part.index] if home else work.buffer(f"x.{lower}")
            yield Step(
                _LINK[upper, lower],
                StepKind.STORE_HIDDEN,
                unit.index,
                work,
                part.index,
                reads=(source,),
                writes=(target,),
                bytes=part.rows * job.hidden_row_bytes,
            )
            source = target


_LINK = {
    (Tier.DISK, Tier.CPU): Lane.DISK_READ,
    (Tier.CPU, Tier.GPU): Lane.H2D,
    (Tier.GPU, Tier.CPU): Lane.D2H,
    (Tier.CPU, Tier.DISK): Lane.DISK_WRITE,
}


_ORDER = [Tier.DISK, Tier.CPU, Tier.GPU]


def _paths(unit: Unit, work: MicroBatch) -> Iterator[tuple[Part, list[Tier]]]:
    """Parts that live elsewhere, with the tiers between their home and the site, both included."""
    site = unit.site.tier
    for part in work.hidden_parts:
        if part.tier is not site:
            home, there = _ORDER.index(part.tier), _ORDER.index(site)
            way = _ORDER[min(home, there) : max(home, there) + 1]
            yield part, way if home < there else way[::-1]
