"""Round-to-nearest (RTN) baseline of compressed weights: rounding in groups, in plain torch, on a transformers model.

It shares no code with the engine's kernels: what the engine's compression costs is compared with what this costs on the
same model. Formula (FlexGen paper, section 4; min-max with a zero point): of each group,
``scale = (max - min) / (2^bits - 1)`` and ``min``, both stored as float16;
``x -> min + round((x - min) / scale) * scale``, computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flexgen_bench.core.compression import Along, Compression

if TYPE_CHECKING:
    from torch import Tensor


def round_to_nearest(weight: Tensor, compression: Compression) -> Tensor:
    """What min-max quantization leaves of a matrix (out, in), in its own type; ``compression.scales`` is not looked at.

    Groups are runs of ``group_size`` inputs of one output, or outputs of one input; the last of a row may be shorter.
    """
    import torch

    across = compression.along is Along.OUTPUTS
    rows = (weight.t() if across else weight).float()
    pieces = []
    for group in rows.split(compression.group_size, dim=1):
        low, high = group.min(dim=1, keepdim=True).values, group.max(dim=1, keepdim=True).values
        low, high = low.half().float(), high.half().float()
        scale = ((high - low) / (2**compression.bits - 1)).half().float()
        codes = torch.round((group - low) / torch.where(scale > 0, scale, torch.inf))
        pieces.append(low + codes.clamp(0, 2**compression.bits - 1) * scale)
    rounded = torch.cat(pieces, dim=1).to(weight.dtype)
    return rounded.t().contiguous() if across else rounded


def matrices(model: Any, compression: Compression) -> Iterator[tuple[str, Tensor, Compression]]:
    """The weights that the engine compresses in a causal model of transformers, and how: (name, weight, compression).

    Those of all linear layers; token table and head (one, if they are tied) in 8 bits. Positions, norms and biases
    stay.
    """
    import torch

    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    yield "token table", table, compression.of_vocabulary
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not table:
            how = compression.of_vocabulary if module.weight is head else compression
            yield f"{name}.weight", module.weight, how


def apply_rtn(model: Any, compression: Compression) -> list[str]:
    """Round the weights of a model of transformers in place. Returns the names of the changed ones."""
    import torch

    changed = []
    with torch.no_grad():
        for name, weight, how in matrices(model, compression):
            weight.copy_(round_to_nearest(weight, how))
            changed.append(name)
    return changed
