"""The policies of the paper as the text beside each printed value has them, read into settings.

``bs=48x3; pct=20 80 0 100 0 100; cpu attention; pin 0``: parts between semicolons, in any order. What is in square
brackets says where the policy was found. Parts that mean nothing to a simulation are kept as remarks, so that no text
is lost.

A text with a shape and percents is a whole policy: words it leaves out (attention, overlap, pinning) then mean what the
authors' command line does without them. Of any other text only what it says is told to a system, which chooses the rest
as it would for its users.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.errors import UserError

_FOUR_BITS = Compression(bits=4, group_size=64)
_ORIGIN = re.compile(r"\[([^\]]*)\]")
_SHAPE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")
_TRIALS = re.compile(r"([1-9]\d{0,5}) train trials")
_COUNTS = {
    "total batch ": "total_batch",
    "inner ": "inner",
    "effective batch=": "effective",
    "tested samples=": "tested",
    "executed=": "executed",
    "eval instances=": "eval_instances",
}
# What starts like this is a setting, so anything unknown in its place is a slip.
_STARTS = ("compress ", "overlap ", "pin ")
_WORDS: Mapping[str, Mapping[str, Any]] = {
    "cpu attention": {"cpu_attention": True},
    "gpu attention": {"cpu_attention": False},
    "overlap off": {"overlap": False},
    "overlap off in repo": {"overlap": False},
    "pin 0": {"pin_weight": False},
    "compress w+kv": {"lossy": Lossy(weights=_FOUR_BITS, kv_cache=_FOUR_BITS)},
    "compress kv only": {"lossy": Lossy(kv_cache=_FOUR_BITS)},
    "compress w only": {"lossy": Lossy(weights=_FOUR_BITS)},
    "cpu offload": {"offload": "cpu"},
}

_ALL_CHOSEN = "no policy is printed: chosen as the system would"
_REST_CHOSEN = "the policy is printed in part: the rest chosen as the system would"


@dataclass(frozen=True)
class PolicyText:
    """What a policy text says; None and "" for what it does not. lossy None: nothing of compression.

    percent: weights on gpu, on cpu, KV cache on gpu, on cpu, activations on gpu, on cpu. stages: GPUs of a pipeline;
    inner: blocks in flight in it. total_batch: of all GPUs. effective: a block whose shape is not known. tested,
    executed, eval_instances, trials: of a task. origin: the text in brackets.
    """

    gpu_batch_size: int | None = None
    num_gpu_batches: int | None = None
    percent: tuple[int, ...] | None = None
    cpu_attention: bool | None = None
    overlap: bool | None = None
    pin_weight: bool | None = None
    lossy: Lossy | None = None
    stages: int | None = None
    inner: int | None = None
    total_batch: int | None = None
    effective: int | None = None
    offload: str = ""
    tested: int | None = None
    executed: int | None = None
    eval_instances: int | None = None
    trials: int | None = None
    origin: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left for a system to choose: a batch, and where tensors are."""
        shape, total = self.gpu_batch_size is not None, self.total_batch is not None
        return (shape and self.percent is not None) or total

    @property
    def completed(self) -> PolicyText:
        """With what a whole policy leaves unsaid: the defaults of the authors' command line. Any other stays as it
        is."""
        if not self.is_whole:
            return self
        return replace(
            self,
            cpu_attention=self.cpu_attention or False,
            overlap=self.overlap is not False,
            pin_weight=self.pin_weight is not False,
        )

    @property
    def unsaid(self) -> str:
        """What the text leaves to the system, in words; "" for a whole policy."""
        if self.is_whole:
            return ""
        says = self.gpu_batch_size is not None or self.percent is not None or self.offload
        return _REST_CHOSEN if says else _ALL_CHOSEN

    @property
    def block_size(self) -> int | None:
        """Sequences that share a load of the weights."""
        if self.gpu_batch_size is None or self.num_gpu_batches is None:
            return self.total_batch or self.effective
        return self.gpu_batch_size * self.num_gpu_batches

    @property
    def num_prompts(self) -> int | None:
        """Sequences the run had, where the text tells: samples executed, instances of all trials in whole blocks,
        blocks in flight."""
        block = self.block_size
        if self.executed is not None or block is None:
            return self.executed
        if self.eval_instances is not None:
            return -(-self.eval_instances * (self.trials or 1) // block) * block
        in_flight = self.inner or self.stages
        return None if in_flight is None else block * in_flight

    @property
    def weights_on(self) -> str:
        """The lowest tier that holds weights: gpu, cpu or disk; "" if unknown."""
        if self.percent is None:
            return self.offload
        on_gpu, on_cpu = self.percent[:2]
        if on_gpu + on_cpu < 100:
            return "disk"
        return "cpu" if on_cpu else "gpu"


def parse_policy(text: str) -> PolicyText:
    """Raises UserError for a part that starts like a setting and is none."""
    policy, remarks = PolicyText(origin="; ".join(_ORIGIN.findall(text))), []
    seen: set[str] = set()
    for part in (p.strip() for p in _ORIGIN.sub("", text).split(";")):
        setting = _setting(part)
        if setting is None:
            remarks += [part] if part else []
            continue
        twice = seen & setting.keys()
        if twice:
            raise UserError("policy", text, f"one word on {min(twice)}", f"{part!r} is the second.")
        seen |= setting.keys()
        policy = replace(policy, **setting)
    return replace(policy, remarks=tuple(remarks))


def _setting(part: str) -> Mapping[str, Any] | None:
    """The fields that a part sets; None for a remark."""
    if part in _WORDS:
        return _WORDS[part]
    if (trials := _TRIALS.fullmatch(part)) is not None:
        return {"trials": int(trials.group(1))}
    for prefix, read in _READERS.items():
        if part.startswith(prefix):
            return read(part.removeprefix(prefix), part)
    for prefix, name in _COUNTS.items():
        if part.startswith(prefix):
            return {name: _count(part.removeprefix(prefix), part)}
    if part.startswith(_STARTS):
        raise UserError("policy", part, f"one of {', '.join(_WORDS)}")
    return None


def _count(text: str, part: str) -> int:
    if re.fullmatch(r"[1-9]\d{0,8}", text) is None:
        raise UserError("policy", part, "a count of at least 1")
    return int(text)


def _percent(text: str, part: str) -> Mapping[str, Any]:
    words = text.split()
    numbers = tuple(int(w) for w in words if w.isascii() and w.isdigit() and len(w) <= 3)
    pairs = list(zip(numbers[::2], numbers[1::2], strict=False))
    if len(words) != 6 or len(numbers) != 6 or any(a + b > 100 for a, b in pairs):
        raise UserError("policy", part, "pct= and three pairs of percents (gpu, cpu), each pair at most 100")
    return {"percent": numbers}


def _batches(text: str, part: str) -> Mapping[str, Any]:
    first, second = _shape(text, part)
    return {"gpu_batch_size": first, "num_gpu_batches": second}


def _pipeline(text: str, part: str) -> Mapping[str, Any]:
    machines, each = _shape(text, part)
    return {"stages": machines * each}


def _shape(text: str, part: str) -> tuple[int, int]:
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise UserError("policy", part, "two counts such as 48x3")
    return int(match.group(1)), int(match.group(2))


_READERS: Mapping[str, Callable[[str, str], Mapping[str, Any]]] = {
    "pct=": _percent,
    "bs=": _batches,
    "pipeline ": _pipeline,
}
