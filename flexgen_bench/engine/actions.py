"""The action behind each kind of step. Steps say what happens where; this does it with real tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import LaneKind, Tier
from flexgen_bench.engine.arenas import Arenas
from flexgen_bench.engine.cache import KVCache
from flexgen_bench.engine.device import Device, crossing
from flexgen_bench.engine.hidden import HiddenStates
from flexgen_bench.engine.layers import Formulas, Layers
from flexgen_bench.engine.nan_checks import Health
from flexgen_bench.engine.prompts import Prompts
from flexgen_bench.engine.resident import ResidentLayers, joined
from flexgen_bench.engine.weights import Weights
from flexgen_bench.kernels import ops
from flexgen_bench.kernels.attention import decode_attention
from flexgen_bench.memory.kv_cache import KVForm
from flexgen_bench.memory.spill import SpillFile
from flexgen_bench.models import formulas
from flexgen_bench.models.parts import Layer
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.schedule.micro_batch import Member, MicroBatch
from flexgen_bench.schedule.prefix_tree import PrefixTree
from flexgen_bench.schedule.sequence_group import SequenceGroup
from flexgen_bench.schedule.steps import Step, StepKind

QKV = tuple[Tensor, Tensor, Tensor]


class Consumer(Protocol):
    """What becomes of a job's tokens and logits: generation or scoring."""

    def tokens(self, member: Member) -> Sequence[int]:
        """The token ids to feed, one per row of the member."""

    def logit_rows(self, member: Member) -> Sequence[int]:
        """Which of the member's rows need logits."""

    def reduce(self, micro_batch: MicroBatch, head: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """On the compute device: the wanted hidden rows (R, hidden) -> what the host needs of their logits."""

    def finish(self, micro_batch: MicroBatch, reduced: Tensor) -> None:
        """On the host: take what ``reduce`` returned."""

    def tree(self, sequence: int) -> PrefixTree | None:
        """How the prompt rows of a sequence of the job hang together; None: each follows the one before it."""

    def ended(self, group: SequenceGroup) -> list[int]:
        """Sequences of the sequence group that have come to their end."""


class Actions:
    """Buffers of a job, and the actions that fill them."""

    def __init__(
        self,
        layer_formulas: Formulas,
        dtype: torch.dtype,
        policy: Policy,
        plan: MemoryPlan,
        weights: Weights,
        device: Device,
        arenas: Arenas,
        spill: SpillFile | None,
        consumer: Consumer,
    ) -> None:
        self._decoder = layer_formulas.decoder
        self._job, self._weights, self._device = plan.job, weights, device
        self._consumer = consumer
        self._value_share = policy.lossy.value_share
        self._form = KVForm(
            layer_formulas.shape.num_kv_heads, layer_formulas.shape.head_dim, dtype, policy.lossy.kv_cache
        )
        self._cache = KVCache(plan, self._form, device, arenas, spill)
        self._hidden = HiddenStates(plan, policy, dtype, device, arenas, spill, self._cache.spilled)
        self._prompts = Prompts(
            plan.job, self._cache, self._form, consumer.tree, self._decoder.layers, self._value_share
        )
        self._health = Health(device)
        self._layers = Layers(layer_formulas, weights, plan.job, device)
        self._resident = ResidentLayers(
            plan.job,
            self._layers,
            self._hidden,
            self._cache,
            self._form,
            device,
            self._health,
            self._decoder.layers,
            self._value_share,
            self._angles_of,
        )
        device.settle()
        # What passes between steps of a micro-batch, by its stage (and part). The step that is the last to use
        # something takes it out: what a whole micro-batch's prompts leave behind would stay until its stage is used
        # again.
        self._rows: dict[int, Mapping[str, Tensor]] = {}
        self._gpu_rows: dict[int, Mapping[str, Tensor]] = {}
        self._x: dict[int, Tensor] = {}  # hidden states before the attention, for the residual
        self._angles: dict[int, tuple[MicroBatch, Any]] = {}
        self._qkv: dict[int, QKV] = {}
        self._qkv_host: dict[tuple[int, int], QKV] = {}
        self._attended: dict[tuple[int, int], Tensor] = {}
        self._attended_host: dict[tuple[int, int], Tensor] = {}
        self._found: dict[int, Tensor] = {}
        self._found_host: dict[int, Tensor] = {}
        self._actions: dict[StepKind, Callable[[Step], None]] = {
            StepKind.LOAD_WEIGHTS: weights.load,
            StepKind.DEQUANTIZE: weights.dequantize,
            StepKind.GATHER_ROWS: self._gather_rows,
            StepKind.MOVE_ROWS: self._move_rows,
            StepKind.EMBED: self._embed,
            StepKind.LOAD_HIDDEN: self._hidden.load,
            StepKind.STORE_HIDDEN: self._hidden.store,
            StepKind.PROJECT: self._project,
            StepKind.MOVE_QKV: self._move_qkv,
            StepKind.LOAD_KV: self._cache.load,
            StepKind.ATTEND: self._attend,
            StepKind.MOVE_ATTENTION: self._move_attention,
            StepKind.STORE_KV: self._cache.store,
            StepKind.APPEND_KV: self._cache.append,
            StepKind.OUTPUT: self._output,
            StepKind.LAYER: self._resident.run,
            StepKind.HEAD: self._head,
            StepKind.MOVE_LOGITS: self._move_logits,
            StepKind.SAMPLE: self._sample,
        }

    def act(self, step: Step) -> None:
        """Do one step."""
        self._actions[step.kind](step)

    def begin_pass(self) -> None:
        """Nothing of the last pass is computed any more: release the hidden states that it has left."""
        self._hidden.begin_pass()
        self._angles.clear()
        self._prompts.begin_pass()
        self._resident.begin_pass()

    @property
    def cache(self) -> KVCache:
        return self._cache

    def forget(self, group: SequenceGroup) -> None:
        """A sequence group has left its room."""
        self._cache.forget(group)

    def close(self) -> None:
        """Release the job's memory now: actions refer back to this object, so it would linger until collected."""
        self._actions.clear()
        self._layers.clear()
        self._resident.begin_pass()
        for held in (
            self._x,
            self._qkv,
            self._qkv_host,
            self._attended,
            self._attended_host,
            self._rows,
            self._gpu_rows,
            self._found,
            self._found_host,
            self._angles,
        ):
            held.clear()
        del self._cache, self._hidden, self._prompts, self._resident

    def _on_accelerator(self, step: Step) -> bool:
        return self._job.units[step.unit].site.is_accelerator

    # Embedding

    def _indices(self, micro_batch: MicroBatch) -> Mapping[str, Tensor]:
        ids = [t for member in micro_batch.members for t in self._consumer.tokens(member)]
        return formulas.rows(self._decoder, torch.tensor(ids), self._prompts.positions(micro_batch))

    def _gather_rows(self, step: Step) -> None:
        moves = self._device.is_cuda and self._on_accelerator(step)
        self._rows[step.buffer_index] = {
            name: self._weights.rows(name, index, pinned=moves)
            for name, index in self._indices(step.micro_batch).items()
        }

    def _move_rows(self, step: Step) -> None:
        self._gpu_rows[step.buffer_index] = {
            name: self._device.to_compute(rows) for name, rows in self._rows.pop(step.buffer_index).items()
        }

    def _embed(self, step: Step) -> None:
        unit = self._job.units[step.unit]
        if unit.tier is unit.site.tier:
            rows = {
                name: self._weights.rows(name, self._to_site(step, index))
                for name, index in self._indices(step.micro_batch).items()
            }
        else:
            gathered = self._gpu_rows if unit.site.is_accelerator else self._rows
            rows = {name: crossing(r) for name, r in gathered.pop(step.buffer_index).items()}
        x = formulas.embed(ops, self._decoder, self._weights.of(step), rows)
        self._hidden.put(step, x)

    # A decoder layer

    def _project(self, step: Step) -> None:
        x = self._x[step.buffer_index] = self._hidden.take(step)
        self._qkv[step.buffer_index] = self._layers.of(step).project(x, self._angles_of(step, x))

    def _layer(self, step: Step) -> Layer:
        return self._decoder.layers[step.unit - 1]  # the embedding is unit 0

    def _angles_of(self, step: Step, x: Tensor) -> Any:
        """The same in every layer of a pass, so made in the first and kept until the next micro-batch takes the stage.
        Layers computed on another device make their own."""
        micro_batch = step.micro_batch
        made_for, angles = self._angles.get(step.buffer_index, (None, None))
        if made_for is not micro_batch or (angles and angles[0][0].device != x.device):
            positions = self._to_site(step, self._prompts.positions(micro_batch))
            lengths = self._to_site(step, self._prompts.lengths(micro_batch))
            angles = formulas.angles(ops, self._decoder, positions, lengths, x)
            self._angles[step.buffer_index] = (micro_batch, angles)
        return angles

    def _move_qkv(self, step: Step) -> None:
        part = step.micro_batch.kv_parts[step.part]
        rows = [crossing(t[part.row : part.stop]) for t in self._qkv[step.buffer_index]]
        # One copy of one piece: they are strided, and a copy over the link wants its rows together.
        packed = self._device.to_host(torch.cat(rows, dim=1))
        q, k, v = packed.split([t.shape[1] for t in rows], dim=1)
        self._qkv_host[step.buffer_index, step.part] = (q, k, v)

    def _attend(self, step: Step) -> None:
        micro_batch = step.micro_batch
        if micro_batch.is_prefill:
            q, k, v = self._qkv.pop(step.buffer_index)
            self._health.watch(step, k, v)
            self._attended[step.buffer_index, 0] = self._prompts.attend(step, q, k, v)
            return
        part, key = micro_batch.kv_parts[step.part], (step.buffer_index, step.part)
        for_accelerator = step.lane.kind is LaneKind.CPU and self._on_accelerator(step)
        if for_accelerator:
            q, k, v = self._qkv_host.pop(key)
        else:
            q, k, v = (t[part.row : part.stop] for t in self._qkv[step.buffer_index])
        self._health.watch(step, k, v)
        new = (self._form.encode(k), self._form.encode(v))
        moved = self._cache.is_moved(step, part)
        attend = self._cache.attend_moved if moved else self._cache.attend_in_memory
        attention, ring = self._layer(step).attention, self._cache.ring(step, part)
        out = decode_attention(
            q,
            attend(step, part, new),
            self._cache.padding(part, q.device, ring),
            attention.scale,
            self._value_share,
            self._cache.live_slots(part),
            attention.mod if ring is None else attention.mod.unwindowed,
            part.newest(ring) if self._value_share < 1 else None,
        )
        (self._attended_host if for_accelerator else self._attended)[key] = out

    def _move_attention(self, step: Step) -> None:
        key = (step.buffer_index, step.part)
        self._attended[key] = self._device.to_compute(self._attended_host.pop(key))

    def _output(self, step: Step) -> None:
        micro_batch = step.micro_batch
        parts = 1 if micro_batch.is_prefill else len(micro_batch.kv_parts)
        attended = joined([crossing(self._attended.pop((step.buffer_index, part))) for part in range(parts)])
        self._hidden.put(step, self._layers.of(step).output(self._x.pop(step.buffer_index), attended))

    # From hidden states to tokens

    def _head(self, step: Step) -> None:
        micro_batch = step.micro_batch
        x = self._hidden.take(step)
        if len(micro_batch.logit_rows) < micro_batch.rows:
            x = x[self._to_site(step, torch.tensor(micro_batch.logit_rows))]
        w = self._weights.of(step)

        def head(rows: Tensor) -> Tensor:
            logits = formulas.head(ops, self._decoder, w, rows)
            self._health.watch_head(step, rows, logits)
            return logits

        self._found[step.buffer_index] = self._consumer.reduce(micro_batch, head, x)

    def _move_logits(self, step: Step) -> None:
        self._found_host[step.buffer_index] = self._device.to_host(self._found.pop(step.buffer_index))
        self._health.move(step)

    def _sample(self, step: Step) -> None:
        self._health.judge(step)
        on_accelerator = self._on_accelerator(step)
        reduced = self._found_host if on_accelerator else self._found
        self._consumer.finish(step.micro_batch, reduced.pop(step.buffer_index))

    def _to_site(self, step: Step, tensor: Tensor) -> Tensor:
        """A small host tensor where the step computes, without waiting for the device."""
        on_gpu = self._job.units[step.unit].site.tier is Tier.GPU and self._device.is_cuda
        return self._device.to_compute(tensor) if on_gpu else tensor
