"""The machines of conf/gpu: complete, plausible beside each other, refused with a reason where a constant cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from flexgen_bench.cells.compose import composed
from flexgen_bench.config.build import cell_spec, hardware_profile
from flexgen_bench.config.paths import conf_dir
from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.rates import TRANSFERS, Rates
from flexgen_bench.core.tiers import LINKS, Lane, Tier

NAMES = sorted(path.stem for path in (conf_dir() / "gpu").glob("*.yaml"))
# They stand for whatever machine is here, which is measured.
LOCAL = {"auto", "cpu", "emulated", "gpu16"}
STATED = [name for name in NAMES if name not in LOCAL]


@pytest.fixture
def _hydra() -> Any:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def hardware(*overrides: str) -> HardwareProfile:
    """As the command line makes it."""
    return cell_spec(composed(["system=flexgen", *overrides])).hardware


def rates_of(name: str) -> Rates:
    rates = hardware_profile(name).rates
    assert rates is not None
    return rates


def test_the_machines_somebody_may_own_or_compare_with() -> None:
    assert {"t4", "rtx3090", "rtx4090", "a100", "a100-80gb", "h100", "h100-16gb", "a6000", "l4", "laptop"} == set(
        STATED
    )
    assert set(NAMES) >= LOCAL


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_survives_being_written_down(name: str) -> None:
    profile = hardware_profile(name)
    again = from_json(HardwareProfile, json.loads(json.dumps(to_json(profile))), "gpu")
    assert to_json(again) == to_json(profile)
    if profile.rates is not None:
        assert again.rates == profile.rates


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_a_profile_of_the_local_machine_states_no_rates(name: str) -> None:
    assert hardware_profile(name).rates is None


@pytest.mark.parametrize("name", STATED)
def test_a_machine_that_is_elsewhere_states_all_that_a_prediction_needs(name: str) -> None:
    profile = hardware_profile(name)
    rates = rates_of(name)
    assert profile.name == name
    assert profile.accelerator is Accelerator.CUDA
    assert profile.device_match
    assert None not in (profile.gpu_memory_bytes, profile.cpu_memory_bytes, profile.disk_bytes)
    assert set(rates.sites) == {Tier.GPU, Tier.CPU}
    assert all(profile.link_rate(Lane(kind)) for kind in LINKS)
    assert set(rates.transfers) == set(TRANSFERS)
    for site in rates.sites.values():
        for number in ("float16", "bfloat16", "float16/4"):
            assert site.matrix_rate(number, 144, 7168) > 0
            assert site.decode_attention_s(1, 1e9, number, 8) > 0
        assert site.prefill_attention_rate(512) > 0


@pytest.mark.parametrize("name", STATED)
def test_constants_are_plausible_beside_each_other(name: str) -> None:
    """Inside a machine: what is further away is slower, and nothing computes beyond its tensor cores."""
    profile, rates = hardware_profile(name), rates_of(name)
    gpu, cpu = rates.sites[Tier.GPU], rates.sites[Tier.CPU]
    link = {str(kind): profile.link_rate(Lane(kind)) or 0 for kind in LINKS}
    assert gpu.memory > 2 * cpu.memory
    assert cpu.memory > link["h2d"] > link["disk_read"] >= link["disk_write"]
    assert rates.transfers["h2d_pageable"] < link["h2d"]
    assert rates.transfers["d2h_pageable"] < link["d2h"]
    assert link["disk_read"] <= rates.transfers["disk_read_cached"] < cpu.memory
    assert link["disk_write"] <= rates.transfers["disk_write_cached"] < cpu.memory
    for site in (gpu, cpu):
        fastest = site.matrix_rate("float16", 4096, 8192)
        assert site.prefill_attention_rate(2048) < fastest
        assert site.matrix_rate("float16", 256, 8192) <= fastest
        assert site.unpack < site.memory
        own, shared = (site.decode_attention_s(1, 1e9, "float16", heads) for heads in (1, 8))
        assert 1e9 / site.memory < own <= shared
    assert gpu.matrix_rate("float32", 4096, 8192) <= gpu.matrix_rate("float16", 4096, 8192)
    assert gpu.matrix_rate("float16", 4096, 8192) > 5 * cpu.matrix_rate("float16", 4096, 8192)


@pytest.mark.parametrize(
    ("slow", "fast"),
    [
        ("t4", "rtx3090"),
        ("rtx3090", "rtx4090"),
        ("laptop", "rtx3090"),
        ("rtx3090", "a100"),
        ("a6000", "a100"),
        ("l4", "rtx4090"),
        ("a100", "h100"),
        ("t4", "h100"),
        ("rtx4090", "h100"),
    ],
)
def test_faster_cards_are_faster(slow: str, fast: str) -> None:
    one, other = rates_of(slow).sites[Tier.GPU], rates_of(fast).sites[Tier.GPU]
    assert one.matrix_rate("float16", 4096, 7168) < other.matrix_rate("float16", 4096, 7168)
    assert one.memory < other.memory
    # Of short prompts only the H100 was measured, where what surrounds the kernels weighs as much.
    assert one.prefill_attention_rate(2048) < other.prefill_attention_rate(2048)
    assert one.unpack < other.unpack


@pytest.mark.usefixtures("_hydra")
@pytest.mark.parametrize("name", ["t4", "rtx3090"])
def test_the_papers_machines_are_asked_in_its_dtype(name: str) -> None:
    """In bfloat16 the original FlexGen cannot run, so beside this engine stood no prediction of it on a machine of its
    own paper."""
    assert composed([f"gpu={name}"]).gpu.dtype == "float16"


def test_a_capped_card_is_the_same_card() -> None:
    """h100-16gb has less memory than an H100, about a T4's, and all of its speed."""
    whole, capped = hardware_profile("h100"), hardware_profile("h100-16gb")
    assert capped.gpu_memory_bytes == pytest.approx(hardware_profile("t4").gpu_memory_bytes, rel=0.01)
    assert rates_of("h100").sites[Tier.GPU] == rates_of("h100-16gb").sites[Tier.GPU]
    assert whole.device_match == capped.device_match


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("t4", 15360),
        ("rtx3090", 24576),
        ("rtx4090", 24564),
        ("a6000", 49140),
        ("a100", 40960),
        ("a100-80gb", 81920),
        ("h100", 81559),
        ("l4", 23034),
        ("laptop", 6144),
    ],
)
def test_a_card_has_what_its_driver_says(name: str, mib: int) -> None:
    """Data sheets' GB were taken for 10^9 bytes: a 3090 had 1.8 GB less than it has."""
    assert hardware_profile(name).gpu_memory_bytes == mib * 2**20


def test_nothing_is_said_never_to_have_run_on_a_gpu() -> None:
    """The fused kernel has, on an H100."""
    for file in (conf_dir() / "gpu").glob("*.yaml"):
        assert "has not run on a GPU" not in file.read_text()


GPU, CPU = "gpu.rates.gpu", "gpu.rates.cpu"
# What is written on the command line, the key the refusal names, what it says is allowed.
REFUSED = [
    # Negative, zero, no number.
    ([f"{GPU}.memory=-1"], f"{GPU}.memory = -1", "from 1e+06 to 1e+14 bytes/s"),
    ([f"{GPU}.memory=0"], f"{GPU}.memory = 0", "A GB/s is 1e9"),
    ([f"{GPU}.memory=fast"], f"{GPU}.memory = 'fast'", "a finite number"),
    ([f"{GPU}.memory=true"], f"{GPU}.memory = True", "a finite number"),
    ([f"{GPU}.memory=nan"], f"{GPU}.memory", "a finite number"),
    ([f"{GPU}.memory=inf"], f"{GPU}.memory", "a finite number"),
    ([f"{GPU}.memory=[1e9]"], f"{GPU}.memory", "a finite number"),
    ([f"{GPU}.unpack=-3e9"], f"{GPU}.unpack", "bytes/s"),
    ([f"{GPU}.step=-1e-6"], f"{GPU}.step", "from 0 to 1 seconds"),
    ([f"{GPU}.step=60"], f"{GPU}.step = 60", "A microsecond is 1e-6"),
    (["gpu.rates.price_per_hour=-2"], "gpu.rates.price_per_hour = -2", "from 0 to 10000"),
    (["gpu.rates.price_per_hour=1e6"], "gpu.rates.price_per_hour", "US dollars per hour"),
    (["gpu.rates.price_per_hour=cheap"], "gpu.rates.price_per_hour = 'cheap'", "a finite number"),
    # The wrong unit: GB/s, TFLOP/s, GFLOP/s; FLOP/s beyond any machine.
    ([f"{GPU}.memory=270"], f"{GPU}.memory = 270", "A GB/s is 1e9"),
    ([f"{CPU}.memory=60.0"], f"{CPU}.memory = 60.0", "from 1e+06 to 1e+14 bytes/s"),
    ([f"{GPU}.memory=1e17"], f"{GPU}.memory", "from 1e+06 to 1e+14 bytes/s"),
    (
        [f"{GPU}.matrix={{float16: {{7168: {{1: 21.24}}}}}}"],
        f"{GPU}.matrix.float16.7168.1 = 21.24",
        "A TFLOP/s is 1e12",
    ),
    (
        [f"{GPU}.matrix={{float16: {{7168: {{1: 21240}}}}}}"],
        f"{GPU}.matrix.float16.7168.1",
        "from 1e+06 to 1e+16 FLOP/s",
    ),
    (
        [f"{GPU}.matrix={{float16: {{7168: {{1: 2e16}}}}}}"],
        f"{GPU}.matrix.float16.7168.1",
        "from 1e+06 to 1e+16 FLOP/s",
    ),
    ([f"{GPU}.prefill_attention={{512: 9.97}}"], f"{GPU}.prefill_attention.512 = 9.97", "FLOP/s"),
    (["gpu.rates.transfers.h2d_pageable=3"], "gpu.rates.transfers.h2d_pageable = 3", "A GB/s is 1e9"),
    (["gpu.links.h2d=12"], "gpu.links.h2d = 12", "A GB/s is 1e9"),
    (["gpu.links.h2d=-1"], "gpu.links.h2d = -1", "more than zero bytes/s"),
    (["gpu.links.h2d=inf"], "gpu.links.h2d = inf", "finite"),
    (["gpu.links.h2d=nan"], "gpu.links.h2d = nan", "finite"),
    # Missing, or of the wrong shape.
    ([f"{GPU}.memory=null"], f"{GPU}.memory = None", "gpu.rates.gpu states all of matrix, memory"),
    ([f"~{GPU}.unpack"], f"{GPU}.unpack = None", "must be given"),
    (["~gpu.rates.cpu.step"], f"{CPU}.step = None", "must be given"),
    ([f"{GPU}=0"], f"{GPU} = 0", "a mapping of matrix, memory"),
    ([f"{GPU}=12e12"], f"{GPU} =", "a mapping of matrix, memory"),
    ([f"{GPU}.matrix=21e12"], f"{GPU}.matrix =", "conf/gpu/t4.yaml"),
    ([f"{GPU}.matrix={{float16: 21e12}}"], f"{GPU}.matrix.float16 =", "a mapping with at least one entry"),
    (["~gpu.links.disk_write"], "gpu.links.disk_write = None", "State all of disk_read, disk_write, h2d, d2h"),
    (["~gpu.links.h2d"], "gpu.links.h2d = None", "or leave out gpu.rates"),
    # Unknown.
    ([f"+{GPU}.colour=1"], f"{GPU}.colour", "has attend, attend_sequence, decode_attention, launch"),
    (["+gpu.rates.tpu=1"], "gpu.rates.tpu", "has cpu, gpu, links"),
    (["+gpu.rates.transfers.d2d=1e9"], "gpu.rates.transfers = 'd2d'", "d2h_pageable"),
    (["+gpu.links.nvlink=1e9"], "nvlink", "one of disk_read"),
    (["+gpu.rates.links.nvlink=1e9"], "gpu.rates.links = 'nvlink'", "one of d2h"),
    # Impossible beside each other.
    (
        [f"{GPU}.decode_attention={{float16: {{1: 3e11}}}}"],
        f"{GPU}.decode_attention.float16.1 = 3000",
        "at most gpu.rates.gpu.memory = 2.7e+11",
    ),
    ([f"{CPU}.memory=1e10"], f"{CPU}.decode_attention.float16.1", "at most gpu.rates.cpu.memory = 1e+10"),
    (["gpu.links.disk_read=7e10"], "gpu.links.disk_read = 7000", "at most gpu.rates.cpu.memory = 6e+10"),
    (["gpu.links.disk_write=1e12"], "gpu.links.disk_write", "is the unit of one of the two wrong?"),
    (["gpu.links.h2d=9e13"], "gpu.links.h2d = 9", "at most gpu.rates.gpu.memory = 2.7e+11"),
    (["gpu.links.d2h=3e11"], "gpu.links.d2h = 3", "is the unit of one of the two wrong?"),
    # A unit that was forgotten.
    (["gpu.gpu_memory=16"], "gpu.gpu_memory = 16", "at least 1 MiB"),
    (["gpu.cpu_memory='208'"], "gpu.cpu_memory = '208'", "as in 16GB"),
]


@pytest.mark.usefixtures("_hydra")
@pytest.mark.parametrize(("overrides", "key", "allowed"), REFUSED, ids=lambda v: str(v)[:48])
def test_a_constant_that_cannot_be_is_refused(overrides: list[str], key: str, allowed: str) -> None:
    with pytest.raises(UserError) as refusal:
        hardware("gpu=t4", *overrides)
    assert key in str(refusal.value)
    assert allowed in str(refusal.value)


@pytest.mark.usefixtures("_hydra")
def test_constants_may_be_changed_on_the_command_line() -> None:
    changed = hardware(
        "gpu=t4",
        "gpu.rates.gpu.memory=3e11",
        "gpu.links.disk_read=5e9",
        "gpu.cpu_memory=64GB",
        "gpu.rates.price_per_hour=null",
    )
    assert changed.rates is not None
    assert changed.rates.sites[Tier.GPU].memory == 3e11
    assert changed.rates.price_per_hour is None
    assert changed.links["disk_read"] == 5e9
    assert changed.cpu_memory_bytes == 64 * 10**9


@pytest.mark.usefixtures("_hydra")
def test_a_machine_without_rates_needs_no_links() -> None:
    assert hardware("gpu=t4", "gpu.rates=null", "~gpu.links.h2d").rates is None


# What a file may say and a command line cannot, since Hydra adds no keys to tables that are there.
TABLES = [
    ("prefill_attention", {0: 1e13}, "prefill_attention = 0", "keys are sizes from 1"),
    ("prefill_attention", {"long": 1e13}, "prefill_attention = 'long'", "keys are sizes from 1"),
    ("prefill_attention", {"\u00b2": 1e13}, "prefill_attention = '\u00b2'", "keys are sizes from 1"),
    ("prefill_attention", {512.5: 1e13}, "prefill_attention = 512.5", "keys are sizes from 1"),
    ("prefill_attention", {512: "1e13 FLOP/s"}, "prefill_attention.512 = '1e13 FLOP/s'", "a finite number"),
    ("prefill_attention", {}, "prefill_attention = {}", "at least one entry"),
    ("matrix", {"int8": {7168: {1: 1e12}}}, "matrix = 'int8'", "a dtype such as float16"),
    ("matrix", {"float16": {7168: 1e12}}, "matrix.float16.7168 = 10000", "a mapping with at least one entry"),
    ("matrix", {"float16": {7168: {}}}, "matrix.float16.7168 = {}", "a mapping with at least one entry"),
    ("matrix", {"float16/4": {7168: {1: 1e12}}}, "matrix = ['float16/4']", "plain dtype such as float16"),
    (
        "decode_attention",
        {"float16": {1: 1e9}, "float16/5": {1: 1e9}},
        "decode_attention = 'float16/5'",
        "such as float16/4",
    ),
    ("decode_attention", {"float16/4": {1: 1e9}}, "decode_attention = ['float16/4']", "plain dtype such as float16"),
]


@pytest.mark.parametrize(("name", "table", "key", "allowed"), TABLES, ids=lambda v: str(v)[:48])
def test_a_table_that_cannot_be_is_refused(name: str, table: Any, key: str, allowed: str) -> None:
    data = to_json(rates_of("t4"))
    data["gpu"][name] = table
    with pytest.raises(UserError) as refusal:
        from_json(Rates, data, "gpu.rates")
    assert f"{GPU}.{key}" in str(refusal.value)
    assert allowed in str(refusal.value)


def test_measured_constants_may_be_noisy() -> None:
    """Their spread says that they are measured: a neighbour that slows one of them down must not stop a run."""
    data = to_json(hardware_profile("t4"))
    data["rates"]["gpu"]["decode_attention"] = {"float16": {"1": 1.2 * data["rates"]["gpu"]["memory"]}}
    with pytest.raises(UserError):
        from_json(HardwareProfile, data, "gpu")
    data["rates"]["spread"] = {"gpu.memory": 0.4}
    assert from_json(HardwareProfile, data, "gpu").rates is not None


def test_a_new_machine_is_one_file(tmp_path: Path) -> None:
    """In a folder of the user's own, as with --config-dir; nothing else has to know it."""
    text = OmegaConf.load(conf_dir() / "gpu" / "rtx3090.yaml")
    OmegaConf.update(text, "name", "rtx5090")
    OmegaConf.update(text, "rates.gpu.memory", 1.6e12)
    (tmp_path / "gpu").mkdir()
    OmegaConf.save(text, tmp_path / "gpu" / "rtx5090.yaml")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        mine = hardware(f"hydra.searchpath=[file://{tmp_path}]", "gpu=rtx5090")
        with pytest.raises(UserError, match="rtx5090"):
            hardware("gpu=rtx5090")
    assert mine.name == "rtx5090"
    assert mine.rates is not None
    assert mine.rates.sites[Tier.GPU].memory == 1.6e12
