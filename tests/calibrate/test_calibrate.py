"""Calibration: real measurements of very small things, when measuring stops, and what becomes of the rates. No test
looks at a time."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import yaml

from flexgen_bench.calibrate.attention import decode_cost, decode_probes
from flexgen_bench.calibrate.disturbance import as_met, slowdowns
from flexgen_bench.calibrate.effort import CPU_MATRIX, FULL, QUICK, Effort, SiteEffort
from flexgen_bench.calibrate.run import rates_from
from flexgen_bench.calibrate.site import ProbeMemory, Site
from flexgen_bench.calibrate.stable import Patience, Probe, Reading, RoundProgress, measure, spread_of
from flexgen_bench.calibrate.steps import operator_probe
from flexgen_bench.cli.calibrate import main
from flexgen_bench.core.codec import from_json
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.rates import Rates, SiteRates
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.units import MIB
from flexgen_bench.machine import contention as others
from flexgen_bench.machine import measured_rates as store
from flexgen_bench.machine.measured_rates import (
    Calibration,
    calibrated_rates,
    ensure_calibrated,
    load,
    path_for,
    save,
    with_calibration,
)
from flexgen_bench.machine.profile import profile_of, write_profile

TINY = Effort(
    name="tiny",
    patience=Patience(budget_s=0.1, sample_s=0.0002, last=2, spread=0.5),
    cpu=SiteEffort(
        widths=(64, 128),
        rows=(1, 4),
        matrix=CPU_MATRIX,
        prompts=(4, 8),
        prompt_tokens=16,
        torch_widths=(64,),
        torch_rows=(1, 4),
        heads=(1, 4),
        cache_tokens=64,
        heads_of_dim=((2, 16), (1, 32)),
        least_bytes=4 * MIB,
        most_bytes=4 * MIB,
    ),
    gpu=QUICK.gpu,
    link_bytes=(4096, 65536),
    disk_bytes=2 * MIB,
    disk_piece=MIB,
    step_passes=2,
)
SITE = SiteRates(
    matrix={"bfloat16": {1024: {1: 1e10, 32: 1e11}}},
    memory=2e10,
    prefill_attention={128: 5e10},
    decode_attention={"bfloat16": {1: 1e10}},
    unpack=5e9,
    step=2e-5,
)
RATES = Rates(
    sites={Tier.CPU: SITE},
    links={"disk_read": 1e9, "disk_write": 5e8, "h2d": 6e9, "d2h": 6e9},
    transfers={"disk_read_cached": 4e9},
    spread={"cpu.memory": 0.02, "links.disk_read": 0.01, "links.disk_write": 0.03, "links.h2d": 0.1, "links.d2h": 0.1},
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Calibration, Mapping[str, Reading], Path]:
    from flexgen_bench.calibrate.run import calibrate

    folder = tmp_path_factory.mktemp("disk")
    calibration, readings = calibrate(TINY, 1, folder)
    return calibration, readings, folder


def test_measures_everything_a_model_asks_for(measured: tuple[Calibration, Mapping[str, Reading], Path]) -> None:
    calibration, readings, folder = measured
    site = calibration.rates.sites[Tier.CPU]
    assert set(site.matrix) == {
        "float32",
        "bfloat16",
        "float16",
        "bfloat16/4",
        "bfloat16/4x8",
        "bfloat16/8",
        "float32/4",
    }
    assert all(set(table) == {1, 4} for w in site.matrix.values() for table in w.values())
    assert set(site.matrix["bfloat16/4"]) == {64, 128}
    # What systems without kernels of their own compute with: in every dtype, as the fastest one is chosen by it, too.
    assert set(site.torch_matrix) == {"float32", "bfloat16", "float16"}
    assert all(set(widths[64]) == {1, 4} for widths in site.torch_matrix.values())
    assert set(site.decode_attention["bfloat16/8"]) == {1, 4}
    assert {"disk_read", "disk_write"} <= set(calibration.rates.links)
    assert {"disk_read_cached", "disk_write_cached"} <= set(calibration.rates.transfers)
    assert set(calibration.rates.spread) == {n for n in readings if not n.startswith("also.")}
    assert all(reading.samples >= 2 for reading in readings.values())
    assert not list(folder.iterdir()), "nothing is left on the disk"


def test_real_rates_survive_the_cache(
    measured: tuple[Calibration, Mapping[str, Reading], Path], tmp_path: Path
) -> None:
    calibration = measured[0]
    save(calibration, path_for(tmp_path, 1))
    assert load(path_for(tmp_path, 1)) == calibration
    assert calibrated_rates(tmp_path, 1) == calibration.rates
    assert calibrated_rates(tmp_path, 2) is None, "other threads, other rates"
    assert len(list((tmp_path / store.FOLDER).iterdir())) == 1


def test_a_written_profile_is_a_machine_of_the_command_line(
    measured: tuple[Calibration, Mapping[str, Reading], Path], tmp_path: Path
) -> None:
    path = tmp_path / "gpu" / "mine.yaml"
    path.parent.mkdir()
    write_profile(measured[0], path, tmp_path)
    command = [sys.executable, "-m", "flexgen_bench", "--config-dir", str(tmp_path)]
    command += ["gpu=mine", "model=opt-125m", "system=flexgen", "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)["gpu"]
    assert shown["sources"]["disk_read"].startswith("measured here on ")
    assert from_json(Rates, shown["rates"], "gpu.rates").sites == measured[0].rates.sites


def test_the_profile_of_a_machine_without_gpu_has_no_links_to_one() -> None:
    profile = profile_of(
        Calibration(RATES, {"cpu": "x", "threads": 2}, "quick", "2026-01-02T03:04:05Z"), "m", Path("/")
    )
    assert profile["accelerator"] == "none"
    assert set(profile["links"]) == {"disk_read", "disk_write"}
    assert "spread 3.0%" in profile["sources"]["disk_write"]
    assert "10.0% (links.h2d)" in profile["sources"]["rates"]


# When measuring stops


class FakeClock:
    """Calls take as long as they say."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def probe(self, name: str, durations: Iterator[float], amount: float = 1.0) -> Probe:
        def call() -> None:
            self.now += next(durations)

        return Probe(name, amount, call)


PATIENCE = Patience(budget_s=100.0, sample_s=0.5, last=3, spread=0.1)


def test_a_steady_probe_is_done_after_as_many_samples_as_are_looked_at() -> None:
    clock = FakeClock()
    found = measure([clock.probe("steady", cycle([1.0]), 10)], PATIENCE, clock=clock)["steady"]
    assert found == Reading(10.0, 0.0, 3, True)


def test_a_slow_first_call_and_slow_first_samples_do_not_count() -> None:
    clock = FakeClock()
    durations = iter([4.0, 4.0, 2.0, 1.0, 1.0, 1.0])
    found = measure([clock.probe("warms up", durations, 10)], PATIENCE, clock=clock)["warms up"]
    assert found == Reading(10.0, 0.0, 5, True)


def test_stops_at_the_budget_and_says_what_was_not_stable() -> None:
    clock = FakeClock()
    probes = [clock.probe("wild", cycle([1.0, 2.0])), clock.probe("steady", cycle([1.0]))]
    found = measure(probes, PATIENCE, clock=clock)
    assert found["steady"].stable
    assert found["steady"].samples == 3, "stable ones take no more time"
    assert not found["wild"].stable
    assert found["wild"].spread == pytest.approx(0.25 / 0.5, rel=0.5)
    assert 100 < clock.now < 104


def test_two_rounds_whatever_the_budget() -> None:
    clock = FakeClock()
    probes = [clock.probe(name, cycle([70.0])) for name in ("a", "b")]
    found = measure(probes, PATIENCE, clock=clock)
    # Three with the first call, which is so long that it counts.
    assert [(r.samples, r.stable) for r in found.values()] == [(3, True), (3, True)]
    assert clock.now == 6 * 70


def test_rounds_are_interleaved_and_samples_filled() -> None:
    clock, order = FakeClock(), list[str]()

    def probe(name: str) -> Probe:
        def call() -> None:
            clock.now += 0.1
            order.append(name)

        return Probe(name, 1.0, call, after=lambda: order.append("after"))

    seen: list[RoundProgress] = []
    measure([probe("a"), probe("b")], PATIENCE, seen.append, clock)
    assert order[:4] == ["a", "after", "b", "after"], "one call of each to warm up"
    assert order[4:16] == [*["a"] * 5, "after", *["b"] * 5, "after"]
    assert seen[-1].round == 3


def test_what_disturbs_a_tier_now_and_then_is_in_all_of_its_constants() -> None:
    """Medians know only undisturbed moments; jobs, which meet the others as well, took 8 % longer than was predicted
    from them."""
    clock = FakeClock()
    probes = [
        clock.probe("cpu.memory", iter([9.0, 1.0, 2.0, 1.0, 1.0, 1.0]), 10),
        clock.probe("cpu.unpack", iter([1.0, 1.0, 1.0, 1.0]), 10),
        clock.probe("gpu.memory", iter([1.0, 1.0, 1.0, 1.0]), 10),
        clock.probe("links.disk_read", iter([1.0, 3.0, 1.0, 1.0, 1.0]), 10),
    ]
    readings = measure(probes, PATIENCE, clock=clock)
    assert [reading.rate for reading in readings.values()] == [10.0] * 4
    factor = (2.0 + 7 * 1.0) / 8  # the first call, a sample where it is long, warms up
    assert slowdowns(readings) == {Tier.CPU: pytest.approx(factor), Tier.GPU: 1.0}
    found = {name: reading.rate for name, reading in as_met(readings, slowdowns(readings)).items()}
    assert found == pytest.approx(
        {"cpu.memory": 10 / factor, "cpu.unpack": 10 / factor, "gpu.memory": 10.0, "links.disk_read": 10.0}
    )


def test_spread() -> None:
    assert spread_of([4.0, 5.0, 6.0]) == pytest.approx(0.2)
    assert spread_of([1.0]) == 1.0, "nothing is known of one sample"


def test_what_others_took_is_told_if_it_is_much(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, own, now = iter([10.0, 15.0]), iter([1.0, 3.0]), iter([0.0, 2.0])
    monkeypatch.setattr(others, "_busy_s", lambda: next(busy))
    monkeypatch.setattr(others, "_own_s", lambda: next(own))
    monkeypatch.setattr(others.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(others.psutil, "cpu_count", lambda: 3)
    note = others.Others().note()
    assert note is not None
    assert "50%" in note, "3 of 6 seconds"


# Keeping and finding


def calibration(**changes: object) -> Calibration:
    return replace(Calibration(RATES, {"cpu": "x", "threads": 1}, "quick", "2026-01-02T03:04:05Z"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2] + "{",
        lambda text: text.replace("schema: 3", "schema: 2"),
        lambda text: text.replace("torch: ", "torch: 1"),
        lambda text: text.replace("unpack: 5", "unpack: -5"),
        lambda text: text.replace("mode: quick\n", ""),
    ],
)
def test_a_file_that_cannot_be_used_counts_as_none_and_says_so(
    damage: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = path_for(tmp_path, 1)
    save(calibration(), path)
    path.write_text(damage(path.read_text()))
    with caplog.at_level(logging.WARNING):
        assert calibrated_rates(tmp_path, 1) is None
    assert str(path) in caplog.text
    assert "python -m flexgen_bench calibrate" in caplog.text
    with pytest.raises(StoreError, match="Measure again"):
        load(path)


def test_another_machine_has_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    described = store.describe(2)
    names = {store.machine_id(described), store.machine_id(store.describe(1))}
    for key, value in (("cpu", "other"), ("cores", 999), ("memory_gib", 1), ("gpu", "NVIDIA X")):
        names.add(store.machine_id(described | {key: value}))
    assert len(names) == 6
    monkeypatch.setattr(store.machine, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(store.machine, "local_gpus", lambda: (store.machine.LocalGpu("NVIDIA Y", 1),))
    assert store.describe(2)["gpu"] == "NVIDIA Y"


def test_reading_rates_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys, flexgen_bench.machine.measured_rates as s; from pathlib import Path;"
        f"assert s.calibrated_rates(Path({str(tmp_path)!r}), 1) is None; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_first_use_measures_once_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(calibration(), tmp_path / "made.yaml")
    target = path_for(tmp_path, 1)
    program = (
        f"import os, sys; os.makedirs({str(target.parent)!r}); os.rename({str(tmp_path / 'made.yaml')!r}, "
        f"{str(target)!r});"
        "print('calibrating: round 1', file=sys.stderr)"
    )
    monkeypatch.setattr(store, "_command", lambda cache, threads: [sys.executable, "-c", program])
    lines: list[str] = []
    assert ensure_calibrated(tmp_path, 1, lines.append) == RATES
    assert lines[1:] == ["calibrating: round 1"]
    assert ensure_calibrated(tmp_path, 1, lines.append) == RATES  # the command would fail now
    assert len(lines) == 2


def test_a_measurement_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; print('error: the disk is full', file=sys.stderr); sys.exit(2)"
    monkeypatch.setattr(store, "_command", lambda cache, threads: [sys.executable, "-c", program])
    with pytest.raises(StoreError, match=r"exit status 2\): error: the disk is full"):
        ensure_calibrated(tmp_path, 1)


# Into a profile


def test_without_accelerator_the_cpu_and_the_disk() -> None:
    filled = with_calibration(HardwareProfile("cpu", Accelerator.NONE), RATES)
    assert filled.rates is not None
    assert filled.rates.sites == {Tier.CPU: SITE}
    assert set(filled.rates.links) == {"disk_read", "disk_write"}
    assert filled.link_rate(Lane.DISK_READ) == 1e9
    assert filled.links == {}, "what the profile states decides results; rates do not"


def test_an_emulated_accelerator_computes_on_the_same_cores() -> None:
    links = {"h2d": 2e9}
    machine = HardwareProfile("e", Accelerator.EMULATED, gpu_memory_bytes=MIB, links=links)
    filled = with_calibration(machine, RATES)
    assert filled.rates is not None
    assert filled.rates.sites == {Tier.GPU: SITE, Tier.CPU: SITE}
    assert filled.link_rate(Lane.H2D) == 2e9, "as stated"
    assert filled.link_rate(Lane.D2H) == 6e9, "not stated: a copy within host memory"
    assert filled.link_rate(Lane.DISK_WRITE) == 5e8


def test_cuda_has_what_was_measured_of_both_sites() -> None:
    fast = replace(SITE, memory=1e12)
    machine = HardwareProfile("g", Accelerator.CUDA)
    both = replace(RATES, sites={Tier.CPU: SITE, Tier.GPU: fast})
    filled = with_calibration(machine, both)
    assert filled.rates is not None
    assert filled.rates.sites == {Tier.CPU: SITE, Tier.GPU: fast}
    without = with_calibration(machine, RATES)
    assert without.rates is not None
    assert Tier.GPU not in without.rates.sites, "nothing is made up"


def test_what_a_profile_states_stays() -> None:
    stated = Rates({Tier.CPU: replace(SITE, memory=1e11)}, {"disk_read": 3e9}, price_per_hour=1.5)
    filled = with_calibration(HardwareProfile("c", Accelerator.NONE, rates=stated), RATES)
    assert filled.rates is not None
    assert filled.rates.sites[Tier.CPU].memory == 1e11
    assert filled.link_rate(Lane.DISK_READ) == 3e9
    assert filled.link_rate(Lane.DISK_WRITE) == 5e8
    assert filled.rates.price_per_hour == 1.5
    with pytest.raises(UserError, match=r"rates\.cpu"):
        with_calibration(HardwareProfile("c", Accelerator.NONE), Rates({}))


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads = 0: must be from 1"),
        (["--threads", "100000"], "--threads = 100000"),
        (["--cache-dir", "/proc/none"], "--cache-dir = '/proc/none': must be a writable directory"),
        (["--out", "machine.json"], "--out = 'machine.json': must be a file name that ends in .yaml"),
        (["--out", "/proc/none/m.yaml"], "--out = '/proc/none'"),
        (["--disk-dir", "/proc/none"], "--disk-dir = '/proc/none': must be a writable directory"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLEXGEN_BENCH_CACHE", str(tmp_path))
    assert main(["--quick", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_disk_without_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.machine, "free_disk_bytes", lambda folder: MIB)
    assert main(["--quick", "--cache-dir", str(tmp_path)]) == 2
    assert "free (it has 1.00 MiB)" in capsys.readouterr().err


def test_the_command_prints_tables_warns_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = replace(TINY, patience=replace(TINY.patience, spread=1e-9))
    monkeypatch.setattr("flexgen_bench.cli.calibrate.QUICK", strict)
    assert main(["--quick", "--threads", "1", "--cache-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "matrix products, GFLOP/s by rows" in shown.out
    assert f"written: {path_for(tmp_path, 1)}" in shown.out
    assert "constants still vary by more than" in shown.err
    assert load(path_for(tmp_path, 1)).unstable


def test_modes_differ_in_effort() -> None:
    assert QUICK.patience.budget_s < FULL.patience.budget_s
    assert set(QUICK.cpu.matrix) == set(FULL.cpu.matrix)


@pytest.mark.parametrize(
    ("large_s", "short_s", "expected"),
    [
        (0.00175, 0.00075, (0.0002, 0.00005, 1e9)),  # 1 MB more in a millisecond more
        # Hidden behind the issuing of the call: the memory's rate is what is known.
        (0.0002, 0.0002, (0.0002, 0.0, 1e10)),
        (0.0001, 0.0002, (0.0002, 0.0, 1e10)),  # noise
    ],
)
def test_what_attention_takes_beside_reading_is_told_apart(
    large_s: float, short_s: float, expected: tuple[float, float, float]
) -> None:
    """Once for a call, and for each of its sequences: 16 short ones took 0.7 ms where 0.2 were known of."""

    def reading(amount: float, seconds: float) -> Reading:
        return Reading(amount / seconds, 0.0, 3, True, amount)

    sequences, of_one = 11, 10.0
    large = reading(sequences * of_one + 1e6, large_s)
    short = reading(sequences * of_one, short_s)
    single = reading(of_one, short_s - (sequences - 1) * expected[1])
    found = decode_cost(large, short, single, 1e10)
    assert (found.call_s, found.sequence_s, found.rate) == pytest.approx(expected, rel=0.01, abs=1e-8)


def test_what_a_gpu_is_issued_is_no_time_of_its_own() -> None:
    """A call of attention on hardly any cache took 0.47 ms on an H100: its host's time for some 50 operators, which the
    planner counts. It is a constant of a processor alone; an operator is one of a GPU."""
    site = Site.open(Tier.CPU, 1)
    probe = operator_probe(ProbeMemory(site, TINY.cpu, 0))
    assert probe.name == "cpu.operator"
    assert 10 < probe.amount < 60
    probe.call()
    names = {f"matrix.float16.{64}.{1}": 1e9, "memory": 1e9, "prefill_attention.16": 1e9, "unpack": 1e9, "step": 2e4}
    names |= {"decode_attention.float16.1": 1e9, "attend.float16": 1e6, "attend_sequence.float16": 1e6}
    readings = {
        f"{tier}.{name}": Reading(rate, 0.0, 3, True, 1e6 if name.startswith("decode") else 1e3)
        for tier in ("gpu", "cpu")
        for name, rate in names.items()
    }
    readings["gpu.operator"] = Reading(1e5, 0.0, 3, True, 30)
    found = rates_from(readings).sites
    assert found[Tier.GPU].operator == pytest.approx(1e-5)
    assert not found[Tier.GPU].attend
    assert found[Tier.CPU].attend
    assert not found[Tier.CPU].operator


def test_a_small_memory_has_fewer_sequences_or_a_format_less() -> None:
    """Large caches that did not fit were left out while the small one beside them was measured: no constant could be
    made of it."""
    site = Site.open(Tier.CPU, 1)
    effort = replace(TINY.cpu, least_bytes=128 * 1024, most_bytes=128 * 1024)
    names = {probe.name for probe in decode_probes(ProbeMemory(site, effort, 0), replace(effort, sequences=512))}
    assert {"cpu.decode_attention.float32.1", "cpu.attend_sequence.float32", "cpu.attend.float32"} <= names
    long = replace(effort, cache_tokens=100_000)
    assert not list(decode_probes(ProbeMemory(site, effort, 0), long))
