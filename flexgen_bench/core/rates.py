"""How fast a machine does what the engine asks of it: the constants of the cost model, each with a unit and a
source."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from flexgen_bench.core.codec import OMITTED, inlined
from flexgen_bench.core.compression import Compression
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.microscaling import Codes
from flexgen_bench.core.model import DType
from flexgen_bench.core.tiers import STATED_LINKS, Tier

_LARGEST_SIZE = 10**9
# Ways of moving bytes that are slower or faster than the direct, pinned one that ``links`` holds.
TRANSFERS = (
    "h2d_pageable",  # from host memory that is not page-locked
    "d2h_pageable",
    "disk_read_cached",  # through the page cache, the file in it
    "disk_write_cached",
)


def _number(value: Any, at: str) -> float:
    try:  # YAML reads 2.7e11 as text
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(at, value, "a finite number")
    return number


def _within(least: float, most: float, unit: str, action: str) -> Callable[[Any, str], float]:
    def check(value: Any, at: str) -> float:
        number = _number(value, at)
        if not least <= number <= most:
            raise UserError(at, value, f"from {least:g} to {most:g} {unit}", action)
        return number

    return check


def _size(value: Any, at: str) -> int:
    text = str(value)
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= _LARGEST_SIZE:
        raise UserError(at, value, f"a table whose keys are sizes from 1 to {_LARGEST_SIZE}")
    return int(text)


def _format(name: Any, at: str) -> str:
    dtype, slash, bits = str(name).partition("/")
    if dtype not in list(DType) or (slash and bits not in ("3", "4", "8", "4x8")):
        raise UserError(at, name, "a dtype such as float16, or one with bits such as float16/4 (4x8: times 8 bits)")
    return str(name)


def _entries(data: Any, at: str) -> Any:
    if not isinstance(data, Mapping) or not data:
        raise UserError(at, data, "a mapping with at least one entry", "conf/gpu/t4.yaml has one of each kind.")
    return data


def _with_plain_format(data: Any, at: str) -> Any:
    """Checked to have a plain number format: what stands in for formats that are not listed."""
    if all("/" in str(number) for number in _entries(data, at)):
        raise UserError(at, list(data), "given for a plain dtype such as float16 too")
    return data


def _one_of(names: Collection[str]) -> Callable[[Any, str], str]:
    def check(name: Any, at: str) -> str:
        if name not in list(names):
            raise unknown_choice(at, name, map(str, names))
        return str(name)

    return check


# Nothing that computes or moves data is outside of this, so a constant beyond it is a typing error or a wrong unit: the
# slowest machine in FLOP/s is above the fastest in GFLOP/s, the slowest in bytes/s above the fastest in GB/s.
stated_rate = _within(1e6, 1e14, "bytes/s", "A GB/s is 1e9.")
Flops = Annotated[float, _within(1e6, 1e16, "FLOP/s", "A TFLOP/s is 1e12.")]
Bandwidth = Annotated[float, stated_rate]
Seconds = Annotated[float, _within(0, 1, "seconds", "A microsecond is 1e-6.")]
Dollars = Annotated[float, _within(0, 1e4, "US dollars per hour", "Leave it out where nobody knows it.")]
Size = Annotated[int, _size]
Format = Annotated[str, _format]
# size -> rate, in between interpolated
Table = Mapping[int, float]
FlopsTable = Annotated[Mapping[Size, Flops], _entries]
Products = Annotated[Mapping[Format, Annotated[Mapping[Size, FlopsTable], _entries]], _with_plain_format]


def number_format(dtype: DType, codes: Codes | None = None, activations: int | None = None) -> str:
    """The name rates are listed under: ``bfloat16``, or ``bfloat16/4`` for numbers kept in 4 bits and computed with in
    bfloat16; ``bfloat16/4x8`` where what they are multiplied with is quantized to 8 bits (``Lossy.activations``)."""
    if codes is None:
        return str(dtype)
    is_even = activations is not None and isinstance(codes, Compression) and codes.bits == 4
    return f"{dtype}/{codes.bits}{f'x{activations}' if is_even else ''}"


@dataclass(frozen=True)
class SiteRates:
    """What a processor or an accelerator sustains.

    matrix: FLOP/s of a product with a weight matrix, by number format, by width (the square root of the matrix' size)
    and by rows
        of the other factor. Products with few rows are bound by ``memory``.
    memory: bytes/s at which weights that are in its memory, not in its caches, are read.
    prefill_attention: FLOP/s of the attention of a prompt, by its length in tokens.
    decode_attention: bytes/s of KV cache that decode attention gets through, by number format and by query heads per KV
    head.
    unpack: bytes/s of plain weights that come out of unpacking compressed ones.
    step: seconds of the host that a step takes beside its work (Python, events, waking up a thread).
    operator: seconds of the host for each operator that a step issues to an accelerator, launches and Python included;
    0 where nobody knows. (``planner/issued_operators.py`` says how many there are.)
    launch: seconds of the host to launch what was recorded as a CUDA graph; 0: nobody has measured it, and decode
    passes are priced as if every operator were issued. (``planner/recorded_passes.py`` says what is recorded.)
    torch_matrix: the same of torch's own products, which is what systems compute with that have no kernels of their
    own; by dtype, width and
        rows; where there are none, as ``matrix`` says.
    attend, attend_sequence: seconds of a decode attention beside reading its cache, once and for every sequence, by
    number format; none where
        they are not known apart from ``step`` and from reading.
    """

    matrix: Products
    memory: Bandwidth
    prefill_attention: FlopsTable
    decode_attention: Annotated[Mapping[Format, Annotated[Mapping[Size, Bandwidth], _entries]], _with_plain_format]
    unpack: Bandwidth
    step: Seconds
    # What is not always known only where it is: rates from before read the same.
    attend: Mapping[Format, Seconds] = field(default_factory=dict, metadata=OMITTED)
    attend_sequence: Mapping[Format, Seconds] = field(default_factory=dict, metadata=OMITTED)
    torch_matrix: Products = field(default_factory=dict, metadata=OMITTED)
    operator: Seconds = field(default=0.0, metadata=OMITTED)
    launch: Seconds = field(default=0.0, metadata=OMITTED)

    def matrix_rate(self, number: str, rows: float, width: float) -> float:
        """FLOP/s of a product of ``rows`` rows with a ``width`` x ``width`` matrix of this number format."""
        return _product_rate(self.matrix, number, rows, width)

    def torch_matrix_rate(self, dtype: DType, rows: float, width: float) -> float:
        """The same of torch's own product of plain numbers."""
        return _product_rate(self.torch_matrix or self.matrix, number_format(dtype), rows, width)

    def decode_attention_s(self, sequences: int, read_bytes: float, number: str, heads_per_kv_head: int) -> float:
        """Seconds of a decode attention of so many sequences that reads so much of a cache of this number format."""

        def known(seconds: Mapping[str, float]) -> float:
            return seconds[_nearest(number, seconds)] if seconds else 0.0

        table = self.decode_attention[_nearest(number, self.decode_attention)]
        overhead_s = known(self.attend) + sequences * known(self.attend_sequence)
        return overhead_s + read_bytes / interpolated(table, heads_per_kv_head)

    def prefill_attention_rate(self, tokens: float) -> float:
        return interpolated(self.prefill_attention, tokens)


@dataclass(frozen=True)
class Rates:
    """All constants of a machine. sites: by tier; links: bytes/s by lane, where the profile states none (net_out,
    net_in: between machines; what ranks of one machine send each other does not pass through these); transfers:
    bytes/s of
    ``TRANSFERS``; spread: of measured constants, half the range over the median; price_per_hour: USD."""

    sites: Mapping[Tier, SiteRates] = field(metadata=inlined(Tier.GPU, Tier.CPU))
    links: Mapping[Annotated[str, _one_of(STATED_LINKS)], Bandwidth] = field(default_factory=dict)
    transfers: Mapping[Annotated[str, _one_of(TRANSFERS)], Bandwidth] = field(default_factory=dict)
    spread: Mapping[str, Annotated[float, _number]] = field(default_factory=dict)
    price_per_hour: Dollars | None = None


def _product_rate(formats: Mapping[str, Mapping[int, Table]], number: str, rows: float, width: float) -> float:
    widths = formats[_nearest(number, formats)]
    return interpolated({w: interpolated(table, rows) for w, table in widths.items()}, width)


def interpolated(table: Mapping[int, float], size: float) -> float:
    """The rate at a size: on a straight line between neighbours in logarithms, constant beyond the ends."""
    sizes = sorted(table)
    place = bisect_left(sizes, size)
    if place == 0:
        return table[sizes[0]]
    if place == len(sizes):
        return table[sizes[-1]]
    low, high = sizes[place - 1], sizes[place]
    part = math.log(size / low) / math.log(high / low)
    return math.exp((1 - part) * math.log(table[low]) + part * math.log(table[high]))


def _nearest(number: str, known: Mapping[str, Any]) -> str:
    """The format itself, else one of the same width: as many bits, computed with in another dtype of as many bytes."""
    if number in known:
        return number
    dtype, _, bits = number.partition("/")

    def width(stored: str) -> int:
        return int(stored.partition("x")[0] or 16)

    def distance(other: str) -> tuple[bool, bool, int, bool]:
        its_dtype, _, its_bits = other.partition("/")
        return (
            bool(bits) != bool(its_bits),
            DType(dtype).bytes != DType(its_dtype).bytes,
            abs(width(bits) - width(its_bits)),
            ("x" in bits) != ("x" in its_bits),
        )

    return min(known, key=distance)
