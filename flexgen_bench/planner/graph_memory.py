"""What recorded decode passes take on an accelerator beside a plan. They are recorded only if it is free: no policy is
chosen or refused because of them."""

from __future__ import annotations

from flexgen_bench.core.units import MIB
from flexgen_bench.planner.memory_plan import MemoryPlan

# Shapes that are kept at once: micro-batches of a block, each with the graph of its present number of tokens.
MAX_SHAPES = 64
# Of a recorded node (one kernel), on the device. A guess: what a driver takes was not measured.
NODE_BYTES = 1024
_NODES_PER_LAYER = 24
_FEWEST_BYTES = 64 * MIB  # torch's allocator takes a pool's memory in pieces


def graph_bytes(plan: MemoryPlan) -> int:
    """At most, on the accelerator: one pool for the temporaries of a decode step, which all graphs share; of every
    shape its masks, hidden states and tables of angles; and the graphs themselves."""
    decoder, width = plan.model.decoder, plan.model.dtype.bytes
    groups, layers = plan.groups, plan.model.shape.num_layers
    rows = min(plan.policy.gpu_batch_size, sum(kv_slot.size for kv_slot in groups.kv_slots))
    tokens = max(r.prompt_len for r in groups.requests) + groups.lifetime
    per_token = max(layer.temporaries for layer in decoder.kinds)
    # Scores, in case torch has no fused kernel for a mask, and logits as in the plan's workspace.
    pool = rows * (per_token * width + tokens * plan.model.shape.num_heads * (4 + width))
    pool += rows * decoder.vocab * (width + 4)
    shape = rows * (2 * tokens * width + decoder.hidden * width + 4 * plan.model.shape.head_dim * width + 64)
    shape += layers * (_NODES_PER_LAYER * NODE_BYTES + 8)
    return max(pool, _FEWEST_BYTES) + MAX_SHAPES * shape
