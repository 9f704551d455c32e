"""What the host does for each layer and micro-batch: operators, kernels and Python calls, counted.

Tiny models on the emulated accelerator, told to issue what it would issue to a GPU (``Device.launches_kernels``).
Counts do not depend on the machine; they do on the version of torch.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.instructions import NATIVE_SWITCH
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.units import GB, GIB
from flexgen_bench.engine import lane as lane_module
from flexgen_bench.engine import resident_cache
from flexgen_bench.engine.actions import Actions
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.kernels import quantization
from flexgen_bench.kernels.packed_cache import PackedKernels
from flexgen_bench.schedule.steps import Step, StepKind

LAYERS, PROMPTS, BATCH, PROMPT_LEN, GEN_LEN = 6, 8, 4, 24, 12
GPU, CPU, HALF = Placement(gpu=1), Placement(cpu=1), Placement(gpu=0.5, cpu=0.5)
FOUR = Compression(4)
MACHINE = HardwareProfile(
    "emulated", Accelerator.EMULATED, gpu_memory_bytes=GIB, links={"h2d": 100 * GB, "d2h": 100 * GB}
)
# Operators of torch that make a view, or memory without anything in it, or ask for something that is known.
VIEWS = frozenset(
    {
        "view",
        "slice",
        "select",
        "transpose",
        "unbind",
        "as_strided",
        "expand",
        "t",
        "unsqueeze",
        "squeeze",
        "detach",
        "alias",
        "split",
        "split_with_sizes",
        "chunk",
        "empty",
        "empty_like",
        "new_empty",
        "unflatten",
        "permute",
        "empty_strided",
        "flatten",
        "narrow",
        "is_pinned",
        "item",
        "_local_scalar_dense",
        "_unsafe_view",
        "is_nonzero",
        "lift_fresh",
        "detach_",
        "resolve_conj",
        "resolve_neg",
    }
)
# Those that are a kernel only if what they are asked for is not there yet.
_COPY_IF_NEEDED = frozenset({"reshape", "contiguous", "to", "_to_copy"})
# Steps that belong to a layer and a micro-batch.
OF_A_LAYER = frozenset(
    {
        StepKind.PROJECT,
        StepKind.ATTEND,
        StepKind.OUTPUT,
        StepKind.LAYER,
        StepKind.LOAD_KV,
        StepKind.STORE_KV,
        StepKind.APPEND_KV,
        StepKind.MOVE_QKV,
        StepKind.MOVE_ATTENTION,
        StepKind.LOAD_EXPERTS,
        StepKind.MOVE_ROUTED,
        StepKind.EXPERTS,
        StepKind.MOVE_EXPERTS,
        StepKind.ADD_EXPERTS,
        StepKind.LOAD_HIDDEN,
        StepKind.STORE_HIDDEN,
    }
)


@dataclass(frozen=True)
class Case:
    """A kind of policy. ragged: prompts of different lengths."""

    policy: Policy
    ragged: bool = False


def _case(ragged: bool = False, **changes: Any) -> Case:
    placed = {"weights": GPU, "kv_cache": GPU, "activations": GPU} | changes
    return Case(Policy(BATCH, PROMPTS // BATCH, **placed), ragged)


CASES: dict[str, Case] = {
    "resident": _case(),
    "resident, ragged prompts": _case(ragged=True),
    "weights moved": _case(weights=CPU),
    "half of the weights moved": _case(weights=HALF),
    "KV moved": _case(kv_cache=CPU),
    "half of the KV moved": _case(kv_cache=HALF),
    "half of the KV, attended by the cpu": _case(kv_cache=HALF, attention=AttentionSite.CPU),
    "4-bit weights": _case(lossy=Lossy(weights=FOUR)),
    "4-bit KV": _case(lossy=Lossy(kv_cache=FOUR)),
}
# Of a mixture, whose layers are one step (two with their experts apart) and a call of every expert that is touched.
MIXTURES: dict[str, Case] = {
    "mixture, resident": _case(),
    "mixture, experts moved": _case(experts=CPU),
    "mixture, experts in place": _case(experts=CPU, offloaded=Offloaded.IN_PLACE),
}


@dataclass
class Counts:
    """Of one phase. per_layer: steps, operators, kernels, Python calls of a layer and micro-batch; per_pass: the same
    of a layer's steps that belong to no micro-batch (loading and unpacking weights), per layer; names: how often each
    kernel is launched per layer."""

    per_layer: dict[str, float] = field(default_factory=dict)
    per_pass: dict[str, float] = field(default_factory=dict)
    names: dict[str, float] = field(default_factory=dict)


def tiny_opt(wide: bool = True) -> ModelShape:
    """An OPT small enough that launching would take longer than computing. wide: heads of 128, as large models have."""
    hidden, ffn = (256, 1024) if wide else (64, 128)
    return ModelShape(
        name=f"host-cost-{hidden}",
        family="opt",
        num_layers=LAYERS,
        hidden_size=hidden,
        num_heads=2,
        num_kv_heads=2,
        head_dim=hidden // 2,
        ffn_size=ffn,
        vocab_size=512,
        max_positions=256,
        tied_embeddings=True,
    )


def tiny_llama() -> ModelShape:
    """The same with rotary positions and two query heads to a KV head."""
    return ModelShape(
        name="host-cost-llama",
        family="llama",
        num_layers=LAYERS,
        hidden_size=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        ffn_size=512,
        vocab_size=512,
        max_positions=256,
        tied_embeddings=True,
    )


def tiny_mixture() -> ModelShape:
    """The Llama with four experts, of which a token goes to two."""
    options = {"experts": 4, "experts_per_token": 2}
    return replace(tiny_llama(), name="host-cost-mixture", family="mixtral", options=options)


def count(case: Case, shape: ModelShape, folder: Path) -> dict[str, Counts]:
    """``prefill`` and ``decode`` of a case."""
    meter = _Meter()
    for watching in (meter.operators, meter.python_calls):
        run(case, shape, folder, watching)
    return {phase: meter.counts(phase) for phase in ("prefill", "decode")}


def run(
    case: Case,
    shape: ModelShape,
    folder: Path,
    watching: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    dtype: DType = DType.FLOAT16,
) -> None:
    """Two jobs of a case, issued as to a GPU, the second one ``watching``: the first makes what a model needs once.
    folder: for the checkpoint and its packed store, made once."""
    checkpoint = prepare_checkpoint(ModelSpec(shape), dtype, folder, lambda *_: None)
    packed = PackedWeights.from_checkpoint(checkpoint, dtype, folder, compression=case.policy.lossy.weights)
    rng = random.Random(0)
    lengths = [PROMPT_LEN - 3 * (i % 3) * case.ragged for i in range(PROMPTS)]
    prompts = [[rng.randrange(4, shape.vocab_size) for _ in range(n)] for n in lengths]
    with as_on_a_gpu():
        engine = packed.engine(case.policy, Device.open(MACHINE, 1), folder / "offload")
        try:
            for watched in (contextlib.nullcontext, watching):
                with watched():
                    engine.generate(to_full_length(prompts, SamplingParams(max_tokens=GEN_LEN)))
        finally:
            engine.close()


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """What a GPU would be given: few operators per layer, no kernels for processors, and one operator for each Triton
    kernel."""

    def one_kernel(codes: Tensor, params: Tensor, out: Tensor, compression: Compression) -> None:
        out.zero_()

    def append(k: Tensor, v: Tensor, codes: Tensor, params: Tensor, compression: object) -> None:
        params.zero_()

    def attend(q: Tensor, *others: object) -> Tensor:
        return q.new_zeros(q.shape[0], q.shape[1] * q.shape[2])

    def kernels(device: object, compression: object, dtype: object) -> PackedKernels:
        return PackedKernels(append, attend)

    with (
        mock.patch.dict(os.environ, {NATIVE_SWITCH: "0"}),
        mock.patch.object(resident_cache, "packed_kernels", kernels),
        mock.patch.object(Device, "launches_kernels", True),
        mock.patch.object(quantization, "_dequantize_rows", one_kernel),
    ):
        yield


class _Meter:
    """Watches every step that lanes carry out. Lanes are threads: each has its own present step."""

    def __init__(self) -> None:
        self._now = threading.local()
        self._operators: dict[tuple[str, Any], Counter[str]] = {}
        self._calls: Counter[tuple[str, Any]] = Counter()
        self._steps: Counter[tuple[str, Any]] = Counter()
        self._batches: Counter[str] = Counter()  # layers times micro-batches
        self._guard = threading.Lock()

    @contextlib.contextmanager
    def operators(self) -> Iterator[None]:
        meter, act = self, Actions.act

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                counted = getattr(meter._now, "counted", None)
                if counted is not None:
                    name, launches = _kernels(func, args, out)
                    counted["operators"] += 1
                    counted["kernels"] += launches
                    if launches:
                        counted[f"kernel {name}"] += launches
                return out

        def inside(actions: Actions, step: Step, counted: Counter[str]) -> None:
            meter._now.counted = counted
            act(actions, step)
            meter._now.counted = None

        def context(worker: lane_module.LaneWorker) -> Mode:
            return Mode()  # type: ignore[no-untyped-call]

        with mock.patch.object(lane_module.LaneWorker, "_context", context), self._watching(inside):
            yield

    @contextlib.contextmanager
    def python_calls(self) -> Iterator[None]:
        act = Actions.act

        def inside(actions: Actions, step: Step, counted: Counter[str]) -> None:
            number = -1  # switching this off is none of them

            def on_event(frame: object, event: str, argument: object) -> None:
                nonlocal number
                number += event in ("call", "c_call")

            sys.setprofile(on_event)
            try:
                act(actions, step)
            finally:
                sys.setprofile(None)
            counted["calls"] += number

        with self._watching(inside):
            yield

    def counts(self, phase: str) -> Counts:
        averages = Counts()
        batches = self._batches[phase]
        for (of, kind), counted in self._operators.items():
            steps = counted["steps"]
            if of == phase and kind in OF_A_LAYER:
                for name in ("steps", "operators", "kernels", "calls"):
                    averages.per_layer[name] = averages.per_layer.get(name, 0) + counted[name] / batches
                for name, number in counted.items():
                    if name.startswith("kernel "):
                        short = name.removeprefix("kernel ")
                        averages.names[short] = averages.names.get(short, 0) + number / batches
            elif kind in (StepKind.LOAD_WEIGHTS, StepKind.DEQUANTIZE):
                for name in ("operators", "kernels", "calls"):
                    averages.per_pass[name] = averages.per_pass.get(name, 0) + counted[name] / steps
        return averages

    @contextlib.contextmanager
    def _watching(self, inside: Callable[..., None]) -> Iterator[None]:
        meter, counts_steps = self, not self._operators

        def watched(self: Actions, step: Step) -> None:
            phase = "" if step.on_weights else "prefill" if step.micro_batch.is_prefill else "decode"
            with meter._guard:
                counted = meter._operators.setdefault((phase, step.kind), Counter())
                if counts_steps:
                    counted["steps"] += 1
                    meter._batches[phase] += step.kind in (StepKind.LAYER, StepKind.PROJECT)
            inside(self, step, counted)

        with mock.patch.object(Actions, "act", watched):
            yield


def count_kernels(func: Any, args: Any, out: Any) -> int:
    """Kernels that CUDA would launch for an operator."""
    return _kernels(func, args, out)[1]


def _kernels(func: Any, args: Any, out: Any) -> tuple[str, int]:
    """(operator, kernels that CUDA would launch for it)."""
    name = func._schema.name.split("::")[1]
    if name in VIEWS:
        return name, 0
    if name in _COPY_IF_NEEDED:
        return name, int(not _same_memory(args[0], out))
    # A matrix that is added to is copied first; a bias goes into the product's epilogue.
    return name, 2 if name == "addmm" and args[0].dim() == 2 else 1


def _same_memory(a: Any, b: Any) -> bool:
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
