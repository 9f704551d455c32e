"""The action behind each kind of step. Steps say what happens where; this does it with real tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import LaneKind, Tier
from flexgen_bench.engine.arenas import Arenas
from flexgen_bench.engine.between_ranks import BetweenRanks
from flexgen_bench.engine.cache import KVCache
from flexgen_bench.engine.decode_graphs import DecodeGraphs
from flexgen_bench.engine.device import Device, crossing
from flexgen_bench.engine.embedding import Embedding
from flexgen_bench.engine.graphs import Graphs
from flexgen_bench.engine.hidden import HiddenStates
from flexgen_bench.engine.layers import Formulas, Layers
from flexgen_bench.engine.nan_checks import Health
from flexgen_bench.engine.next_tokens import NextTokens, Reader, TokenHome
from flexgen_bench.engine.placed_experts import PlacedExperts
from flexgen_bench.engine.prompts import Prompts
from flexgen_bench.engine.reductions import Reductions
from flexgen_bench.engine.resident import ResidentLayers, joined
from flexgen_bench.engine.static_decode import StaticDecode
from flexgen_bench.engine.weights import Weights
from flexgen_bench.engine.wire import Wire
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


class Consumer(Reader, Protocol):
    """What becomes of a job's tokens and logits: generation or scoring."""

    def tokens(self, member: Member) -> Sequence[int]:
        """The token ids to feed, one per row of the member."""

    def logit_rows(self, member: Member) -> Sequence[int]:
        """Which of the member's rows need logits."""

    def on_device(self, member: Member) -> bool:
        """Whether an accelerator can choose the member's next tokens: they are those of the largest logits."""

    def tree(self, sequence: int) -> PrefixTree | None:
        """How the prompt rows of a sequence of the job hang together; None: each follows the one before it."""

    def ended(self, group: SequenceGroup) -> list[int]:
        """Sequences of the sequence group that have come to their end."""

    def full(self, group: SequenceGroup, count: int) -> list[int]:
        """Those that come to it with their ``count``-th token, as is known before it is."""


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
        graphs: Graphs,
        wire: Wire | None = None,
    ) -> None:
        """wire: to other ranks, if there are any."""
        self._decoder = layer_formulas.decoder
        self._job, self._weights, self._device = plan.job, weights, device
        self._value_share = policy.lossy.value_share
        self._form = KVForm(
            layer_formulas.shape.num_kv_heads, layer_formulas.shape.head_dim, dtype, policy.lossy.kv_cache
        )
        self._cache = KVCache(plan, self._form, device, arenas, spill)
        self._hidden = HiddenStates(plan, policy, dtype, device, arenas, spill, self._cache.spilled)
        self._prompts = Prompts(
            *(plan.job, self._cache, self._form, consumer.tree, self._decoder.layers, self._value_share), weights.sinks
        )
        self._health = Health()
        home = TokenHome(plan, device, arenas) if plan.job.tokens_stay else None
        self._next = NextTokens(device, self._health, consumer, home, is_sent=plan.job.stage is not None)
        self._layers = Layers(layer_formulas, weights, plan.job, device, policy.gpu_batch_size)
        self._graphs = DecodeGraphs(
            *(plan.job, graphs, self._layers, self._cache, self._form, self._prompts, device, self._decoder),
            self._value_share,
            weights.sinks,
        )
        self._embedding = Embedding(
            *(plan.job, self._decoder, weights, self._prompts, device, self._graphs), consumer.tokens, home
        )
        experts = self._experts = PlacedExperts(
            plan.job, self._layers, weights, self._hidden, device, self._decoder.layers
        )
        # Takes what a layer makes: hidden states, or what it leaves for its experts.
        self._leave = experts.leave if any(u.companion >= 0 for u in plan.job.units) else self._hidden.put
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
            weights.sinks,
            self._leave,
            self._graphs,
        )
        device.settle()
        # What passes between steps of a micro-batch, by its stage (and part). The step that is the last to use
        # something takes it out: what a whole micro-batch's prompts leave behind would stay until its stage is used
        # again.
        self._x: dict[int, Tensor] = {}  # hidden states before the attention, for the residual
        self._angles: dict[int, tuple[MicroBatch, Any]] = {}
        self._qkv: dict[int, QKV] = {}
        self._qkv_host: dict[tuple[int, int], QKV] = {}
        self._attended: dict[tuple[int, int], Tensor] = {}
        self._attended_host: dict[tuple[int, int], Tensor] = {}
        self._actions: dict[StepKind, Callable[[Step], None]] = {
            StepKind.LOAD_WEIGHTS: weights.load,
            StepKind.DEQUANTIZE: weights.dequantize,
            StepKind.GATHER_ROWS: self._embedding.gather_rows,
            StepKind.MOVE_ROWS: self._embedding.move_rows,
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
            StepKind.LOAD_EXPERTS: weights.load_experts,
            StepKind.MOVE_ROUTED: self._experts.move_routed,
            StepKind.EXPERTS: self._experts.compute,
            StepKind.MOVE_EXPERTS: self._experts.move_made,
            StepKind.ADD_EXPERTS: self._experts.add,
            StepKind.HEAD: self._head,
            StepKind.MOVE_LOGITS: self._next.move_logits,
            StepKind.SAMPLE: self._sample,
            StepKind.MOVE_TOKENS: self._next.move_tokens,
        }
        self._ranks: BetweenRanks | None = None
        self._reductions: Reductions | None = None
        if wire is not None and plan.job.slices > 1:
            self._reductions = Reductions(plan, wire, dtype, device, arenas, self._hidden, self._layers)
            self._actions |= self._reductions.actions
        elif wire is not None:
            ranks = self._ranks = BetweenRanks(
                plan, wire, dtype, device, arenas, self._hidden, self._health, consumer, self._next
            )
            self._actions |= ranks.actions | {StepKind.ENTER: self._enter}

    def act(self, step: Step) -> None:
        """Do one step."""
        self._actions[step.kind](step)

    def settled(self, step: Step) -> Step:
        """A step of touched experts, with the bytes that it really moves."""
        return self._experts.settled(step)

    def _begin_pass(self, step: Step) -> None:
        """Nothing of the last pass of these sequences is computed any more: release the hidden states that it has left.
        On the lane that embeds, which may begin a pass before the host has seen the end of the last one."""
        self._hidden.begin_pass(step.micro_batch)
        self._angles.clear()
        self._prompts.begin_pass()
        self._resident.begin_pass()
        self._graphs.begin_pass()

    def take(self, batches: Sequence[MicroBatch]) -> None:
        """The steps of a pass are over: its tokens, where they stay on the accelerator, go to their sequences, too."""
        self._next.take(batches)

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
        self._experts.clear()
        self._resident.begin_pass()
        for held in (self._x, self._qkv, self._qkv_host, self._attended, self._attended_host, self._angles):
            held.clear()
        self._next.clear()
        if self._ranks is not None:
            self._ranks.clear()
        if self._reductions is not None:
            self._reductions.clear()
        self._embedding.clear()
        self._graphs.clear()
        del self._cache, self._hidden, self._prompts, self._resident, self._embedding, self._graphs, self._next
        del self._experts, self._leave, self._ranks, self._reductions

    def _on_accelerator(self, step: Step) -> bool:
        return self._job.units[step.unit].site.is_accelerator

    def _embed(self, step: Step) -> None:
        if step.micro_batch.index == 0:
            self._begin_pass(step)
        self._hidden.put(step, self._embedding.embed(step))

    def _enter(self, step: Step) -> None:
        assert self._ranks is not None
        if step.part == 0:  # the first of the pass
            self._begin_pass(step)
        self._ranks.enter(step)

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
            self._weights.sinks(step),
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
        x = self._x.pop(step.buffer_index)
        if self._reductions is not None:
            self._reductions.output(step, x, attended)
        else:
            self._leave(step, self._layers.of(step).output(x, attended))

    # From hidden states to tokens

    def _head(self, step: Step) -> None:
        micro_batch = step.micro_batch
        x = self._hidden.take(step)
        if len(micro_batch.logit_rows) < micro_batch.rows:
            x = x[self._to_site(step, torch.tensor(micro_batch.logit_rows))]
        w = self._weights.of(step)
        shape = self._graphs.of(step)
        if shape is not None and micro_batch.samples_on_device:
            shape.run("head", lambda: self._head_static(shape, w))
            self._health.watch_cache(step, shape.kept("sums"), shape.units)
            self._health.watch_sums(step, shape.kept("head sums"))
            self._next.chosen(step, shape.kept("tokens"))
            return
        if shape is not None:
            self._health.watch_cache(step, shape.kept("sums"), shape.units)

        def head(rows: Tensor) -> Tensor:
            logits = formulas.head(ops, self._decoder, w, rows)
            self._health.watch_head(step, rows, logits)
            return logits

        self._next.head(step, head, x)

    def _head_static(self, shape: StaticDecode, w: Mapping[str, Any]) -> None:
        x = shape.kept("x")
        logits = formulas.head(ops, self._decoder, w, x)
        shape.keep("head sums", self._health.sums_of(x, logits))
        shape.keep("tokens", logits.argmax(dim=-1))

    def _sample(self, step: Step) -> None:
        shape = self._graphs.of(step) if step.micro_batch.samples_on_device else None
        self._next.sample(step, shape)

    def _to_site(self, step: Step, tensor: Tensor) -> Tensor:
        """A small host tensor where the step computes, without waiting for the device."""
        on_gpu = self._job.units[step.unit].site.tier is Tier.GPU and self._device.is_cuda
        return self._device.to_compute(tensor) if on_gpu else tensor
