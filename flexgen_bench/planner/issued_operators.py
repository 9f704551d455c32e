"""How many operators the engine issues to an accelerator for a step: what the host's time for it is told by.

The numbers are counted, on a tiny OPT, a tiny Llama and a tiny mixture told to issue what they would to a GPU
(``benchmarks/host_counts.py``), and ``tests/engine/test_host_operators.py`` holds them to what the engine does: nothing
else in the planner says how many there are. Views count, as each of them is issued by Python, too. They are those of
equally long prompts.
"""

from __future__ import annotations

import math

from flexgen_bench.core.tiers import Tier
from flexgen_bench.models.parts import MLP, Decoder, Layer
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.schedule.steps import Step, StepKind

# In a pass over prompts, and over later tokens.
_EMBED = (25, 22)
_EMBED_MOVED = (1, 1)  # of rows that were gathered on the host
_POSITIONS = 10  # of these, for a table of learned positions
_HEAD = (11, 8)
_PROJECT = 4
# In the first layer of a pass, which makes what all of them share: for later tokens; for prompts, and for each of them.
_FIRST_PROJECT = 9
_POSITIONS_OF_PROMPT = 4
_ROTARY = 9  # more of a projection with rotary positions and the norm that goes with them
_OUTPUT = 6
_GATED = 1
# Of a mixture: to choose experts (by a softmax), to sort tokens by them, and for each expert that is touched.
_ROUTE, _SORT, _EXPERT = 5, 11, 11
# Attention over the first part of a cache, and over every further one: plain, and packed.
_PROMPT_ATTENTION = {False: (32, 15), True: (154, 28)}
_FUSED_LAYER = {False: (16, 10), True: (13, 7)}
_FIRST_FUSED_LAYER = {False: (34, 23), True: (32, 20)}
# To one part of a cache in segments: where it is attended to, and moved there.
_SEGMENTS = {False: (56, 91), True: (192, 254)}
_STORE_TOKEN = {False: 4, True: 8}
# Whatever is computed.
_OTHERS = {
    StepKind.LOAD_WEIGHTS: 4,
    StepKind.DEQUANTIZE: 29,
    StepKind.MOVE_ROWS: 2,
    StepKind.LOAD_HIDDEN: 6,
    StepKind.STORE_HIDDEN: 7,
    StepKind.MOVE_QKV: 7,
    StepKind.LOAD_KV: 3,
    StepKind.MOVE_ATTENTION: 1,
    StepKind.MOVE_LOGITS: 2,
    StepKind.SAMPLE: 4,
    StepKind.MOVE_TOKENS: 2,
    StepKind.LOAD_EXPERTS: 4,
    StepKind.MOVE_ROUTED: 6,
    StepKind.MOVE_EXPERTS: 1,
    StepKind.ADD_EXPERTS: 1,
    # Between ranks: views and a copy. Counted by reading, not run on a device.
    StepKind.MOVE_RECEIVED: 2,
    StepKind.ENTER: 2,
    StepKind.LEAVE: 3,
    StepKind.MOVE_LEAVING: 3,
    # Of layers that ranks share, in the same way.
    StepKind.MOVE_PARTIAL: 2,
    StepKind.MOVE_REDUCED: 2,
    StepKind.ADD: 1,
}


class IssuedOperators:
    """Of the steps of a planned job that run on an accelerator's lanes."""

    def __init__(self, plan: MemoryPlan) -> None:
        lossy = plan.policy.lossy
        self._units, self._decoder = plan.job.units, plan.model.decoder
        self._first = plan.job.first_layer
        self._packed = lossy.kv_cache is not None
        self._fused = lossy.value_share == 1 and _has_plain_attention(self._decoder)

    def of(self, step: Step) -> int:
        """Operators of a step on a lane of an accelerator."""
        known = _OTHERS.get(step.kind)
        if known is not None:
            return known
        later = not step.micro_batch.is_prefill
        of_any = {StepKind.HEAD: _HEAD[later], StepKind.STORE_KV: _STORE_TOKEN[self._packed and later]}
        if step.kind in of_any:
            return of_any[step.kind]
        if step.kind is StepKind.EXPERTS:
            return self._experts(step)
        return self._embed(step, later) if step.kind is StepKind.EMBED else self._of_a_layer(step, later)

    def _of_a_layer(self, step: Step, later: bool) -> int:
        layer = self._decoder.layers[step.unit - 1]
        further = max(0, len(step.micro_batch.kv_parts) - 1)
        if step.kind is StepKind.PROJECT:
            return _project(layer, self._is_first(step), step.micro_batch.sequences if not later else 0)
        if step.kind is StepKind.MLP:
            return self._output(step)
        if step.kind is StepKind.OUTPUT and self._units[step.unit].sums > 1:
            return 1 + later * further
        if step.kind is StepKind.OUTPUT:
            return self._output(step) + later * further
        if step.kind is StepKind.LAYER:
            return self._layer(step, further, self._is_first(step))
        assert step.kind is StepKind.ATTEND, f"a step of kind {step.kind} runs on no lane of an accelerator"
        return self._attend(step, later, further)

    def _is_first(self, step: Step) -> bool:
        """Whether it makes what a pass' layers share. The only layer of a model stands for all, of which few do."""
        return step.unit == self._first and len(self._decoder.layers) > 1

    def _embed(self, step: Step, later: bool) -> int:
        unit = self._units[step.unit]
        if unit.tier is not unit.site.tier:
            return _EMBED_MOVED[later]
        return _EMBED[later] - (0 if self._decoder.embedding.positions else _POSITIONS)

    def _layer(self, step: Step, further: int, is_first: bool) -> int:
        layer, output = self._decoder.layers[step.unit - 1], self._output(step)
        if self._fused:
            first, each = (_FIRST_FUSED_LAYER if is_first else _FUSED_LAYER)[self._packed]
            return first + further * each + _rotary(layer) + output - _OUTPUT
        return _project(layer, is_first, 0) + output + (1 + further) * _SEGMENTS[self._packed][False]

    def _output(self, step: Step) -> int:
        mlp = self._decoder.layers[step.unit - 1].mlp
        if isinstance(mlp, MLP):
            return _OUTPUT + (_GATED if mlp.gated else 0)
        return _OUTPUT + _ROUTE + (0 if self._units[step.unit].companion >= 0 else self._experts(step))

    def _experts(self, step: Step) -> int:
        return _SORT + math.ceil(_EXPERT * self._units[step.unit].touched(step.micro_batch.rows))

    def _attend(self, step: Step, later: bool, further: int) -> int:
        if not later:
            first, each = _PROMPT_ATTENTION[self._packed]
            return first + further * each
        moved = step.micro_batch.kv_parts[step.part].tier is not Tier.GPU
        return _SEGMENTS[self._packed][moved]


def _has_plain_attention(decoder: Decoder) -> bool:
    """Whether one kernel attends for every layer: scores are scaled alike and not changed otherwise."""
    kinds = [layer.attention for layer in decoder.kinds]
    return all(kind.mod.is_none for kind in kinds) and len({kind.scale for kind in kinds}) == 1


def _project(layer: Layer, is_first: bool, prompts: int) -> int:
    return (_FIRST_PROJECT + _POSITIONS_OF_PROMPT * prompts if is_first else _PROJECT) + _rotary(layer)


def _rotary(layer: Layer) -> int:
    return 0 if layer.attention.rotary is None else _ROTARY
