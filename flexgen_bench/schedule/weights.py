"""The endless stream of weight loads that runs ahead of the passes."""

from __future__ import annotations

from collections.abc import Iterator

from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.schedule.job import Job, Unit
from flexgen_bench.schedule.steps import Buffer, Step, StepKind


class WeightStream:
    """Emits load steps for streamed units, cyclically over the passes, ``weight_slots - 1`` units ahead.

    The n-th load of a job goes to slot ``n % weight_slots``. A load is emitted just before the steps of the unit
    that comes ``weight_slots - 1`` streamed units earlier: after everything that used the slot before, so the
    derived write-after-read dependency is the back-pressure. It does not stop at the end of a pass: while the
    head computes, the first layers of the next pass are already on their way.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._position = {unit.index: i for i, unit in enumerate(job.streamed)}
        self._loads = 0  # emitted so far, over all passes
        self._disk_loads = 0  # of these, the ones that came from disk

    def ahead_of(self, unit: Unit, pass_index: int, last_pass: bool) -> Iterator[Step]:
        """The loads to emit before ``unit`` is computed in this pass."""
        if unit.index not in self._position:
            return
        per_pass = len(self._job.streamed)
        wanted = self._number(unit, pass_index) + self._job.weight_slots
        if last_pass:
            wanted = min(wanted, (pass_index + 1) * per_pass)
        while self._loads < wanted:
            yield from self._load(self._job.streamed[self._loads % per_pass])

    def where(self, unit: Unit, pass_index: int) -> tuple[Buffer, int]:
        """The buffer with the unit's weights on the compute tier, and its staging slot (-1: in place)."""
        if unit.index not in self._position:
            return Buffer("resident", unit.index), -1
        slot = self._number(unit, pass_index) % self._job.weight_slots
        return Buffer("weights", slot), slot

    def _number(self, unit: Unit, pass_index: int) -> int:
        return pass_index * len(self._job.streamed) + self._position[unit.index]

    def _load(self, unit: Unit) -> Iterator[Step]:
        slot = self._loads % self._job.weight_slots
        self._loads += 1
        source = Buffer("resident", unit.index)
        if unit.tier is Tier.DISK and self._job.has_accelerator:
            host_slot = self._disk_loads % self._job.host_slots
            self._disk_loads += 1
            source = Buffer("host_weights", host_slot)
            yield Step(
                Lane.DISK_READ, StepKind.LOAD_WEIGHTS, unit.index,
                slot=host_slot, writes=(source,), bytes=unit.load_bytes,
            )  # fmt: skip
        yield Step(
            Lane.H2D if self._job.has_accelerator else Lane.DISK_READ,
            StepKind.LOAD_WEIGHTS, unit.index,
            slot=slot, reads=(source,), writes=(Buffer("weights", slot),), bytes=unit.load_bytes,
        )  # fmt: skip
