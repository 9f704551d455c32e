"""Rates of attention, as the engine's ATTEND steps compute it: new keys and values are checked, put into the cache, and
attended to.

Prefill counts 4 FLOP per pair of a token and one it sees, head and dimension, as the schedule does; decode counts the
bytes of cache that are read. Each decode call takes another cache, so that it comes from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexgen_bench.calibrate.effort import Format, SiteEffort
from flexgen_bench.calibrate.site import ProbeMemory, Site
from flexgen_bench.calibrate.stable import Probe, Reading
from flexgen_bench.core.model import DType
from flexgen_bench.core.rates import number_format
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.engine.nan_checks import Health
from flexgen_bench.kernels.attention import decode_attention, prefill_attention
from flexgen_bench.memory.kv_cache import KVForm, KVRegion
from flexgen_bench.memory.weight_store import TORCH_DTYPES
from flexgen_bench.schedule.kv_layout import KVLayout
from flexgen_bench.schedule.steps import Step, StepKind

if TYPE_CHECKING:
    from torch import Tensor

_NEW_TOKENS = 16  # behind the prompt of a cache, in a segment of their own
_FEW_TOKENS = 2 * _NEW_TOKENS  # of a cache that is hardly any
_STEP = Step(Lane.CPU, StepKind.ATTEND, 0)


def prefill_probes(memory_of_site: ProbeMemory, effort: SiteEffort) -> Iterator[Probe]:
    """``<tier>.prefill_attention.<tokens>``, of several prompts of that length, in the format that models usually have
    there."""
    site, (heads, dim) = memory_of_site.site, effort.heads_of_dim[0]
    dtype = TORCH_DTYPES[_usual(site)]
    for tokens in effort.prompts:
        count = max(1, min(effort.sequences, effort.prompt_tokens // tokens))
        form = KVForm(heads, dim, dtype, None)
        token_bytes = 2 * heads * dim * dtype.itemsize
        layout = KVLayout(count, tokens, _NEW_TOKENS, _NEW_TOKENS, token_bytes)
        if layout.region_bytes > memory_of_site.size:
            continue
        region = KVRegion(layout, form)
        q, k, v = (memory_of_site.numbers((count * tokens, heads, dim), dtype) for _ in range(3))
        pairs = count * tokens * (tokens + 1) // 2
        yield Probe(
            f"{site.tier}.prefill_attention.{tokens}",
            4 * heads * dim * pairs,
            _prefill(site, region, memory_of_site.turns(layout.region_bytes).__next__, (q, k, v), tokens),
            site.settle,
        )


def _prefill(
    site: Site, region: KVRegion, home: Callable[[], Tensor], qkv: tuple[Tensor, Tensor, Tensor], tokens: int
) -> Callable[[], object]:
    q, k, v = qkv
    form, lengths = region.form, [tokens] * region.layout.sequences
    scale = form.head_dim**-0.5

    def call() -> Tensor:
        Health().watch(_STEP, k, v)
        stored = (form.encode(k), form.encode(v))
        region.put_prompts(home(), 0, stored)
        keys, values = (form.decode(x) for x in stored)
        return prefill_attention(q, keys, values, lengths, scale)

    return call


def decode_probes(memory_of_site: ProbeMemory, effort: SiteEffort) -> Iterator[Probe]:
    """``<tier>.decode_attention.<format>.<query heads per KV head>`` over much cache of many sequences,
    ``<tier>.attend_sequence.<format>`` over hardly any of as many, and ``<tier>.attend.<format>`` of one:
    ``decode_cost`` tells their constants from these. As many sequences as a format has room for; none of its probes if
    not for one."""
    heads = effort.heads_of_dim
    for dtype, compression in effort.kv:
        number, form = number_format(dtype, compression), (dtype, compression)
        sequences, tokens = effort.sequences, effort.cache_tokens
        while sequences and memory_of_site.size < max(
            _layout(form, of, sequences, tokens).region_bytes for of in heads
        ):
            sequences //= 2
        if not sequences:
            continue
        for shared in effort.heads:
            name = f"decode_attention.{number}.{shared}"
            yield _decode_probe(memory_of_site, name, form, heads[shared > 1], shared, sequences, tokens)
        for name, count in (("attend_sequence", sequences), ("attend", 1)):
            yield _decode_probe(memory_of_site, f"{name}.{number}", form, heads[0], 1, count, _FEW_TOKENS)


def _layout(number: Format, heads: tuple[int, int], sequences: int, tokens: int) -> KVLayout:
    (dtype, compression), (kv_heads, dim) = number, heads
    row = dim * dtype.bytes if compression is None else compression.row_bytes(dim)
    token_bytes = 2 * kv_heads * row
    return KVLayout(sequences, tokens - _NEW_TOKENS, _NEW_TOKENS, _NEW_TOKENS, token_bytes)


def _decode_probe(
    memory_of_site: ProbeMemory,
    name: str,
    number: Format,
    heads: tuple[int, int],
    shared: int,
    sequences: int,
    tokens: int,
) -> Probe:
    site, (dtype, compression), (kv_heads, dim) = memory_of_site.site, number, heads
    torch_dtype = TORCH_DTYPES[dtype]
    form = KVForm(kv_heads, dim, torch_dtype, compression)
    layout = _layout(number, heads, sequences, tokens)
    q = memory_of_site.numbers((sequences, kv_heads * shared, dim), torch_dtype)
    k, v = (memory_of_site.numbers((sequences, kv_heads, dim), torch_dtype) for _ in range(2))
    return Probe(
        f"{site.tier}.{name}",
        sequences * tokens * layout.token_bytes,
        _decode(site, KVRegion(layout, form), memory_of_site.turns(layout.region_bytes).__next__, (q, k, v)),
        site.settle,
    )


@dataclass(frozen=True)
class DecodeCost:
    """What decode attention takes: seconds of a call, for each sequence of it, and bytes/s of reading the cache."""

    call_s: float
    sequence_s: float
    rate: float


def decode_cost(large: Reading, short: Reading, single: Reading, memory: float) -> DecodeCost:
    """From calls that read much of many sequences (``large``), hardly anything of as many (``short``), or of one
    (``single``).

    memory: bytes/s that nothing exceeds. An accelerator may read all of the large cache while its host still issues the
    call: both then take as long, and the memory's rate is what is known.
    """
    sequences = short.amount / single.amount
    more_s = large.seconds - short.seconds
    rate = min((large.amount - short.amount) / more_s, memory) if more_s > 0 else memory
    overhead_all, overhead_one = (max(0.0, one.seconds - one.amount / rate) for one in (short, single))
    sequence_s = max(0.0, overhead_all - overhead_one) / (sequences - 1) if sequences > 1 else 0.0
    return DecodeCost(max(0.0, overhead_one - sequence_s), sequence_s, rate)


def _decode(
    site: Site, region: KVRegion, cache: Callable[[], Tensor], qkv: tuple[Tensor, Tensor, Tensor]
) -> Callable[[], object]:
    q, k, v = qkv
    form, slots = region.form, range(region.layout.sequences)
    token, scale = region.layout.new_tokens, form.head_dim**-0.5

    def call() -> Tensor:
        Health().watch(_STEP, k, v)
        raw = cache()
        region.append(raw, token, slots, [form.encode(k), form.encode(v)])
        return decode_attention(q, region.segments(raw, token), None, scale)

    return call


def _usual(site: Site) -> DType:
    """bfloat16, the default of this project; float16 on GPUs that have no bfloat16 (before compute capability 8.0)."""
    import torch

    old = site.tier is Tier.GPU and torch.cuda.get_device_capability() < (8, 0)
    return DType.FLOAT16 if old else DType.BFLOAT16
