"""``dtype=fastest``: by measured rates of both ways of computing, else by the processor; settled before a cell has its
hash."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hydra import initialize_config_dir

from flexgen_bench.cells.budget import Fitted
from flexgen_bench.cells.compose import composed, plan
from flexgen_bench.config.build import cell_spec, hardware_profile
from flexgen_bench.config.cell import Cell
from flexgen_bench.config.paths import conf_dir
from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.instructions import Level
from flexgen_bench.core.model import DType
from flexgen_bench.core.rates import Rates
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.fastest_dtype import fastest_dtype
from tests.support.planner_machines import host

ROWS = (1, 32, 256)


def with_rates(ours: Mapping[str, float], torch: Mapping[str, float]) -> HardwareProfile:
    """A processor with these GFLOP/s at any number of rows."""

    def table(rates: Mapping[str, float]) -> Any:
        return {dtype: {2048: dict.fromkeys(ROWS, rate * 1e9)} for dtype, rate in rates.items()}

    profile = host(None)  # type: ignore[arg-type]
    assert profile.rates is not None
    site = replace(profile.rates.sites[Tier.CPU], matrix=table(ours), torch_matrix=table(torch))
    return replace(profile, rates=replace(profile.rates, sites={Tier.CPU: site}))


@pytest.mark.parametrize(
    ("ours", "torch", "fastest"),
    [
        # AVX2: our kernels read bfloat16 as fast as float32, torch takes ten times as long.
        ({"float32": 150, "bfloat16": 158}, {"float32": 150, "bfloat16": 14}, DType.FLOAT32),
        # AMX.
        ({"float32": 300, "bfloat16": 900}, {"float32": 300, "bfloat16": 1000}, DType.BFLOAT16),
        # Torch's alone are not known: what is measured is taken for both.
        ({"float32": 150, "bfloat16": 158}, {}, DType.BFLOAT16),
        (
            {"float32": 300, "bfloat16": 300, "float16": 340},
            {"float32": 320, "bfloat16": 190, "float16": 339},
            DType.FLOAT16,
        ),
    ],
)
def test_by_rates(ours: dict[str, float], torch: dict[str, float], fastest: DType) -> None:
    for level in Level:
        assert fastest_dtype(with_rates(ours, torch), level) is fastest


def test_rates_of_torch_survive_a_file() -> None:
    rates = with_rates({"float32": 1}, {"float32": 2}).rates
    assert rates is not None
    assert from_json(Rates, to_json(rates), "gpu.rates") == rates
    site = rates.sites[Tier.CPU]
    assert site.torch_matrix_rate(DType.FLOAT32, 32, 2048) == pytest.approx(2e9)
    nearest = site.torch_matrix_rate(DType.BFLOAT16, 32, 2048)
    assert nearest == pytest.approx(2e9)
    assert "torch_matrix" not in to_json(replace(site, torch_matrix={}))


def test_by_the_processor_where_nothing_is_measured() -> None:
    cpu = HardwareProfile("cpu", Accelerator.NONE)
    assert fastest_dtype(cpu, Level.AVX2) is DType.FLOAT32
    assert fastest_dtype(cpu, Level.AVX512) is DType.FLOAT32
    assert fastest_dtype(cpu, Level.AVX512_BF16) is DType.BFLOAT16
    assert fastest_dtype(cpu, Level.AMX) is DType.BFLOAT16
    assert fastest_dtype(HardwareProfile("g", Accelerator.CUDA), Level.AVX2) is DType.FLOAT16
    assert fastest_dtype(hardware_profile("t4"), Level.AMX) is DType.FLOAT16


class Machine:
    """Computes ``dtype`` fastest; leaves out of a workload what it is told to."""

    def __init__(self, dtype: DType, fit: Fitted | None = None) -> None:
        self.dtype, self.fit = dtype, fit or Fitted({}, "")
        self.asked: list[tuple[set[str], float, set[str]]] = []

    def fastest(self, hardware: HardwareProfile, threads: int) -> DType:
        return self.dtype

    def fitted(self, cells: Mapping[str, Cell], budget_s: float, stated: Collection[str]) -> Fitted:
        self.asked.append((set(cells), budget_s, set(stated)))
        return self.fit


def cells(machine: Machine, *overrides: str, suite: str = "default") -> list[Cell]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        conf = composed(list(overrides))
        return list(plan(conf, overrides, suite, machine).cells)


def test_all_systems_of_a_cell_have_the_dtype_and_their_hash_holds_it() -> None:
    hashes = []
    for dtype in (DType.FLOAT32, DType.BFLOAT16):
        found = [c for c in cells(Machine(dtype)) if c.name == "capped"]
        assert {c.spec.dtype for c in found} == {dtype}
        for cell in found:
            assert f"dtype={dtype}" in cell.command, "made again on another machine, it is the same"
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            plain = cell_spec(
                composed(
                    [
                        "system=flexgen",
                        "model=opt-1.3b",
                        "weights=dummy",
                        f"dtype={dtype}",
                        "workload=32-32",
                        "workload.num_prompts=16",
                        "workload.gen_len=16",
                        "gpu=cpu",
                        "gpu.cpu_memory=2.25GiB",
                        "measure.repetitions=1",
                        "measure.warmup=0",
                        "measure.batch_sizes=[4,16]",
                        "measure.time_limit_s=300",
                    ]
                )
            )
        assert found[0].spec.spec_hash == plain.spec_hash
        hashes.append(plain.spec_hash)
    assert hashes[0] != hashes[1]


def test_an_unknown_dtype_is_refused_naming_this_one() -> None:
    with pytest.raises(UserError, match="fastest"):
        cells(Machine(DType.FLOAT32), "model=opt-125m", "dtype=quickest")


def test_a_smaller_workload_is_the_same_for_all_and_in_the_command() -> None:
    """Whichever system is asked for, all of the cell decide: else tables would hold different jobs."""
    machine = Machine(DType.FLOAT32, Fitted({"gen_len": 8}, "reduced: why"))
    alone = cells(machine, "suite=default", "system=flexgen")
    assert machine.asked[0][0] == {"flexgen", "accelerate", "deepspeed", "transformers"}
    for cell in alone:
        assert cell.spec.workload.gen_len == 8
        assert cell.note == "reduced: why"
        assert "workload.gen_len=8" in cell.command
        assert "measure.budget_s=null" in cell.command, "made again, it is not made smaller again"
    [capped] = [c for c in alone if c.name == "capped"]
    assert capped.spec.workload.name == "32-8"


def test_options_of_one_system_are_not_asked_of_the_others() -> None:
    machine = Machine(DType.FLOAT32)
    [cell] = cells(machine, "suite=default", "cell=capped", "system=accelerate", "system.options.offload=cpu")
    assert cell.spec.system_options["offload"] == "cpu"
    assert len(machine.asked[0][0]) == 4


def test_what_the_command_line_says_stays() -> None:
    machine = Machine(DType.FLOAT32)
    cells(machine, "workload.gen_len=12", "measure.budget_s=5")
    assert {(budget, "gen_len" in stated) for _, budget, stated in machine.asked} == {(5.0, True)}
    machine = Machine(DType.FLOAT32)
    cells(machine, "measure.budget_s=null")
    cells(machine, "model=opt-125m")
    assert not machine.asked
    with pytest.raises(UserError, match=r"measure\.budget_s"):
        cells(machine, "measure.budget_s=0")
