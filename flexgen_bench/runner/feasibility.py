"""Whether a cell can be measured on this machine at all; if not, what it would need and what can be done here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexgen_bench.checkpoints.dummy_weights import REPEATED_FROM_BYTES
from flexgen_bench.checkpoints.prepared import is_prepared
from flexgen_bench.core.cell import CellSpec, ModelSpec, WeightSource
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.units import format_bytes
from flexgen_bench.machine import host as machine
from flexgen_bench.models.registry import family, weight_bytes

# Data sheets count a card's memory before what the driver keeps.
_CARD_SHARE = 0.93
# A process, its libraries and the page cache need their part of the memory, too.
_USABLE_SHARE = 0.85
# Of the memory that a machine is said to have, what programs may find: firmware and kernel keep some, and GB are taken
# for GiB.
_FOUND_SHARE = 0.92


@dataclass(frozen=True)
class Needs:
    """What a cell takes, in bytes. ``kv_prompt_bytes``: the KV cache of one prompt with its answer."""

    weight_bytes: int
    kv_prompt_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class Refusal:
    """``reason``: why not, and what it needs; the same each time, so that it can be recorded. ``here``: what
    this machine has at the moment and what can be done on it. ``machine``: what of the profile this machine is not, in
    words; "" if it is that machine, and something else is in the way."""

    reason: str
    here: str
    machine: str = ""

    @property
    def text(self) -> str:
        return f"{self.reason}\n{self.here}"


def needs(spec: CellSpec) -> Needs:
    """Weights as the family lists them, and the KV cache of the workload if all prompts ran at once."""
    shape, workload = spec.model.shape, spec.workload
    tokens = workload.prompt_len + workload.gen_len
    per_prompt = shape.kv_values_per_token_layer * shape.num_layers * spec.dtype.bytes * tokens
    weights = weight_bytes(shape, spec.dtype)
    return Needs(weights, per_prompt, per_prompt * workload.num_prompts)


def explain(spec: CellSpec, cache: Path, known: Sequence[ModelShape] = ()) -> Refusal | None:
    """None if the cell can be tried here; else why not, what it needs, what is here, and what to do.

    cache: where checkpoints go (its disk must hold them). known: shapes to choose a smaller model from.
    """
    reasons = machine_reasons(spec.hardware)
    wrong_machine = "; ".join(reasons)
    if not is_prepared(spec.model, spec.dtype, cache):
        need, free = disk_bytes(spec), machine.free_disk_bytes(cache)
        if need > free:
            reasons.append(f"its files need {format_bytes(need)} of free disk, more than there is")
    if not reasons:
        return None
    what, workload = needs(spec), spec.workload
    return Refusal(
        f"{spec.model.shape.name} on gpu={spec.hardware.name} cannot be measured on this machine: "
        f"{'; '.join(reasons)}.\n"
        f"It needs {format_bytes(what.weight_bytes)} for weights ({spec.dtype}) and "
        f"{format_bytes(what.kv_prompt_bytes)} of KV cache for each sequence of "
        f"{workload.prompt_len}+{workload.gen_len} tokens ({format_bytes(what.kv_bytes)} for all "
        f"{workload.num_prompts}), spread over gpu, cpu and disk."
        f"{_described(spec.hardware)}",
        f"Here: {_gpus_here()}, {format_bytes(machine.memory_bytes())} of host memory, "
        f"{format_bytes(machine.free_disk_bytes(cache))} free on the disk of {cache}.\n"
        + "\n".join(_advice(spec, cache, known, bool(wrong_machine))),
        wrong_machine,
    )


def machine_reasons(hardware: HardwareProfile) -> list[str]:
    """What of a profile this machine is not, in words; empty if it is that machine."""
    reasons = []
    if hardware.accelerator is Accelerator.CUDA:
        reasons += _gpu_reasons(hardware)
    cap = hardware.cpu_memory_bytes
    if cap is not None and _FOUND_SHARE * cap > machine.memory_bytes():
        reasons.append(f"the profile has {format_bytes(cap)} of host memory, more than there is here")
    return reasons


def _gpu_reasons(hardware: HardwareProfile) -> list[str]:
    gpus = machine.local_gpus()
    words = re.compile(rf"(?<!\w){re.escape(hardware.device_match)}(?!\w)", re.IGNORECASE)  # an L40 is no L4
    matching = [gpu for gpu in gpus if words.search(gpu.name)]
    if not gpus:
        named = f" whose name contains {hardware.device_match!r}" if hardware.device_match else ""
        return [f"there is no NVIDIA GPU{named} here"]
    if not matching:
        return [f"there is no NVIDIA GPU whose name contains {hardware.device_match!r} here"]
    if len(matching) < hardware.ranks:
        name = "count" if hardware.count > 1 else "tensor_parallel"
        return [f"gpu.{name} asks for {hardware.ranks} of them, and there {_are(len(matching))} here"]
    if not machine.torch_has_cuda():
        return ["the installed torch is a build without CUDA (the README says how to get one with)"]
    profile_bytes = hardware.gpu_memory_bytes
    sizes = [gpu.memory_bytes for gpu in matching if gpu.memory_bytes is not None]
    if profile_bytes is not None and sizes and max(sizes) < _CARD_SHARE * profile_bytes:
        return [f"the GPU here has {format_bytes(max(sizes))}, the profile {format_bytes(profile_bytes)}"]
    return []


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def disk_bytes(spec: CellSpec) -> int:
    """The checkpoint, and a second copy packed for streaming if the weights exceed what memory there is."""
    weights = weight_bytes(spec.model.shape, spec.dtype)
    hardware = spec.hardware
    memory = min(hardware.cpu_memory_bytes or machine.memory_bytes(), machine.memory_bytes())
    if hardware.accelerator is Accelerator.CUDA:
        memory += max((gpu.memory_bytes or 0 for gpu in machine.local_gpus()), default=0)
    packed = _packed_bytes(spec, weights)
    if packed <= _USABLE_SHARE * memory:
        packed = 0
    return checkpoint_bytes(spec.model, spec.dtype) + packed


def _packed_bytes(spec: CellSpec, weights: int) -> int:
    """Weights as a system keeps them: compressed if the cell says so."""
    compression = spec.lossy.weights
    if compression is None:
        return weights
    group = compression.group_size
    return weights * compression.row_bytes(group) // (group * spec.dtype.bytes)


def checkpoint_bytes(model: ModelSpec, dtype: DType) -> int:
    """Bytes of a model's checkpoint; a large dummy one holds the first layer of each kind only."""
    inventory = family(model.shape.family).inventory(model.shape)
    whole = inventory.num_values * dtype.bytes
    if model.weights is not WeightSource.DUMMY or whole < REPEATED_FROM_BYTES:
        return whole
    kinds = {tuple(t.spec for t in layer): sum(t.spec.num_values for t in layer) for layer in inventory.layers}
    repeated = sum(t.spec.num_values for layer in inventory.layers for t in layer) - sum(kinds.values())
    return whole - repeated * dtype.bytes


def _described(hardware: HardwareProfile) -> str:
    parts = {
        "GPU memory": hardware.gpu_memory_bytes,
        "host memory": hardware.cpu_memory_bytes,
        "disk": hardware.disk_bytes,
    }
    given = [f"{format_bytes(size)} of {name}" for name, size in parts.items() if size is not None]
    return f" gpu={hardware.name} stands for {', '.join(given)}." if given else ""


def _gpus_here() -> str:
    gpus = machine.local_gpus()
    if not gpus:
        return "no NVIDIA GPU"
    return ", ".join(gpu.name + (f" ({format_bytes(gpu.memory_bytes)})" if gpu.memory_bytes else "") for gpu in gpus)


def _advice(spec: CellSpec, cache: Path, known: Sequence[ModelShape], wrong_machine: bool) -> list[str]:
    free, memory = machine.free_disk_bytes(cache), machine.memory_bytes()
    shape = spec.model.shape
    weights = weight_bytes(shape, spec.dtype)
    resident = weights <= _USABLE_SHARE * memory
    need = 0 if is_prepared(spec.model, spec.dtype, cache) else disk_bytes(spec)
    lines = []
    if need <= free and wrong_machine:
        how = "in memory" if resident else f"streamed from disk (takes {format_bytes(need)} of it)"
        lines.append(f"Here you can run model={shape.name} gpu=auto: its weights fit {how}.")
    elif need > free:
        lines.append(
            f"To run model={shape.name} gpu=auto here, {format_bytes(need)} of free disk are needed (the "
            "checkpoint, and a copy packed for streaming): name a larger disk with cache_dir=/path."
        )
    fitting = {
        other.name: weight_bytes(other, spec.dtype)
        for other in known
        if other.family == shape.family and other.name != shape.name
    }
    in_memory = {n: b for n, b in fitting.items() if b <= min(_USABLE_SHARE * memory, free)}
    streamed = {n: b for n, b in fitting.items() if n not in in_memory and 2 * b <= free}
    for names, how in ((in_memory, "fits in memory"), (streamed, "can be streamed from disk")):
        smaller = {n: b for n, b in names.items() if b < weights}
        if smaller:
            name = max(smaller, key=lambda n: smaller[n])
            lines.append(
                f"The largest {shape.family} model that {how} here is {name} "
                f"({format_bytes(smaller[name])}): model={name} gpu=auto."
            )
    return lines
