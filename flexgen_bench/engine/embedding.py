"""From tokens to the first hidden states, wherever the tables lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.decode_graphs import DecodeGraphs
from flexgen_bench.engine.device import Device, crossing
from flexgen_bench.engine.next_tokens import TokenHome
from flexgen_bench.engine.prompts import Prompts
from flexgen_bench.engine.static_decode import StaticDecode
from flexgen_bench.engine.weights import Weights
from flexgen_bench.kernels import ops
from flexgen_bench.models import formulas
from flexgen_bench.models.parts import Decoder
from flexgen_bench.schedule.micro_batch import Member
from flexgen_bench.schedule.scheduled_job import ScheduledJob
from flexgen_bench.schedule.steps import Step


class Embedding:
    """Carries out the steps before the first layer. tokens: of a member, those to feed, one per row; home: where new
    tokens lie that stay on the accelerator, None if they do not."""

    def __init__(
        self,
        job: ScheduledJob,
        decoder: Decoder,
        weights: Weights,
        prompts: Prompts,
        device: Device,
        graphs: DecodeGraphs,
        tokens: Callable[[Member], Sequence[int]],
        home: TokenHome | None,
    ) -> None:
        self._job, self._decoder, self._weights, self._prompts = job, decoder, weights, prompts
        self._device, self._graphs, self._tokens, self._home = device, graphs, tokens, home
        # By staging buffer; the step that is the last to use them takes them out.
        self._rows: dict[int, Mapping[str, Tensor]] = {}
        self._gpu_rows: dict[int, Mapping[str, Tensor]] = {}

    def clear(self) -> None:
        """Let go of everything: the job is over."""
        self._rows.clear()
        self._gpu_rows.clear()
        self._home = None

    def gather_rows(self, step: Step) -> None:
        """GATHER_ROWS: on the host, from memory or disk."""
        moves = self._device.is_cuda and self._job.units[step.unit].site.is_accelerator
        self._rows[step.buffer_index] = {
            name: self._weights.rows(name, index, pinned=moves) for name, index in self._indices(step).items()
        }

    def move_rows(self, step: Step) -> None:
        """MOVE_ROWS: to the accelerator."""
        self._gpu_rows[step.buffer_index] = {
            name: self._device.to_compute(rows) for name, rows in self._rows.pop(step.buffer_index).items()
        }

    def embed(self, step: Step) -> Tensor:
        """EMBED: hidden states (N, hidden) of all rows."""
        unit = self._job.units[step.unit]
        shape = self._graphs.begin(step)
        if shape is not None:
            shape.run("embed", lambda: self._static(step, shape))
            return shape.kept("x")
        if unit.tier is unit.site.tier:
            indices = self._indices(step)
            rows = {name: self._weights.rows(name, self._to_site(step, index)) for name, index in indices.items()}
        else:
            gathered = self._gpu_rows if unit.site.is_accelerator else self._rows
            rows = {name: crossing(r) for name, r in gathered.pop(step.buffer_index).items()}
        return formulas.embed(ops, self._decoder, self._weights.of(step), rows)

    def _static(self, step: Step, shape: StaticDecode) -> None:
        """The same of what is on the accelerator, and what all layers share."""
        assert self._home is not None
        shape.count_on()
        if shape.where is None:  # in the first pass, which is not recorded
            shape.where = self._home.where(step)
        indices = formulas.rows(self._decoder, self._home.get(shape.where), shape.positions)
        rows = {name: self._weights.rows(name, index) for name, index in indices.items()}
        x = shape.keep("x", formulas.embed(ops, self._decoder, self._weights.of(step), rows))
        shape.keep_angles(formulas.angles(ops, self._decoder, shape.positions, shape.positions + 1, x))

    def _indices(self, step: Step) -> Mapping[str, Tensor]:
        micro_batch = step.micro_batch
        if self._home is not None and not micro_batch.is_prefill:
            tokens = self._home.get(self._home.where(step))
        else:
            tokens = torch.tensor([t for member in micro_batch.members for t in self._tokens(member)])
        return formulas.rows(self._decoder, tokens, self._prompts.positions(micro_batch))

    def _to_site(self, step: Step, tensor: Tensor) -> Tensor:
        """A small tensor where the step computes, without waiting for the device."""
        on_gpu = self._job.units[step.unit].site.tier is Tier.GPU and self._device.is_cuda
        return self._device.to_compute(tensor) if on_gpu and not tensor.is_cuda else tensor
