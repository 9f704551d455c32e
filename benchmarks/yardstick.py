"""How fast the machine is while a benchmark runs, against its calibration: the same probes, a second of them at a time.

Calibrated constants are medians of undisturbed moments within a few minutes. On a machine that is shared, or warms up,
the same work takes longer an hour later, and a job meets disturbances that a median hides. Looks between the jobs tell
such drift from an error of the model: a look is an average over its time, and the speeds of a round are those of all
its looks together.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from flexgen_bench.calibrate.effort import Effort, SiteEffort
from flexgen_bench.calibrate.run import open_probes
from flexgen_bench.calibrate.stable import Patience, Probe, measure
from flexgen_bench.core.model import DType
from flexgen_bench.core.rates import Rates, SiteRates, Table, interpolated
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import MIB

WIDTH, FEW, MANY = 2048, 16, 512  # the benchmarks' model, and rows of its decode and prefill
PRODUCTS = {rows: f"cpu.matrix.bfloat16.{WIDTH}.{rows}" for rows in (FEW, MANY)}
MEMORY, DISK = "cpu.memory", "links.disk_read"
LOOK_S = 0.3  # of each probe
EFFORT = Effort(
    name="yardstick",
    patience=Patience(budget_s=0.0, sample_s=LOOK_S, last=1, spread=1.0),
    cpu=SiteEffort(widths=(WIDTH,), rows=(FEW, MANY), matrix=((DType.BFLOAT16, None),), kv=(), prompts=()),
    gpu=SiteEffort(widths=(WIDTH,), rows=(FEW,), matrix=((DType.BFLOAT16, None),), kv=(), prompts=()),
    link_bytes=(MIB,),
    disk_bytes=512 * MIB,
    disk_piece=256 * MIB,
    step_passes=1,
)


class Yardstick:
    """Collects looks. Speeds are by probe, 1 where the machine is as fast as ``rates`` say."""

    def __init__(self, probes: Mapping[str, Probe]) -> None:
        self._probes = probes
        self._seconds: dict[str, float] = defaultdict(float)
        self._amounts: dict[str, float] = defaultdict(float)

    def look(self) -> None:
        """Takes a second or two."""
        for name, probe in self._probes.items():
            begin = time.perf_counter()
            while (seconds := time.perf_counter() - begin) < LOOK_S:
                probe.call()
                self._amounts[name] += probe.amount
            self._seconds[name] += seconds

    def begin_anew(self) -> None:
        """Forget what was seen."""
        self._seconds.clear()
        self._amounts.clear()

    def speeds(self, rates: Rates) -> dict[str, float]:
        """Of all looks together, over the calibrated ones."""
        site = rates.sites[Tier.CPU]
        calibrated = {MEMORY: site.memory, DISK: rates.links["disk_read"]}
        calibrated |= {name: site.matrix_rate("bfloat16", rows, WIDTH) for rows, name in PRODUCTS.items()}
        return {name: self._amounts[name] / seconds / calibrated[name] for name, seconds in self._seconds.items()}


@contextmanager
def open_yardstick(threads: int, folder: Path) -> Iterator[Yardstick]:
    """The probes stay in memory (some 2 GB) and on the disk of ``folder`` (1 GiB) within the block."""
    with open_probes(EFFORT, threads, folder) as (probes, _):
        names = (*PRODUCTS.values(), MEMORY, DISK)
        chosen = {probe.name: probe for probe in probes if probe.name in names}
        measure(list(chosen.values()), EFFORT.patience)  # warm
        yield Yardstick(chosen)


def as_fast(rates: Rates, speeds: Mapping[str, float]) -> Rates:
    """The rates of a machine that runs at these speeds: products by their rows, everything else that computes like
    products with many of them, what reads memory like memory, and both directions of the disk like its reads."""
    return replace(
        rates,
        sites={tier: _site(site, speeds) for tier, site in rates.sites.items()},
        links={lane: rate * (speeds[DISK] if lane.startswith("disk") else 1.0) for lane, rate in rates.links.items()},
    )


def _site(site: SiteRates, speeds: Mapping[str, float]) -> SiteRates:
    by_rows = {rows: speeds[name] for rows, name in PRODUCTS.items()}
    many, memory = speeds[PRODUCTS[MANY]], speeds[MEMORY]

    def scaled(table: Table, speed: float) -> Table:
        return {size: rate * speed for size, rate in table.items()}

    return replace(
        site,
        matrix={
            number: {
                width: {rows: rate * interpolated(by_rows, rows) for rows, rate in table.items()}
                for width, table in widths.items()
            }
            for number, widths in site.matrix.items()
        },
        memory=site.memory * memory,
        prefill_attention=scaled(site.prefill_attention, many),
        decode_attention={n: scaled(table, memory) for n, table in site.decode_attention.items()},
        unpack=site.unpack * many,
        step=site.step / many,
        attend={number: seconds / many for number, seconds in site.attend.items()},
        attend_sequence={number: seconds / many for number, seconds in site.attend_sequence.items()},
    )
