"""The original's settings: those its authors published for a 16 GB GPU, changed by what the cell asks for.

Its command line calls them --gpu-batch-size, --num-gpu-batches, --percent, --cpu-cache-compute, --pin-weight,
--overlap,
--sep-layer, --compress-weight and --compress-cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from flexgen_bench.core.compression import Along, Compression, Lossy
from flexgen_bench.core.errors import CannotRun, UserError

# Of gpu_batch_size: as many sequences as fit.
LARGEST = "largest"
# The only compression it has. Its groups of weights lie along outputs; a cell may say so, or leave the layout to the
# system.
COMPRESSION = Compression(bits=4, group_size=64)
ITS_LAYOUT = Compression(4, 64, Along.OUTPUTS)


@dataclass(frozen=True)
class Settings:
    """One run of the original. ``percent``: weights on gpu, on cpu, KV cache on gpu, on cpu, activations on gpu, on
    cpu; what is missing to 100 of each pair is on disk."""

    gpu_batch_size: int
    num_gpu_batches: int
    percent: tuple[int, int, int, int, int, int]
    cpu_cache_compute: bool = False
    pin_weight: bool = True
    overlap: bool = True
    sep_layer: bool = True
    compress_weight: bool = False
    compress_cache: bool = False

    def __post_init__(self) -> None:
        for name in ("gpu_batch_size", "num_gpu_batches"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                allowed = f"an integer of at least 1{', or largest' if name == 'gpu_batch_size' else ''}"
                raise UserError(f"system.options.{name}", value, allowed)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise UserError(f"system.options.{field.name}", value, "true or false")
        pairs = list(zip(self.percent[::2], self.percent[1::2], strict=True))
        if any(a < 0 or b < 0 or a + b > 100 for a, b in pairs):
            raise UserError(
                "system.options.percent",
                list(self.percent),
                "pairs (gpu, cpu) of percents, each pair at most 100 together",
            )
        if self.percent[4:] not in ((100, 0), (0, 100), (0, 0)):
            raise UserError("system.options.percent", list(self.percent), "activations on one tier altogether")

    @property
    def block_size(self) -> int:
        return self.gpu_batch_size * self.num_gpu_batches

    @property
    def lowest_tier(self) -> str:
        """The slowest tier that anything is on."""
        pairs = list(zip(self.percent[::2], self.percent[1::2], strict=True))
        if any(gpu + cpu < 100 for gpu, cpu in pairs):
            return "disk"
        return "cpu" if any(cpu for _, cpu in pairs) else "gpu"

    @property
    def is_known_wrong(self) -> bool:
        """Whether its answers are known to be wrong (its speed is not touched by that): with attention on the cpu, two
        or more batches and overlap, the next batch's cache replaces the current one's in their one workspace."""
        return self.cpu_cache_compute and self.num_gpu_batches > 1 and self.overlap

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"percent": list(self.percent)}

    def for_block(self, size: int) -> Settings:
        """The same for blocks of ``size`` prompts. CannotRun if that is no whole number of batches."""
        batch = min(self.gpu_batch_size, size)
        if size % batch:
            raise CannotRun(
                f"blocks of {size} are no whole number of batches of {batch}; choose a multiple or set "
                "system.options.gpu_batch_size"
            )
        return replace(self, gpu_batch_size=batch, num_gpu_batches=size // batch)


_ALL_GPU = (100, 0, 100, 0, 100, 0)
_ALL_CPU = (0, 100, 0, 100, 0, 100)
# FlexGen (ICML 2023), appendix, policies of the throughput table for prompts of 512 and 32 generated tokens; by model
# and whether it is the compressed run "(c)".
PUBLISHED: Mapping[tuple[str, bool], Settings] = {
    ("opt-6.7b", False): Settings(2, 1, _ALL_GPU, overlap=False),
    ("opt-6.7b", True): Settings(72, 1, _ALL_GPU, overlap=False),
    ("opt-30b", False): Settings(48, 3, (20, 80, 0, 100, 0, 100), cpu_cache_compute=True),
    ("opt-30b", True): Settings(16, 20, _ALL_CPU),
    ("opt-175b", False): Settings(32, 8, (0, 50, 0, 0, 0, 100), cpu_cache_compute=True, pin_weight=False),
    ("opt-175b", True): Settings(48, 3, _ALL_CPU, pin_weight=False),
}
# The same for prompts of 1024 tokens (Table 16).
PUBLISHED_1024: Mapping[tuple[str, bool], Settings] = {
    ("opt-6.7b", False): Settings(1, 1, _ALL_GPU, overlap=False),
    ("opt-6.7b", True): Settings(28, 1, _ALL_GPU, overlap=False),
    ("opt-30b", False): Settings(20, 4, (4, 96, 0, 100, 0, 100), cpu_cache_compute=True),
    ("opt-30b", True): Settings(20, 12, _ALL_CPU),
    ("opt-175b", False): Settings(12, 12, (0, 50, 0, 0, 0, 100), cpu_cache_compute=True, pin_weight=False),
    ("opt-175b", True): Settings(12, 4, _ALL_CPU, pin_weight=False),
}
# For four machines with one GPU each, prompts of 512 (the scripts in its repository; not confirmed as the runs of Table
# 3): each has a quarter of the layers, and as many blocks as machines are in flight.
PUBLISHED_4_GPUS: Mapping[tuple[str, bool], Settings] = {
    ("opt-6.7b", False): Settings(24, 1, _ALL_GPU),
    ("opt-30b", False): Settings(64, 3, (20, 80, 0, 100, 0, 100), cpu_cache_compute=True),
    ("opt-175b", False): Settings(40, 1, _ALL_CPU, cpu_cache_compute=True, pin_weight=False),
}
# Its command line's own defaults, for models nothing is published of.
DEFAULT = Settings(4, 1, _ALL_GPU)


def choose(model: str, options: Mapping[str, Any], lossy: Lossy) -> Settings:
    """The published settings of ``model``, with ``options`` that are not None laid over them and ``lossy`` followed.

    Raises UserError for an option that cannot be, CannotRun for compression the original does not have.
    """
    compressed = lossy.weights is not None or lossy.kv_cache is not None
    return overlaid(PUBLISHED.get((model, compressed), DEFAULT), options, lossy)


def overlaid(base: Settings, options: Mapping[str, Any], lossy: Lossy) -> Settings:
    """``base`` with ``options`` that are not None laid over it and ``lossy`` followed. Raises what ``choose``
    raises."""
    for name in ("weights", "kv_cache"):
        if getattr(lossy, name) not in (None, COMPRESSION, ITS_LAYOUT):
            raise CannotRun(
                f"the original compresses to 4 bits in groups of 64 only; policy.lossy.{name} asks for more"
            )
    if lossy.value_share != 1.0:
        raise CannotRun("policy.lossy.value_share is not passed on to the original")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    unknown = set(given) - {f.name for f in fields(Settings)}
    if unknown:
        raise UserError("system.options", min(unknown), f"one of {', '.join(f.name for f in fields(Settings))}")
    if "percent" in given:
        given["percent"] = _percent(given["percent"])
    given["compress_weight"] = lossy.weights is not None
    given["compress_cache"] = lossy.kv_cache is not None
    return replace(base, **given)


def _percent(value: Any) -> tuple[int, ...]:
    listed = value.split() if isinstance(value, str) else value
    try:
        numbers = tuple(int(number) for number in listed)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 6:
        raise UserError("system.options.percent", value, "six whole numbers", "For example [20,80,0,100,0,100].")
    return numbers
