"""Seconds of one step: what it computes or moves, over what the machine sustains; and what the host takes to issue it.

The only place where steps meet rates. The simulator and the closed form both ask here.

A lane on the host does a step's work itself, after what every step takes (``SiteRates.step``). Work for a CUDA device
is issued: the host goes on to the next step while the device is still at an earlier one, so a lane is bound by
whichever of the two is slower.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.microscaling import Codes
from flexgen_bench.core.rates import Rates, SiteRates, number_format
from flexgen_bench.core.tiers import NETWORK, Lane, LaneKind, Tier
from flexgen_bench.planner.issued_operators import IssuedOperators
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.planner.recorded_passes import RecordedPasses
from flexgen_bench.schedule.attention import attend_flops
from flexgen_bench.schedule.micro_batch import MicroBatch, Part
from flexgen_bench.schedule.scheduled_job import Unit, UnitKind
from flexgen_bench.schedule.steps import Step, StepKind

_MATRIX = (StepKind.PROJECT, StepKind.OUTPUT, StepKind.MLP, StepKind.HEAD, StepKind.EMBED)
# To hidden states: both are read, and one is written.
_ADDS = (StepKind.ADD_EXPERTS, StepKind.ADD)
# Rates of products are listed by the width h of the layer that was measured (calibrate/matrix.py), whose matrices have
# 12 h^2 values. A layer of any family is looked up under the width that such a layer with as many weights has.
_CALIBRATED_MATRICES = 12
_EXPERT_MATRICES = 3  # of an expert: gate, up and down
# A message from one process of a host to another is copied into the kernel and out of it: each byte is read and written
# twice. So much of the rate of its memory is what nobody has stated otherwise.
_COPIES_OF_A_MESSAGE = 4


def rates_of(hardware: HardwareProfile) -> Rates:
    """The machine's rates. UserError for a machine about which too little is known to predict anything."""
    rates = hardware.rates
    tiers = (Tier.CPU,) if hardware.accelerator is Accelerator.NONE else (Tier.GPU, Tier.CPU)
    missing = [str(t) for t in tiers if rates is None or t not in rates.sites]
    needed = dict.fromkeys(lane.link for lane in hardware.lanes if lane.is_link)
    missing += [str(link) for link in needed if hardware.link_rate(link) is None]
    if rates is None or missing:
        raise UserError(
            "gpu",
            hardware.name,
            f"a machine whose rates are known (not known: {', '.join(missing)})",
            "Measure this one with python -m flexgen_bench calibrate, or state them in conf/gpu.",
        )
    return rates


def network_rate(hardware: HardwareProfile, kind: LaneKind) -> float:
    """Bytes/s between this rank and others: as stated or measured, else what another process of the same host is sent.
    For a machine whose other rates are known."""
    known = hardware.link_rate(Lane(kind))
    return known or rates_of(hardware).sites[Tier.CPU].memory / _COPIES_OF_A_MESSAGE


class StepTimes(NamedTuple):
    """Of one step. lane_s: its lane's own (of the device, if it has streams); issue_s: of the host, ahead of it; 0
    where the lane is a thread of the host."""

    lane_s: float
    issue_s: float


class StepCost:
    """Prices the steps of a planned job. Equal work costs the same, so what was priced once is looked up.

    sender: of a rank, the machine that hidden states come from; None: one like its own. A message is received while it
    is sent, so receiving it takes what it is slower at that.
    """

    def __init__(self, plan: MemoryPlan, sender: HardwareProfile | None = None) -> None:
        model, hardware = plan.model, plan.hardware
        self._shape, self._packed, self._dtype = model.shape, model.packed_for(plan.policy), model.dtype
        self._lossy, self._job = plan.policy.lossy, plan.job
        self._sites = rates_of(hardware).sites
        self._link_rates = {lane.kind: hardware.link_rate(lane) or math.inf for lane in hardware.lanes if lane.is_link}
        if self._job.stage is not None or self._job.slices > 1:
            self._link_rates |= _network_rates(hardware, sender or hardware)
        self._first = plan.job.first_layer
        is_cuda = hardware.accelerator is Accelerator.CUDA
        self._operators = IssuedOperators(plan) if is_cuda else None
        self._recorded = RecordedPasses(plan) if is_cuda and self._sites[Tier.GPU].launch else None
        self._known: dict[tuple[object, ...], StepTimes] = {}

    def seconds(self, step: Step) -> float:
        """How long the step keeps its lane busy if nothing else uses what it needs, and nothing was issued ahead."""
        return max(self.times(step))

    def times(self, step: Step) -> StepTimes:
        """The same, told apart."""
        micro_batch = step.micro_batch
        key = (
            step.kind,
            step.lane,
            step.bytes,
            step.flops,
            (step.unit, step.dequantized_buffer) if step.on_weights else _work_of(micro_batch),
            step.unit == self._first and micro_batch.sequences,
            _attended(step),
            self._launches(step),
        )
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._price(step)
        return known

    def _price(self, step: Step) -> StepTimes:
        lane = step.lane
        host_step_s = self._sites[Tier.CPU].step
        if lane.is_link:
            work_s = step.bytes / self._link_rates[lane.kind]
        else:
            tier = Tier.GPU if lane.of_accelerator else Tier.CPU
            site = self._sites[tier]
            host_step_s = site.step
            work_s = self._computed(step, site, tier)
        if self._operators is None or not lane.of_accelerator:
            return StepTimes(work_s + self._stands_for(step) * host_step_s, 0.0)
        site, launches = self._sites[Tier.GPU], self._launches(step)
        issue_s = site.operator * self._operators.of(step) if launches is None else site.launch * launches
        return StepTimes(work_s, host_step_s + issue_s)

    def _launches(self, step: Step) -> int | None:
        """Of a step that is replayed from a recording, where it is known what a launch takes; None: it is issued."""
        if self._recorded is None or not step.lane.of_accelerator:
            return None
        return self._recorded.launches(step)

    def _stands_for(self, step: Step) -> int:
        """A LAYER of a processor costs as many steps as it was when steps were measured: both products, and an
        attention to each part of the cache."""
        return 2 + len(step.micro_batch.kv_parts) if step.kind is StepKind.LAYER else 1

    def _computed(self, step: Step, site: SiteRates, tier: Tier) -> float:
        if step.kind is StepKind.LAYER:
            return self._layer(step, site, tier)
        if step.kind in _ADDS:
            return 3 * step.micro_batch.rows * self._job.hidden_row_bytes / site.memory
        if step.kind is StepKind.EXPERTS:
            return self._experts(self._job.units[step.unit], step.micro_batch.rows, site, tier)
        return self._work(step, site, tier)

    def _layer(self, step: Step, site: SiteRates, tier: Tier) -> float:
        """Both products and the attention to every part of the cache."""
        unit, micro_batch = self._job.units[step.unit], step.micro_batch
        before = self._product(step, site, tier, unit.flops_before * micro_batch.rows)
        products = before + self._output(step, site, tier)
        parts = micro_batch.kv_parts
        return products + sum(self._decode_attention(part, attend_flops(self._job, unit, part), site) for part in parts)

    def _work(self, step: Step, site: SiteRates, tier: Tier) -> float:
        if step.kind in _MATRIX:
            output = step.kind in (StepKind.OUTPUT, StepKind.MLP)
            return self._output(step, site, tier) if output else self._product(step, site, tier, step.flops)
        if step.kind is StepKind.ATTEND:
            return self._attention(step, site)
        if step.kind is StepKind.DEQUANTIZE:
            return self._packed.units[step.unit].plain_bytes / site.unpack
        return self._touched_bytes(step) / site.memory

    def _touched_bytes(self, step: Step) -> int:
        """Of a step that computes nothing, but reads or writes memory."""
        micro_batch, job = step.micro_batch, self._job
        if step.kind is StepKind.GATHER_ROWS:
            return micro_batch.rows * job.embed_row_bytes
        if step.kind is StepKind.SAMPLE:
            return len(micro_batch.logit_rows) * job.logits_row_bytes
        if step.kind in (StepKind.ENTER, StepKind.LEAVE):  # read and written
            return 2 * micro_batch.rows * job.hidden_row_bytes
        if step.kind is StepKind.APPEND_KV:
            part = micro_batch.kv_parts[step.part]
            return part.rows * part.layout().token_bytes
        raise AssertionError(f"a step of kind {step.kind} runs on no compute lane")

    def _product(self, step: Step, site: SiteRates, tier: Tier, flops: int) -> float:
        """A product with a unit's weights: as fast as arithmetic or as the weights can be read."""
        micro_batch = step.micro_batch
        unit = self._packed.units[step.unit]
        rows = len(micro_batch.logit_rows) if step.kind is StepKind.HEAD else micro_batch.rows
        if not flops or not rows:
            return 0.0
        # An accelerator's compressed weights are unpacked by a step of their own.
        compression = self._lossy.weights if tier is Tier.CPU and unit.plain_bytes else None
        count = _CALIBRATED_MATRICES if unit.kind is UnitKind.LAYER else 1
        of_experts = self._job.units[step.unit].experts * self._job.units[step.unit].expert_values
        width = math.sqrt((unit.num_values - of_experts) / count)
        # The head, and other matrices with a row for each token, are multiplied with what is there.
        activations = self._lossy.activations if unit.kind is UnitKind.LAYER else None
        number = number_format(self._dtype, compression, activations)
        arithmetic = flops / site.matrix_rate(number, rows, width)
        values = flops / (2 * rows)
        return max(arithmetic, values * self._value_bytes(compression) / site.memory)

    def _output(self, step: Step, site: SiteRates, tier: Tier) -> float:
        """A layer behind its attention: of a mixture, what every token meets, and then its experts. Of a layer that
        ranks share, up to the sum behind its attention, or from there."""
        unit, rows = self._job.units[step.unit], step.micro_batch.rows
        if unit.sums > 1 and step.kind is StepKind.OUTPUT:
            return self._product(step, site, tier, step.flops)
        before = unit.flops_output if step.kind is StepKind.MLP else 0
        dense = self._product(step, site, tier, (unit.flops_after - before - unit.expert_flops) * rows)
        return dense + self._experts(unit, rows, site, tier)

    def _experts(self, unit: Unit, rows: int, site: SiteRates, tier: Tier) -> float:
        """Products with the experts that so many tokens are expected to touch, each with its share of the tokens. Each
        is called by itself, with as many operators as a step has elsewhere."""
        if not unit.experts or not rows:
            return 0.0
        touched = unit.touched(rows)
        packed = self._packed.units[unit.index]
        lossy = self._lossy.weights if packed.plain_bytes and not unit.unpack else None
        codes = packed.packing or lossy
        number = number_format(self._dtype, codes if tier is Tier.CPU else None)
        width = math.sqrt(unit.expert_values / _EXPERT_MATRICES)
        arithmetic = unit.expert_flops * rows / site.matrix_rate(number, rows * unit.top_k / touched, width)
        values = touched * unit.expert_values
        reading = values * self._value_bytes(codes) / site.memory
        # An accelerator unpacks what is compressed a tile at a time, before it multiplies.
        unpacking = values * self._dtype.bytes / site.unpack if codes and tier is Tier.GPU else 0.0
        # On a device with streams the host has that to issue (issued_operators.py).
        calls = 0.0 if tier is Tier.GPU and self._operators is not None else touched * site.step
        return max(arithmetic, reading) + unpacking + calls

    def _value_bytes(self, codes: Codes | None) -> float:
        if codes is None:
            return self._dtype.bytes
        return codes.row_bytes(codes.group_size) / codes.group_size

    def _attention(self, step: Step, site: SiteRates) -> float:
        micro_batch = step.micro_batch
        if micro_batch.is_prefill:
            return step.flops / site.prefill_attention_rate(_longest(micro_batch))
        return self._decode_attention(micro_batch.kv_parts[step.part], step.flops, site)

    def _decode_attention(self, part: Part, flops: int, site: SiteRates) -> float:
        tokens = flops / self._job.attention_flops_per_pair
        lossy = self._lossy
        # All of K, and the wanted share of V.
        read = tokens * part.layout().token_bytes * (1 + lossy.value_share) / 2
        heads = self._shape.num_heads // self._shape.num_kv_heads
        number = number_format(self._dtype, lossy.kv_cache)
        return site.decode_attention_s(part.rows, read, number, heads)


def _network_rates(hardware: HardwareProfile, sender: HardwareProfile) -> dict[LaneKind, float]:
    sent, received = (network_rate(*one) for one in ((sender, LaneKind.NET_OUT), (hardware, LaneKind.NET_IN)))
    more_s = max(0.0, 1 / received - 1 / sent)
    rate = 1 / more_s if more_s else math.inf
    own = network_rate(hardware, LaneKind.NET_OUT)
    return {kind: own if kind is LaneKind.NET_OUT else rate for kind in NETWORK}


def _work_of(micro_batch: MicroBatch) -> tuple[object, ...]:
    return micro_batch.token == 0, micro_batch.rows, len(micro_batch.logit_rows), len(micro_batch.kv_parts)


def _longest(micro_batch: MicroBatch) -> int:
    return max(max(m.group.prompt_lens) for m in micro_batch.members)


def _attended(step: Step) -> tuple[object, ...] | None:
    """What else decides the time of a step on a cache: its phase, and the longest prompt, or the rows and tokens of its
    parts."""
    if step.kind not in (StepKind.ATTEND, StepKind.APPEND_KV, StepKind.LAYER):
        return None
    micro_batch = step.micro_batch
    if micro_batch.is_prefill:
        return True, _longest(micro_batch)
    if step.kind is StepKind.LAYER:
        return micro_batch.attended
    part = micro_batch.kv_parts[step.part]
    return False, part.rows, part.tier
