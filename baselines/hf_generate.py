"""What the baselines built on transformers share: batched greedy generation with phase times, and memory facts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria

from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.hardware import Accelerator
from flexgen_bench.core.progress import Progress
from flexgen_bench.core.status import Status
from flexgen_bench.core.units import format_bytes
from flexgen_bench.models.registry import weight_bytes
from flexgen_bench.systems.contract import Generation

PAD = 0  # any token will do: padding is masked out


def compute_device(spec: CellSpec) -> torch.device:
    """Where the cell computes."""
    if spec.hardware.accelerator is not Accelerator.CUDA:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise CannotRun("torch finds no CUDA device here")
    return torch.device("cuda", 0)


def torch_dtype(spec: CellSpec) -> torch.dtype:
    dtype = getattr(torch, spec.dtype.value)
    assert isinstance(dtype, torch.dtype)
    return dtype


def check_weights_fit(spec: CellSpec, checkpoint: Path, holder: str) -> None:
    """Raise CannotRun (out of memory) if the weights alone are larger than the cell's host memory.

    Without this a memory-mapped checkpoint would be paged in and out, which is not "resident" any more.
    """
    # A large dummy checkpoint is smaller than what it becomes in memory: its layers share their numbers on disk.
    need = max(checkpoint_bytes(checkpoint), weight_bytes(spec.model.shape, spec.dtype))
    limit = spec.hardware.cpu_memory_bytes
    if limit is not None and need > limit:
        raise CannotRun(
            f"{holder} keeps all weights in memory: {format_bytes(need)}, more than the "
            f"{format_bytes(limit)} of this cell",
            Status.OOM,
        )


def checkpoint_bytes(checkpoint: Path) -> int:
    """Size of the weight files of a checkpoint."""
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def prepare_model(model: Any) -> Any:
    """Evaluation mode, and none of the checkpoint's own ideas about sampling or where to stop."""
    model.eval()
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=PAD, use_cache=True)
    return model


def load_model(checkpoint: Path, dtype: torch.dtype, **options: Any) -> Any:
    """A causal language model from a checkpoint folder; never code from it, never the network."""
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, local_files_only=True, trust_remote_code=False, **options
    )


def make_resident(model: Any) -> None:
    """Copy every parameter on the cpu into memory of its own.

    transformers maps the checkpoint file, so that until then "loaded" weights are file pages which the
    kernel reads when they are used and may drop again. Tied weights stay tied: they are one Parameter.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


@torch.inference_mode()
def generate_batches(
    model: Any,
    prompts: Sequence[Sequence[int]],
    gen_len: int,
    *,
    batch_size: int,
    device: torch.device,
    progress: Progress,
) -> Generation:
    """Greedily generate ``gen_len`` tokens per prompt in batches, shorter prompts padded on the left.

    Prompts of similar length go together, to pad little; the answer is in the order asked.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    clock = _Clock(device, progress, prompts, gen_len)
    answers: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        ids, mask = padded([prompts[i] for i in members], left=True)
        clock.begin(members)
        output = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=gen_len,
            min_new_tokens=gen_len,
            stopping_criteria=[clock],
        )
        clock.end()
        new = output[:, ids.shape[1] :].tolist()
        answers |= {i: tuple(tokens) for i, tokens in zip(members, new, strict=True)}
    return Generation(
        token_ids=tuple(answers[i] for i in range(len(prompts))), prefill_s=clock.prefill_s, decode_s=clock.decode_s
    )


def padded(prompts: Sequence[Sequence[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (B, T): padding on the left, or on the right."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), PAD, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = length - len(prompt) if left else 0
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    return ids, mask


class _Clock(StoppingCriteria):
    """Called by ``generate`` after every token it has chosen for a batch; never stops it."""

    def __init__(
        self, device: torch.device, progress: Progress, prompts: Sequence[Sequence[int]], gen_len: int
    ) -> None:
        self._device, self._progress, self._prompts = device, progress, prompts
        self._prompt_tokens = sum(len(prompt) for prompt in prompts)
        self._decode_tokens = len(prompts) * (gen_len - 1)
        self._prefilled = self._decoded = 0
        self._members: Sequence[int] = ()
        self._start_s = 0.0
        self._first_s: float | None = None
        self.prefill_s = self.decode_s = 0.0

    def begin(self, members: Sequence[int]) -> None:
        self._members, self._first_s = members, None
        self._start_s = self._now()

    def end(self) -> None:
        assert self._first_s is not None
        self.decode_s += self._now() - self._first_s

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self._first_s is None:
            self._first_s = self._now()
            self.prefill_s += self._first_s - self._start_s
            self._prefilled += sum(len(self._prompts[i]) for i in self._members)
            self._progress("prefill", self._prefilled, self._prompt_tokens)
        else:
            self._decoded += len(self._members)
            self._progress("decode", self._decoded, self._decode_tokens)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def bytes_per_tier(sizes: Iterator[tuple[str, int]], tier_of: Callable[[str], str]) -> dict[str, int]:
    """Total of (parameter name, bytes) pairs by the tier that ``tier_of`` gives for a name."""
    totals: dict[str, int] = {}
    for name, size in sizes:
        totals[tier_of(name)] = totals.get(tier_of(name), 0) + size
    return totals


def parameter_sizes(model: Any) -> Iterator[tuple[str, int]]:
    """Name and bytes of every parameter, tied ones once; those on the meta device too."""
    for name, parameter in model.named_parameters():
        yield name, parameter.numel() * parameter.element_size()


def shares(totals: Mapping[str, int]) -> dict[str, float]:
    """Bytes per tier as shares of their sum."""
    whole = sum(totals.values())
    return {tier: round(size / whole, 6) for tier, size in totals.items()}


def peak_gpu_bytes(device: torch.device) -> dict[str, int]:
    """Peak bytes that torch has allocated on the GPU, as a report wants it; empty on the cpu."""
    if device.type != "cuda":
        return {}
    return {"gpu": int(torch.cuda.max_memory_allocated(device))}
