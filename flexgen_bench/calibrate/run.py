"""A whole calibration: every probe of this machine, measured together, and the rates they show."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flexgen_bench.calibrate.attention import DecodeCost, decode_cost, decode_probes, prefill_probes
from flexgen_bench.calibrate.disk import disk_probes
from flexgen_bench.calibrate.disturbance import as_met, slowdowns
from flexgen_bench.calibrate.effort import Effort, SiteEffort
from flexgen_bench.calibrate.links import ALSO, cuda_probes, host_probes
from flexgen_bench.calibrate.matrix import largest_layer, matrix_probes, torch_probes, unpack_probe
from flexgen_bench.calibrate.reading import memory_probe
from flexgen_bench.calibrate.site import ProbeMemory, Site
from flexgen_bench.calibrate.stable import Probe, Reading, RoundProgress, measure
from flexgen_bench.calibrate.steps import operator_probe, step_probe
from flexgen_bench.core.codec import from_json
from flexgen_bench.core.rates import Rates
from flexgen_bench.core.tiers import Tier
from flexgen_bench.kernels.native.build import library
from flexgen_bench.machine.contention import Others
from flexgen_bench.machine.host import threads_beside_a_gpu
from flexgen_bench.machine.measured_rates import Calibration, describe

# What a call of attention takes beside reading is its host's, on a GPU, and counted by operators.
_OF_THE_HOST = (f"{Tier.GPU}.attend.", f"{Tier.GPU}.attend_sequence.")
_NATIVE = ("linear", "attention", "quantization", "bandwidth")


def calibrate(
    effort: Effort, threads: int, disk_dir: Path, on_round: Callable[[RoundProgress], None] = lambda progress: None
) -> tuple[Calibration, Mapping[str, Reading]]:
    """Measure this machine with so many threads, its disk in ``disk_dir``; takes about ``effort.patience.budget_s``.

    Also returns every reading by its name, as a job meets it (``disturbance.py``). Raises StoreError for what the disk
    refuses, MemoryError if the machine has no room.
    """
    notes = [f"no native {name}: torch does its work" for name in _NATIVE if library(name) is None]
    with open_probes(effort, threads, disk_dir) as (probes, direct):
        if not direct:
            notes.append(f"the file system of {disk_dir} takes no direct I/O")
        others = Others()
        readings = measure(probes, effort.patience, on_round)
        notes += filter(None, [others.note()])
    factors = slowdowns(readings)
    notes += [
        f"{tier}: work took {factor:.3f} times as long as in undisturbed moments; its constants are that much slower"
        for tier, factor in factors.items()
    ]
    readings = as_met(readings, factors)
    return _calibration(readings, effort, describe(threads), notes), readings


@contextmanager
def open_probes(effort: Effort, threads: int, disk_dir: Path) -> Iterator[tuple[list[Probe], bool]]:
    """Every probe of this machine, to be called within the block, and whether its disk lets the page cache be gone
    around."""
    import torch

    before, cuda = torch.get_num_threads(), torch.cuda.is_available()
    computing = threads_beside_a_gpu(threads) if cuda else threads
    torch.set_num_threads(computing)
    try:
        with torch.inference_mode():
            host = Site.open(Tier.CPU, computing)
            memory_of_site = _probe_memory(host, effort.cpu)
            probes = [*_site_probes(memory_of_site, effort, effort.cpu)]
            if cuda:
                gpu = Site.open(Tier.GPU, threads)
                probes += [*_site_probes(_probe_memory(gpu, effort.gpu), effort, effort.gpu)]
                probes += cuda_probes(gpu, effort)
            else:
                probes += host_probes(memory_of_site, effort)
            with disk_probes(disk_dir, effort, pinned=cuda) as (of_disk, direct):
                yield [*of_disk, *probes], direct
    finally:
        torch.set_num_threads(before)
        gc.collect()


def _probe_memory(site: Site, effort: SiteEffort) -> ProbeMemory:
    return ProbeMemory(site, effort, largest_layer(effort, site.free_bytes() // 3))


def _site_probes(memory_of_site: ProbeMemory, effort: Effort, of_site: SiteEffort) -> Iterator[Probe]:
    yield memory_probe(memory_of_site)
    yield step_probe(memory_of_site.site, effort)
    if memory_of_site.site.tier is Tier.GPU:
        yield operator_probe(memory_of_site)
    yield unpack_probe(memory_of_site, of_site)
    yield from matrix_probes(memory_of_site, of_site)
    yield from torch_probes(memory_of_site, of_site)
    yield from prefill_probes(memory_of_site, of_site)
    yield from decode_probes(memory_of_site, of_site)


def _calibration(
    readings: Mapping[str, Reading], effort: Effort, machine: Mapping[str, Any], notes: list[str]
) -> Calibration:
    return Calibration(
        rates=rates_from(readings),
        machine=machine,
        mode=effort.name,
        measured=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        unstable=tuple(name for name, reading in readings.items() if not reading.stable),
        also={
            name.removeprefix(f"{ALSO}."): _rounded(reading.rate)
            for name, reading in readings.items()
            if name.startswith(f"{ALSO}.")
        },
        notes=tuple(notes),
    )


def rates_from(readings: Mapping[str, Reading]) -> Rates:
    """Readings by dotted name -> rates. Raises UserError if a site lacks a constant."""
    data: dict[str, Any] = {}
    spread: dict[str, float] = {}
    for name, reading in readings.items():
        if name.startswith((f"{ALSO}.", *_OF_THE_HOST)):
            continue
        *path, last = name.split(".")
        place = data
        for key in path:
            place = place.setdefault(key, {})
        place[last] = _rounded(_constant(name, reading, readings))
        spread[name] = round(reading.spread, 4)
    return from_json(Rates, data | {"spread": spread}, "calibration")


def _constant(name: str, reading: Reading, readings: Mapping[str, Reading]) -> float:
    """A reading as the constant of its name: of a step or operator the time it takes, else a rate; what attention takes
    beside reading its cache is told apart."""
    tier, _, what = name.partition(".")
    kind, _, number = what.partition(".")
    if kind in ("step", "operator"):
        return 1 / reading.rate
    if kind == "decode_attention":
        return _attention(tier, number.rpartition(".")[0], reading, readings).rate
    if kind in ("attend", "attend_sequence"):
        large = readings[f"{tier}.decode_attention.{number}.1"]
        cost = _attention(tier, number, large, readings)
        return cost.call_s if kind == "attend" else cost.sequence_s
    return reading.rate


def _attention(tier: str, number: str, large: Reading, readings: Mapping[str, Reading]) -> DecodeCost:
    short, single = (readings[f"{tier}.attend_sequence.{number}"], readings[f"{tier}.attend.{number}"])
    return decode_cost(large, short, single, readings[f"{tier}.memory"].rate)


def _rounded(value: float) -> float:
    """Four places: more than were measured."""
    return float(f"{value:.4g}")
