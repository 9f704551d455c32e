"""Steps that move hidden states between their home and the site that computes a unit.

On every site a micro-batch has one staging buffer for all parts, since their places in it depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from flexgen_bench.core.tiers import Lane, Site, Tier
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.micro_batch import MicroBatch, Part
from flexgen_bench.schedule.scheduled_job import ScheduledJob, Unit
from flexgen_bench.schedule.steps import Step, StepKind


def working_buffers(unit: Unit, micro_batch: MicroBatch) -> tuple[Buffer, ...]:
    """What a compute step on a micro-batch's hidden states touches: the staging buffer for parts that live
    elsewhere, and the homes of the parts that live where the unit is computed."""
    site = unit.site
    buffers = micro_batch.known.get(site)
    if buffers is None:
        parts = zip(micro_batch.hidden_parts, micro_batch.hidden_homes, strict=True)
        homes = tuple(home for part, home in parts if part.tier is site.tier)
        elsewhere = len(homes) < len(micro_batch.hidden_parts)
        buffers = micro_batch.known[site] = (micro_batch.buffer(f"x.{site.name}"), *homes) if elsewhere else homes
    return buffers


def load_hidden(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch) -> Iterator[Step]:
    """Bring every part of the hidden states to the site of the unit."""
    for part, path in _paths(job, unit, micro_batch):
        source = micro_batch.hidden_homes[part.index]
        for lower, upper in pairwise(path):
            target = micro_batch.buffer(f"x.{upper.name}")
            yield Step(
                link(lower, upper),
                StepKind.LOAD_HIDDEN,
                unit.index,
                micro_batch,
                part.index,
                reads=(source,),
                writes=(target,),
                bytes=part.rows * job.hidden_row_bytes,
            )
            source = target


def store_hidden(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch) -> Iterator[Step]:
    """Bring every part of the hidden states home from the site of the unit."""
    for part, path in _paths(job, unit, micro_batch):
        source = micro_batch.buffer(f"x.{unit.site.name}")
        for upper, lower in pairwise(path[::-1]):
            home = lower.tier is part.tier
            target = micro_batch.hidden_homes[part.index] if home else micro_batch.buffer(f"x.{lower.name}")
            yield Step(
                link(upper, lower),
                StepKind.STORE_HIDDEN,
                unit.index,
                micro_batch,
                part.index,
                reads=(source,),
                writes=(target,),
                bytes=part.rows * job.hidden_row_bytes,
            )
            source = target


def link(source: Site, target: Site) -> Lane:
    """The lane from one site to its neighbour, of what is no weight."""
    if source.is_accelerator:
        return source.d2h
    if target.is_accelerator:
        return target.h2d
    return source.disk_read if source.tier is Tier.DISK else source.disk_write


def _paths(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch) -> Iterator[tuple[Part, tuple[Site, ...]]]:
    """Parts that live elsewhere, with the sites between their home and that of the unit, both included."""
    site = unit.site
    for part in micro_batch.hidden_parts:
        if part.tier is not site.tier:
            home = job.site_of(part.tier)
            direct = part.tier is not Tier.DISK or not site.is_accelerator
            yield part, (home, site) if direct else (home, site.host, site)
