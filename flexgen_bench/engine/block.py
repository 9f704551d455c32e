"""One block in flight: the action behind each kind of step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.engine.cache import BlockCache
from flexgen_bench.engine.device import Device, crossing
from flexgen_bench.engine.hidden import HiddenStates, page_aligned
from flexgen_bench.engine.weights import Weights
from flexgen_bench.kernels import ops
from flexgen_bench.kernels.attention import (
    PlainSegment,
    decode_attention,
    prefill_attention,
)
from flexgen_bench.memory.spill import SpillFile
from flexgen_bench.memory.weight_store import TORCH_DTYPES
from flexgen_bench.models.family import ModelFamily
from flexgen_bench.schedule.job import Job, MicroBatch
from flexgen_bench.schedule.steps import Step, StepKind


class Consumer(Protocol):
    """What becomes of a block's tokens and logits: generation or scoring."""

    def tokens(self, batch: MicroBatch, token: int) -> Sequence[int]:
        """The token ids to feed: all prompt tokens (token 0), or the token-th new one of each sequence."""

    def rows(self, batch: MicroBatch, token: int) -> Sequence[int] | None:
        """Which rows of the hidden states need logits; None for all."""

    def reduce(
        self, batch: MicroBatch, token: int, head: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """On the compute device: hidden rows (R, hidden) -> what the host needs of their logits."""

    def finish(self, batch: MicroBatch, token: int, found: Tensor) -> None:
        """On the host: take what ``reduce`` returned."""


class BlockRun:
    """Buffers of one block, and the actions that fill them. Steps say what happens where; this does it."""

    def __init__(
        self,
        family: ModelFamily,
        shape: ModelShape,
        dtype: DType,
        job: Job,
        weights: Weights,
        device: Device,
        spill: SpillFile | None,
        consumer: Consumer,
    ) -> None:
        self._family, self._shape = family, shape
        self._dtype = TORCH_DTYPES[dtype]
        self._job, self._weights, self._device = job, weights, device
        self._consumer = consumer
        self._scale = family.attention_scale(shape)
        kv_bytes, _ = spill_bytes(job, shape)
        self._cache = BlockCache(job, shape, self._dtype, device, spill, 0) if job.keep_kv else None
        self._hidden = HiddenStates(job, self._dtype, device, spill, kv_bytes)
        device.settle()
        self._rows: dict[int, Mapping[str, Tensor]] = {}
        self._gpu_rows: dict[int, Mapping[str, Tensor]] = {}
        self._x: dict[
            int, Tensor
        ] = {}  # stage -> hidden states before the attention, for the residual
        self._angles: dict[int, tuple[int, Any]] = {}  # micro-batch -> (token, angles)
        self._qkv: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._qkv_host: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._attended: dict[tuple[int, int], Tensor] = {}
        self._attended_host: dict[tuple[int, int], Tensor] = {}
        self._found: dict[int, Tensor] = {}
        self._found_host: dict[int, Tensor] = {}
        self._actions: dict[StepKind, Callable[[Step], None]] = {
            StepKind.LOAD_WEIGHTS: weights.load,
            StepKind.GATHER_ROWS: self._gather_rows,
            StepKind.MOVE_ROWS: self._move_rows,
            StepKind.EMBED: self._embed,
            StepKind.LOAD_HIDDEN: lambda s: self._hidden.load(s, self._batch(s)),
            StepKind.STORE_HIDDEN: lambda s: self._hidden.store(s, self._batch(s)),
            StepKind.PROJECT: self._project,
            StepKind.MOVE_QKV: self._move_qkv,
            StepKind.ATTEND: self._attend,
            StepKind.MOVE_ATTENTION: self._move_attention,
            StepKind.OUTPUT: self._output,
            StepKind.HEAD: self._head,
            StepKind.MOVE_LOGITS: self._move_logits,
            StepKind.SAMPLE: self._sample,
        }
        if self._cache is not None:
            self._actions[StepKind.LOAD_KV] = self._cache.load
            self._actions[StepKind.STORE_KV] = self._cache.store
            self._actions[StepKind.APPEND_KV] = self._cache.append

    def act(self, step: Step) -> None:
        """Do one step."""
        self._actions[step.kind](step)

    def close(self) -> None:
        """Release the block's memory now: actions refer back to this object, so it would linger until collected."""
        self._actions.clear()
        for held in (
            self._x, self._qkv, self._qkv_host, self._attended, self._attended_host, self._rows,
            self._gpu_rows, self._found, self._found_host, self._angles,
        ):  # fmt: skip
            held.clear()
        del self._cache, self._hidden

    @property
    def _kv(self) -> BlockCache:
        assert self._cache is not None, "a job that keeps no KV cache has no KV steps"
        return self._cache

    def _batch(self, step: Step) -> MicroBatch:
        return self._job.batches[step.batch]

    # Embedding

    def _indices(self, step: Step) -> Mapping[str, Tensor]:
        batch = self._batch(step)
        ids = torch.tensor(self._consumer.tokens(batch, step.token), dtype=torch.long)
        return self._family.rows(
            self._shape, ids, _positions(batch, step.token, self._shape.max_positions)
        )

    def _gather_rows(self, step: Step) -> None:
        self._rows[step.stage] = {
            name: self._weights.rows(name, index) for name, index in self._indices(step).items()
        }

    def _move_rows(self, step: Step) -> None:
        self._gpu_rows[step.stage] = {
            name: self._device.to_compute(rows) for name, rows in self._rows[step.stage].items()
        }

    def _embed(self, step: Step) -> None:
        if self._job.units[step.unit].tier is self._job.compute_tier:
            indices = self._indices(step)
            rows = {name: self._weights.rows(name, index) for name, index in indices.items()}
        else:
            gathered = (self._gpu_rows if self._job.has_accelerator else self._rows)[step.stage]
            rows = {name: crossing(found) for name, found in gathered.items()}
        x = self._family.embed(ops, self._shape, self._weights.of(step), rows)
        self._hidden.put(step, self._batch(step), x)

    # A decoder layer

    def _project(self, step: Step) -> None:
        batch = self._batch(step)
        x = self._x[step.stage] = self._hidden.take(step, batch)
        self._qkv[step.stage] = self._family.project(
            ops, self._shape, self._weights.of(step), x, self._angles_of(batch, step.token, x)
        )

    def _angles_of(self, batch: MicroBatch, token: int, x: Tensor) -> Any:
        """The same in every layer of a pass, so made in the first and kept until the next pass."""
        made_for, angles = self._angles.get(batch.index, (None, None))
        if made_for != token:
            positions = _positions(batch, token, self._shape.max_positions).to(
                x.device, non_blocking=True
            )
            angles = self._family.angles(ops, self._shape, positions, x)
            self._angles[batch.index] = (token, angles)
        return angles

    def _move_qkv(self, step: Step) -> None:
        span = self._batch(step).kv[step.part]
        q, k, v = (self._device.to_host(t[span.start : span.stop]) for t in self._qkv[step.stage])
        self._qkv_host[step.stage, step.part] = (q, k, v)

    def _attend(self, step: Step) -> None:
        batch = self._batch(step)
        if step.token == 0:
            q, k, v = self._qkv[step.stage]
            self._attended[step.stage, 0] = prefill_attention(
                q, k, v, batch.prompt_lens, self._scale
            )
            if self._job.keep_kv:
                self._kv.keep_prompt(step, batch, k, v)
            return
        span = batch.kv[step.part]
        for_accelerator = self._job.has_accelerator and step.lane is Lane.CPU
        if for_accelerator:
            q, k, v = self._qkv_host[step.stage, step.part]
        else:
            q, k, v = (t[span.start : span.stop] for t in self._qkv[step.stage])
        moved = self._kv.is_moved(step, span)
        segments = (
            self._kv.attend_moved(step, k, v) if moved else self._kv.attend_in_memory(step, k, v)
        )
        padding = self._kv.padding(batch, step.part, q.device)
        plain = [PlainSegment(keys, values) for keys, values in segments]
        out = decode_attention(q, plain, padding, self._scale)
        (self._attended_host if for_accelerator else self._attended)[step.stage, step.part] = out

    def _move_attention(self, step: Step) -> None:
        key = (step.stage, step.part)
        self._attended[key] = self._device.to_compute(self._attended_host[key])

    def _output(self, step: Step) -> None:
        batch = self._batch(step)
        parts = len(batch.kv) if step.token else 1
        outs = [crossing(self._attended[step.stage, part]) for part in range(parts)]
        attended = outs[0] if parts == 1 else torch.cat(outs)
        x = self._family.output(
            ops, self._shape, self._weights.of(step), self._x.pop(step.stage), attended
        )
        self._hidden.put(step, batch, x)

    # From hidden states to tokens

    def _head(self, step: Step) -> None:
        batch = self._batch(step)
        x = self._hidden.take(step, batch)
        rows = self._consumer.rows(batch, step.token)
        if rows is not None:
            x = x[torch.tensor(rows, device=x.device)]
        w = self._weights.of(step)
        self._found[step.stage] = self._consumer.reduce(
            batch, step.token, lambda part: self._family.head(ops, self._shape, w, part), x
        )

    def _move_logits(self, step: Step) -> None:
        self._found_host[step.stage] = self._device.to_host(self._found[step.stage])

    def _sample(self, step: Step) -> None:
        found = (self._found_host if self._job.has_accelerator else self._found)[step.stage]
        self._consumer.finish(self._batch(step), step.token, found)


def spill_bytes(job: Job, shape: ModelShape) -> tuple[int, int]:
    """Bytes of KV cache and of hidden states that a block keeps on disk."""
    kv = sum(
        layout.region_bytes * shape.num_layers
        for batch, layouts in zip(job.batches, job.kv_layouts, strict=True)
        for span, layout in zip(batch.kv, layouts, strict=True)
        if span.tier is Tier.DISK and job.keep_kv
    )
    hidden = sum(
        page_aligned(batch.tokens(0, span) * job.hidden_row_bytes)
        for batch in job.batches
        for span in batch.hidden
        if span.tier is Tier.DISK
    )
    return kv, hidden


def _positions(batch: MicroBatch, token: int, max_positions: int) -> Tensor:
    """Position of every row: 0 .. length-1 of each prompt, or the place of the token-th new token.

    Sequences that have ended keep their row until their micro-batch leaves; theirs stay inside the model's positions.
    """
    if token == 0:
        return torch.cat([torch.arange(length) for length in batch.prompt_lens])
    return torch.tensor([min(length + token, max_positions) - 1 for length in batch.prompt_lens])
