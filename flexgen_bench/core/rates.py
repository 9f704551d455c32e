"""How fast a machine does what the engine asks of it: the constants of the cost model, each with a unit and a
source."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from flexgen_bench.core.compression import Compression
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import DType
from flexgen_bench.core.tiers import PHYSICAL_LINKS, Tier

# Nothing that computes or moves data is outside of this, so a constant beyond it is a typing error or a wrong unit: the
# slowest machine in FLOP/s is above the fastest in GFLOP/s, the slowest in bytes/s above the fastest in GB/s.
FLOPS, BYTES = (1e6, 1e16), (1e6, 1e14)
_UNITS = {FLOPS: "FLOP/s", BYTES: "bytes/s"}
_HINTS = {FLOPS: "A TFLOP/s is 1e12.", BYTES: "A GB/s is 1e9."}
_LARGEST_SIZE = 10**9
# Ways of moving bytes that are slower or faster than the direct, pinned one that ``links`` holds.
TRANSFERS = (
    "h2d_pageable",  # from host memory that is not page-locked
    "d2h_pageable",
    "disk_read_cached",  # through the page cache, the file in it
    "disk_write_cached",
)
Table = Mapping[int, float]  # size -> rate, in between interpolated


def number_format(dtype: DType, compression: Compression | None = None) -> str:
    """The name rates are listed under: ``bfloat16``, or ``bfloat16/4`` for numbers kept in 4 bits and computed with in
    bfloat16."""
    return str(dtype) if compression is None else f"{dtype}/{compression.bits}"


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
    step: seconds a step takes beside its work (launches, Python, waking up a thread).
    torch_matrix: the same of torch's own products, which is what systems compute with that have no kernels of their
    own; by dtype, width and
        rows; where there are none, as ``matrix`` says.
    attend, attend_sequence: seconds of a decode attention beside reading its cache, once and for every sequence, by
    number format; none where
        they are not known apart from ``step`` and from reading.
    """

    matrix: Mapping[str, Mapping[int, Table]]
    memory: float
    prefill_attention: Table
    decode_attention: Mapping[str, Table]
    unpack: float
    step: float
    attend: Mapping[str, float] = field(default_factory=dict)
    attend_sequence: Mapping[str, float] = field(default_factory=dict)
    torch_matrix: Mapping[str, Mapping[int, Table]] = field(default_factory=dict)

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
        beside = known(self.attend) + sequences * known(self.attend_sequence)
        return beside + read_bytes / interpolated(table, heads_per_kv_head)

    def prefill_attention_rate(self, tokens: float) -> float:
        return interpolated(self.prefill_attention, tokens)

    def to_dict(self) -> dict[str, Any]:
        """What is not always known only where it is: rates from before read the same."""
        data = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return data if self.torch_matrix else {k: v for k, v in data.items() if k != "torch_matrix"}


@dataclass(frozen=True)
class Rates:
    """All constants of a machine. sites: by tier; links: bytes/s by lane, where the profile states none; transfers:
    bytes/s of
    ``TRANSFERS``; spread: of measured constants, half the range over the median; price_per_hour: USD."""

    sites: Mapping[Tier, SiteRates]
    links: Mapping[str, float] = field(default_factory=dict)
    transfers: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    price_per_hour: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {str(tier): site.to_dict() for tier, site in self.sites.items()} | {
            "links": dict(self.links),
            "transfers": dict(self.transfers),
            "spread": dict(self.spread),
            "price_per_hour": self.price_per_hour,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: str = "gpu.rates") -> Rates:
        """Raises UserError naming the constant that is missing, unknown, negative or absurd."""
        _only(data, ("gpu", "cpu", "links", "transfers", "spread", "price_per_hour"), where)
        tiers = [t for t in (Tier.GPU, Tier.CPU) if data.get(t) is not None]
        sites = {t: _site(data[t], f"{where}.{t}") for t in tiers}
        links = _rates_of(data.get("links"), f"{where}.links")
        _only(links, PHYSICAL_LINKS, f"{where}.links")
        transfers = _rates_of(data.get("transfers"), f"{where}.transfers")
        _only(transfers, TRANSFERS, f"{where}.transfers")
        price = data.get("price_per_hour")
        if price is not None and not 0 <= _number(price, f"{where}.price_per_hour") < 1e4:
            raise UserError(
                f"{where}.price_per_hour",
                price,
                "US dollars per hour, from 0 to 10000",
                "Leave it out where nobody knows it.",
            )
        noise = _mapping(data.get("spread") or {}, f"{where}.spread", empty=True)
        spread = {str(k): _number(v, f"{where}.spread.{k}") for k, v in noise.items()}
        return Rates(sites, links, transfers, spread, price)


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

    def distance(other: str) -> tuple[bool, bool, int]:
        its_dtype, _, its_bits = other.partition("/")
        return (
            bool(bits) != bool(its_bits),
            DType(dtype).bytes != DType(its_dtype).bytes,
            abs(int(bits or 16) - int(its_bits or 16)),
        )

    return min(known, key=distance)


def _site(data: Any, where: str) -> SiteRates:
    if not isinstance(data, Mapping):
        raise UserError(where, data, "a mapping of constants")
    names = [f.name for f in fields(SiteRates)]
    _only(data, names, where)
    needed = [n for n in names if n not in ("attend", "attend_sequence", "torch_matrix")]
    missing = [name for name in needed if data.get(name) in (None, {})]
    if missing:
        raise UserError(f"{where}.{missing[0]}", None, "given", "A profile states all of " + ", ".join(needed) + ".")
    of_torch = data.get("torch_matrix") or {}
    return SiteRates(
        matrix=_products(data["matrix"], f"{where}.matrix"),
        memory=stated_rate(data["memory"], f"{where}.memory"),
        prefill_attention=_table(data["prefill_attention"], f"{where}.prefill_attention", FLOPS),
        decode_attention={
            _format(number, f"{where}.decode_attention"): _table(table, f"{where}.decode_attention.{number}")
            for number, table in _formats(data["decode_attention"], f"{where}.decode_attention").items()
        },
        unpack=stated_rate(data["unpack"], f"{where}.unpack"),
        step=_seconds(data["step"], f"{where}.step"),
        attend=_all_seconds(data, "attend", where),
        attend_sequence=_all_seconds(data, "attend_sequence", where),
        torch_matrix=_products(of_torch, f"{where}.torch_matrix") if of_torch else {},
    )


def _products(data: Any, where: str) -> dict[str, dict[int, Table]]:
    """By number format, width and rows."""
    return {
        _format(number, where): {
            _size(width, f"{where}.{number}"): _table(rows, f"{where}.{number}.{width}", FLOPS)
            for width, rows in _mapping(widths, f"{where}.{number}").items()
        }
        for number, widths in _formats(data, where).items()
    }


def _all_seconds(data: Mapping[str, Any], name: str, where: str) -> dict[str, float]:
    """By number format; none if nothing is stated."""
    where = f"{where}.{name}"
    given = _mapping(data.get(name) or {}, where, empty=True)
    return {_format(number, where): _seconds(value, f"{where}.{number}") for number, value in given.items()}


def _seconds(value: Any, where: str) -> float:
    seconds = _number(value, where)
    if not 0 <= seconds < 1:
        raise UserError(where, value, "seconds, from 0 to 1", "A microsecond is 1e-6.")
    return seconds


def _rates_of(data: Any, where: str) -> dict[str, float]:
    rates = _mapping({} if data is None else data, where, empty=True)
    return {str(k): stated_rate(v, f"{where}.{k}") for k, v in rates.items()}


def _table(data: Any, where: str, allowed: tuple[float, float] = BYTES) -> dict[int, float]:
    rates = _mapping(data, where)
    return {_size(k, where): stated_rate(v, f"{where}.{k}", allowed) for k, v in rates.items()}


def _formats(data: Any, where: str) -> Mapping[Any, Any]:
    """Checked to have a plain number format: what stands in for formats that are not listed."""
    if all("/" in str(number) for number in _mapping(data, where)):
        raise UserError(where, list(data), "given for a plain dtype such as float16 too")
    return _mapping(data, where)


def _mapping(data: Any, where: str, empty: bool = False) -> Mapping[Any, Any]:
    if not isinstance(data, Mapping) or not (data or empty):
        wanted = "a mapping" if empty else "a mapping with at least one entry"
        raise UserError(where, data, wanted, "conf/gpu/t4.yaml has one of each kind.")
    return data


def _format(name: Any, where: str) -> str:
    dtype, slash, bits = str(name).partition("/")
    if dtype not in list(DType) or (slash and bits not in ("3", "4", "8")):
        raise UserError(where, name, "a dtype such as float16, or one with bits such as float16/4")
    return str(name)


def _size(value: Any, where: str) -> int:
    text = str(value)
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= _LARGEST_SIZE:
        raise UserError(where, value, f"a table whose keys are sizes from 1 to {_LARGEST_SIZE}")
    return int(text)


def stated_rate(value: Any, where: str, allowed: tuple[float, float] = BYTES) -> float:
    """A rate somebody has stated, as a number. Raises UserError for one that nothing has."""
    number = _number(value, where)
    least, most = allowed
    if not least <= number <= most:
        raise UserError(where, value, f"from {least:g} to {most:g} {_UNITS[allowed]}", _HINTS[allowed])
    return number


def _number(value: Any, where: str) -> float:
    try:  # YAML reads 2.7e11 as text
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(where, value, "a finite number")
    return number


def _only(data: Mapping[str, Any], known: Any, where: str) -> None:
    for key in data:
        if str(key) not in {str(k) for k in known}:
            raise UserError(f"{where}.{key}", data[key], f"left out: {where} has {', '.join(sorted(map(str, known)))}")


def _plain(value: Any) -> Any:
    return {str(k): _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value
