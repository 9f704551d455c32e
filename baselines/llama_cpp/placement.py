"""How many layers a GPU holds (``n_gpu_layers``); the rest is computed by the cpu, where its weights are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from baselines.llama_cpp.layout import plan
from baselines.llama_cpp.settings import Load, Settings, footprint, kv_bytes
from flexgen_bench.core.model import ModelShape


@dataclass(frozen=True)
class Weights:
    """bytes, and values (for each of which a row takes two FLOP)."""

    bytes: int = 0
    values: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.bytes + other.bytes, self.values + other.values)


@dataclass(frozen=True)
class Divided:
    """Weights of each layer, of the head (which llama.cpp counts as one layer more; a tied one is a copy of the table
    on a GPU, and the table itself elsewhere), and of the token table, which stays with the cpu."""

    layers: tuple[Weights, ...]
    head: Weights
    table: Weights


def divided(shape: ModelShape, settings: Settings) -> Divided:
    """A model's weights by where they can be placed apart."""
    layers = [Weights()] * shape.num_layers
    head = table = Weights()
    for tensor in plan(shape, settings.format):
        weights = Weights(tensor.nbytes, math.prod(tensor.shape))
        if tensor.layer is not None:
            layers[tensor.layer] += weights
        elif tensor.name.startswith("token_embd"):
            table += weights
        else:
            head += weights
    return Divided(tuple(layers), head + table if shape.tied_embeddings else head, table)


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
    weights = divided(shape, settings)
    cache = kv_bytes(shape, settings, batch, tokens) / shape.num_layers
    yield weights.head.bytes
    yield from (layer.bytes + cache for layer in reversed(weights.layers))
