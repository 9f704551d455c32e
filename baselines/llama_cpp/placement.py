"""How many layers a GPU holds (``n_gpu_layers``); the rest is computed by the cpu, where its weights are."""

from __future__ import annotations

from collections.abc import Iterator

from baselines.llama_cpp.layout import plan
from baselines.llama_cpp.settings import Load, Settings, footprint, kv_bytes
from flexgen_bench.core.model import ModelShape


def layer_bytes(shape: ModelShape, settings: Settings) -> tuple[list[int], int, int]:
    """Weights of each layer, of the head (which llama.cpp counts as one layer more), and of the token table, which
    stays with the cpu. A tied head is a copy of the table."""
    layers, head, table = [0] * shape.num_layers, 0, 0
    for tensor in plan(shape, settings.format):
        if tensor.layer is not None:
            layers[tensor.layer] += tensor.nbytes
        elif tensor.name.startswith("token_embd"):
            table += tensor.nbytes
        else:
            head += tensor.nbytes
    return layers, head + (table if shape.tied_embeddings else 0), table


def gpu_layers(
    shape: ModelShape, settings: Settings, load: Load, batch: int, tokens: int, memory_bytes: float | None
) -> int:
    """The number asked for, or as many as fit with their caches and a pass's workspace, counted from the last one as
    llama.cpp does; ``num_layers`` + 1 is all of them and the head. memory_bytes: what a process finds of the GPU's;
    None: enough."""
    most = shape.num_layers + 1
    if settings.gpu_layers is not None:
        return min(settings.gpu_layers, most)
    if memory_bytes is None:
        return most
    workspace = footprint(shape, settings, load, batch, tokens).workspace
    left, count = memory_bytes - workspace, 0
    for need in _needs(shape, settings, batch, tokens):
        left -= need
        if left < 0:
            break
        count += 1
    return count


def _needs(shape: ModelShape, settings: Settings, batch: int, tokens: int) -> Iterator[float]:
    layers, head, _ = layer_bytes(shape, settings)
    cache = kv_bytes(shape, settings, batch, tokens) / shape.num_layers
    yield head
    yield from (weights + cache for weights in reversed(layers))
