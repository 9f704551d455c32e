"""Where Accelerate puts which part of a model, as its device maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.units import MIB

DeviceMap = dict[str, str | int]


def empty_model(checkpoint: Path, dtype: torch.dtype) -> Any:
    """The model of a checkpoint on the meta device: shapes without numbers."""
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def layer_names(model: Any) -> list[str]:
    """The transformer layers, found by the classes that the model says must not be split."""
    classes = set(model._no_split_modules or ())
    names = [name for name, module in model.named_modules() if type(module).__name__ in classes]
    # A layer inside another one moves with it.
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def layers_on(model: Any, tier: str, rest: str | int) -> DeviceMap:
    """All transformer layers on ``tier``, everything else (embeddings, norms, head) on ``rest``."""
    layers = layer_names(model)
    placed: DeviceMap = dict.fromkeys(layers, tier)
    for name, module in model.named_modules():
        inside = any(name == layer or name.startswith(f"{layer}.") for layer in layers)
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not inside:
            placed[name] = rest
    return placed


def cpu_budget_bytes(spec: CellSpec, batch_size: int, model: Any) -> int:
    """Host memory that resident weights may take: what the cell has, less what running needs.

    Set aside: this process as it is, the KV cache, two streamed layers, activations of the widest step
    (four copies of the MLP's and three of the logits, float32), and a margin. Never below zero.
    """
    have = spec.hardware.cpu_memory_bytes or psutil.virtual_memory().available
    shape, workload = spec.model.shape, spec.workload
    tokens = batch_size * (workload.prompt_len + workload.gen_len)
    kv_cache = tokens * shape.kv_values_per_token_layer * (shape.num_layers + 1) * spec.dtype.bytes
    if spec.hardware.accelerator.value == "cuda":
        kv_cache = activations = 0  # on the device
    else:
        widest = max(shape.ffn_size, 3 * shape.hidden_size)
        activations = 4 * batch_size * workload.prompt_len * widest * spec.dtype.bytes
        activations += 3 * batch_size * shape.vocab_size * 4
    sizes = [_bytes(model.get_submodule(name)) for name in layer_names(model)]
    reserve = psutil.Process().memory_info().rss + kv_cache + activations
    return max(0, have - reserve - 2 * max(sizes) - 192 * MIB)


def gpu_budget_bytes(spec: CellSpec, batch_size: int) -> int:
    """GPU memory that resident weights may take: what the cell has, less KV cache and activations."""
    have = spec.hardware.gpu_memory_bytes or torch.cuda.get_device_properties(0).total_memory
    shape, workload = spec.model.shape, spec.workload
    tokens = batch_size * (workload.prompt_len + workload.gen_len)
    kv_cache = tokens * shape.kv_values_per_token_layer * (shape.num_layers + 1) * spec.dtype.bytes
    widest = max(shape.ffn_size, 3 * shape.hidden_size)
    activations = 4 * batch_size * workload.prompt_len * widest * spec.dtype.bytes
    activations += 3 * batch_size * shape.vocab_size * 4
    return max(0, have - kv_cache - activations - 1024 * MIB)


def tier_of(name: str, device_map: Mapping[str, Any]) -> str:
    """The tier of a parameter under a device map: that of its longest prefix in the map."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        place = device_map.get(".".join(parts[:length]))
        if place is not None:
            return str(place) if str(place) in ("cpu", "disk") else "gpu"
    raise KeyError(f"{name} is in no part of the device map")


def _bytes(module: Any) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
