"""The schedule, said once: which steps a pass consists of, in program order.

The engine executes these steps, the planner sums and simulates them. A pass sweeps all units once; each loaded
unit serves every micro-batch, whether that one is in prefill or in decode. Nothing here waits for anything: what a step
must wait for follows from the buffers it reads and writes (``dependencies.py``), so loads for the next layer and the
next micro-batch run ahead as far as their staging buffers allow.

``buffer.py`` lists the buffers. Where a unit is computed, and on which lanes what it needs is moved, says its site.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice

from flexgen_bench.schedule.attention import (
    attend_flops,
    attention_buffers,
    attention_steps,
    cache_homes,
    is_resident,
    joining_steps,
)
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.experts import add_experts, are_away, expert_steps, state_buffers
from flexgen_bench.schedule.hidden import load_hidden, store_hidden, working_buffers
from flexgen_bench.schedule.micro_batch import Member, MicroBatch
from flexgen_bench.schedule.ranks import entering, leaving, tokens_from_last, tokens_to_others
from flexgen_bench.schedule.scheduled_job import ScheduledJob, Unit, UnitKind
from flexgen_bench.schedule.steps import TOKEN_BYTES, Step, StepKind
from flexgen_bench.schedule.sums import add_sum, part_buffers, sliced_mlp, summing
from flexgen_bench.schedule.weights import Blob, WeightStream


def pass_steps(
    job: ScheduledJob, weights: WeightStream, micro_batches: Sequence[MicroBatch], is_last: bool
) -> Iterator[Step]:
    """All steps of one pass over ``micro_batches``; chunks of one prompt follow each other. ``is_last``: load nothing
    beyond it.

    Decoding micro-batches that the cpu attends for are split at the attention: their projections come first, then
    the other micro-batches (prefill, mostly) while the cpu attends, then output and MLP, each directly followed by the
    same micro-batch's projection in the next layer. So the accelerator, the cpu and the links always have a micro-batch
    to work on. Of a divided micro-batch, what is moved is attended to directly before the output.
    """
    weights.begin_pass(is_last, max((one.rows for one in micro_batches), default=0))
    cpu_attended: list[MicroBatch] = []
    others: list[MicroBatch] = []
    for micro_batch in micro_batches:
        (cpu_attended if uses_cpu_attention(job, micro_batch.members) else others).append(micro_batch)
    projected = False  # whether the layer's projections of ``cpu_attended`` were emitted with the layer before
    entered = count()
    for unit, following in zip(job.sweep, [*job.sweep[1:], None], strict=True):
        yield from weights.ready(unit)
        blob = weights.where(unit)
        if unit.kind is UnitKind.LAYER:
            experts = job.experts_of(unit)
            if experts is not None:
                yield from weights.ready(experts)
            ahead = following if following is not None and _may_overlap(job, unit, following) else None
            split = cpu_attended if unit.site.is_accelerator else []
            whole = others if split else micro_batches
            if not projected:
                for micro_batch in split:
                    yield from entering(job, unit, micro_batch, entered)
                    yield from _before_attention(job, unit, blob, micro_batch)
            projected = bool(split) and ahead is not None
            # While experts are computed elsewhere, or ranks add up, the next micro-batch is computed here.
            at_once = job.num_buffers if are_away(unit, experts) or unit.sums else 1

            def through(
                first: Iterator[Step],
                micro_batch: MicroBatch,
                ahead: Unit | None = None,
                unit: Unit = unit,
                blob: Blob = blob,
            ) -> list[Iterator[Step]]:
                middle = [sliced_mlp(job, unit, blob, micro_batch)] if unit.sums > 1 else []
                return [first, *middle, _end(job, unit, weights, blob, micro_batch, ahead)]

            begun = ((_begin(job, unit, weights, blob, one, entered), one) for one in whole)
            yield from _in_turn((through(*each) for each in begun), at_once)
            resumed = ((_resume(job, unit, weights, blob, one), one, ahead) for one in split)
            yield from _in_turn((through(*each) for each in resumed), at_once)
            if experts is not None:
                yield from weights.done(experts)
        else:
            for micro_batch in micro_batches:
                yield from (_embed if unit.kind is UnitKind.EMBED else _head)(job, unit, blob, micro_batch)
        yield from weights.done(unit)
    for micro_batch in micro_batches:
        yield from tokens_from_last(job, micro_batch)


def _in_turn(of_each: Iterable[Sequence[Iterator[Step]]], at_once: int) -> Iterator[Step]:
    """The parts of every micro-batch, of so many micro-batches in turn: directly behind the last part of one comes the
    first of the next that has not begun."""
    waiting = iter(of_each)
    under_way: deque[deque[Iterator[Step]]] = deque()
    for parts in islice(waiting, at_once):
        yield from parts[0]
        under_way.append(deque(parts[1:]))
    while under_way:
        rest = under_way.popleft()
        yield from rest.popleft()
        if not rest:
            following = next(waiting, None)
            if following is None:
                continue
            yield from following[0]
            rest = deque(following[1:])
        under_way.append(rest)


def _begin(
    job: ScheduledJob, unit: Unit, weights: WeightStream, blob: Blob, micro_batch: MicroBatch, entered: Iterator[int]
) -> Iterator[Step]:
    """A micro-batch through a layer, up to what ends it."""
    yield from entering(job, unit, micro_batch, entered)
    if unit.sums or not is_resident(job, unit, micro_batch):
        yield from _before_attention(job, unit, blob, micro_batch)
        yield from _resume(job, unit, weights, blob, micro_batch)
        return
    yield from _layer(job, unit, blob, micro_batch)
    experts = job.experts_of(unit)
    if experts is not None:
        yield from expert_steps(job, unit, experts, weights, micro_batch)


def _resume(
    job: ScheduledJob, unit: Unit, weights: WeightStream, blob: Blob, micro_batch: MicroBatch
) -> Iterator[Step]:
    """The same from where the cpu attends on."""
    yield from joining_steps(job, unit, micro_batch)
    yield _after_attention(unit, blob, micro_batch)
    if unit.sums:
        yield from summing(job, unit, micro_batch)
    experts = job.experts_of(unit)
    if experts is not None:
        yield from expert_steps(job, unit, experts, weights, micro_batch)


def _end(
    job: ScheduledJob, unit: Unit, weights: WeightStream, blob: Blob, micro_batch: MicroBatch, ahead: Unit | None
) -> Iterator[Step]:
    """What experts made elsewhere or all ranks together, hidden states on their way home or to the next rank, and the
    projection of the layer ahead, if any."""
    if unit.sums:
        yield add_sum(unit, blob, micro_batch)
    if are_away(unit, job.experts_of(unit)):
        yield add_experts(unit, micro_batch)
    yield from _store_after(job, unit, micro_batch)
    if ahead is not None:
        yield from weights.ready(ahead)
        yield from _before_attention(job, ahead, weights.where(ahead), micro_batch)


def uses_cpu_attention(job: ScheduledJob, members: Sequence[Member]) -> bool:
    """Whether the cpu attends for a micro-batch of these members while an accelerator computes the rest."""
    return job.delegates_attention and any(
        member.token and span.count and span.is_delegated for member in members for span in member.group.kv
    )


def _may_overlap(job: ScheduledJob, unit: Unit, following: Unit) -> bool:
    """Whether two neighbouring layers can be in use at once: both on the accelerator, with a slot for each."""
    return (
        following.kind is UnitKind.LAYER
        and following.site.is_accelerator
        and (job.weight_buffers > 1 or not following.is_streamed)
        and (job.dequantized_buffers > 1 or not following.unpack)
    )


def _computed(
    kind: StepKind,
    unit: Unit,
    blob: Blob,
    micro_batch: MicroBatch,
    reads: tuple[Buffer, ...],
    writes: tuple[Buffer, ...],
    flops: int,
) -> Step:
    """A step that computes with a unit's weights, at its site. reads: what else it reads."""
    return Step(
        unit.site.lane,
        kind,
        unit.index,
        micro_batch,
        weight_buffer=blob.weight_buffer,
        dequantized_buffer=blob.dequantized_buffer,
        reads=(*blob.buffers, *reads),
        writes=writes,
        flops=flops,
    )


def _embed(job: ScheduledJob, unit: Unit, blob: Blob, micro_batch: MicroBatch) -> Iterator[Step]:
    tokens = micro_batch.token_buffers
    rows = micro_batch.buffer("rows")
    moved = micro_batch.rows * job.embed_row_bytes
    source = tokens
    if unit.tier is not unit.site.tier:  # only the rows that are needed leave the table
        # By the cpu even from disk: on the disk's lane, weights would wait behind it for the tokens.
        yield Step(unit.site.cpu, StepKind.GATHER_ROWS, unit.index, micro_batch, reads=tokens, writes=(rows,))
        source = (rows,)
        if unit.site.is_accelerator:
            source = (micro_batch.buffer("gpu_rows"),)
            yield Step(
                unit.site.h2d, StepKind.MOVE_ROWS, unit.index, micro_batch, reads=(rows,), writes=source, bytes=moved
            )
    yield _computed(
        StepKind.EMBED,
        unit,
        blob,
        micro_batch,
        reads=source,
        writes=working_buffers(unit, micro_batch),
        flops=unit.flops_before * micro_batch.rows,
    )
    yield from store_hidden(job, unit, micro_batch)


def _before_attention(job: ScheduledJob, unit: Unit, blob: Blob, micro_batch: MicroBatch) -> Iterator[Step]:
    if unit is not job.entry:
        yield from load_hidden(job, unit, micro_batch)
    yield _computed(
        StepKind.PROJECT,
        unit,
        blob,
        micro_batch,
        reads=working_buffers(unit, micro_batch),
        writes=(micro_batch.buffer("qkv"), micro_batch.buffer("residual")),
        flops=unit.flops_before * micro_batch.rows,
    )
    yield from attention_steps(job, unit, micro_batch)


def _after_attention(unit: Unit, blob: Blob, micro_batch: MicroBatch) -> Step:
    return _computed(
        StepKind.OUTPUT,
        unit,
        blob,
        micro_batch,
        reads=(*attention_buffers(micro_batch), micro_batch.buffer("residual")),
        writes=part_buffers(unit, micro_batch) if unit.sums else _made(unit, micro_batch),
        flops=(unit.flops_output if unit.sums > 1 else unit.flops_after) * micro_batch.rows,
    )


def _made(unit: Unit, micro_batch: MicroBatch) -> tuple[Buffer, ...]:
    """What a layer leaves: hidden states, or what its experts are to make them of."""
    return working_buffers(unit, micro_batch) if unit.companion < 0 else state_buffers(micro_batch)


def _layer(job: ScheduledJob, unit: Unit, blob: Blob, micro_batch: MicroBatch) -> Iterator[Step]:
    """The whole layer in one step. Nothing moves between its parts, and they follow each other on one lane: three steps
    would say the same with three times the events and the Python."""
    if unit is not job.entry:
        yield from load_hidden(job, unit, micro_batch)
    hidden, caches = working_buffers(unit, micro_batch), cache_homes(unit, micro_batch)
    flops = (unit.flops_before + unit.flops_after) * micro_batch.rows
    yield _computed(
        StepKind.LAYER,
        unit,
        blob,
        micro_batch,
        reads=(*hidden, *caches),
        writes=(*_made(unit, micro_batch), *caches),
        flops=flops + sum(attend_flops(job, unit, part) for part in micro_batch.kv_parts),
    )


def _store_after(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch) -> Iterator[Step]:
    """Hidden states after a layer go home, or to the next rank, unless it was the model's last one and nobody wants
    logits of them."""
    if unit is job.exit:
        yield from leaving(job, unit, micro_batch)
    elif micro_batch.logit_rows or job.units[unit.index + 1].kind is UnitKind.LAYER:
        yield from store_hidden(job, unit, micro_batch)


def _head(job: ScheduledJob, unit: Unit, blob: Blob, micro_batch: MicroBatch) -> Iterator[Step]:
    """Logits of the logit rows only; a chunk that ends no prompt has none. Then their next tokens."""
    if not micro_batch.logit_rows:
        return
    logits = micro_batch.buffer("logits")
    yield from load_hidden(job, unit, micro_batch)
    yield _computed(
        StepKind.HEAD,
        unit,
        blob,
        micro_batch,
        reads=working_buffers(unit, micro_batch),
        writes=(logits,),
        flops=unit.flops_before * len(micro_batch.logit_rows),
    )
    tokens = micro_batch.token_buffers
    if micro_batch.samples_on_device:
        yield from _sampled_on_device(unit, micro_batch, logits, tokens)
        return
    if unit.site.is_accelerator:
        on_host = micro_batch.buffer("host_logits")
        yield Step(
            unit.site.d2h,
            StepKind.MOVE_LOGITS,
            unit.index,
            micro_batch,
            reads=(logits,),
            writes=(on_host,),
            bytes=len(micro_batch.logit_rows) * job.logits_row_bytes,
        )
        logits = on_host
    new = (micro_batch.buffer("new_tokens"),)
    yield Step(
        unit.site.cpu,
        StepKind.SAMPLE,
        unit.index,
        micro_batch,
        reads=(logits,),
        writes=new if job.tokens_stay else tokens,
    )
    yield from tokens_to_others(job, unit, micro_batch)
    if job.tokens_stay:
        moved = len(micro_batch.logit_rows) * TOKEN_BYTES
        yield Step(unit.site.h2d, StepKind.MOVE_TOKENS, unit.index, micro_batch, reads=new, writes=tokens, bytes=moved)


def _sampled_on_device(
    unit: Unit, micro_batch: MicroBatch, logits: Buffer, tokens: tuple[Buffer, ...]
) -> Iterator[Step]:
    """The next pass reads the tokens where they are chosen; the host gets to know them when they have come down to
    it."""
    new = micro_batch.buffer("new_tokens")
    yield Step(unit.site.lane, StepKind.SAMPLE, unit.index, micro_batch, reads=(logits,), writes=(*tokens, new))
    yield Step(
        unit.site.d2h,
        StepKind.MOVE_TOKENS,
        unit.index,
        micro_batch,
        reads=(new,),
        bytes=len(micro_batch.logit_rows) * TOKEN_BYTES,
    )
