"""How a machine is divided among ranks, and what torchrun's variables may be."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.pipeline import even_stages
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.rates import Rates
from flexgen_bench.core.tiers import Site, Tier
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.machine.measured_rates import Calibration, describe, path_for
from flexgen_bench.machine.measured_rates import save as save_rates
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.ranks import division
from flexgen_bench.ranks.commands import Setup
from flexgen_bench.ranks.division import VISIBLE, divide
from flexgen_bench.ranks.ranks import Ranks
from flexgen_bench.ranks.torchrun import Torchrun
from flexgen_bench.schedule.sequence_groups import Request
from tests.support import planner_machines
from tests.support.tiny_models import EMULATED, HOST, random_model, save

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_one_rank_has_the_whole_machine() -> None:
    machine = HardwareProfile("big", Accelerator.NONE, cpu_memory_bytes=2**40)
    whole = divide(machine, 8)
    assert (whole.ranks, whole.hardware, whole.threads) == (1, machine, 8)


def test_ranks_of_a_machine_share_its_memory_threads_and_disk_but_not_their_devices() -> None:
    machine = replace(
        EMULATED,
        count=4,
        cpu_memory_bytes=2**30,
        disk_bytes=2**32,
        links={"h2d": 4e9, "disk_read": 8e8, "net_out": 1e8},
    )
    part = divide(machine, 6)
    assert (part.ranks, part.here, part.threads) == (4, 4, 1)
    assert (part.hardware.cpu_memory_bytes, part.hardware.disk_bytes) == (2**28, 2**30)
    assert part.hardware.gpu_memory_bytes == EMULATED.gpu_memory_bytes
    assert part.hardware.links == {"h2d": 4e9, "disk_read": 2e8, "net_out": 1e8}
    assert part.hardware.count == 1


def test_what_is_free_is_divided_where_nothing_is_stated() -> None:
    one, two = divide(HOST, 2, ranks=2).hardware, divide(HOST, 2, ranks=4).hardware
    assert one.cpu_memory_bytes is not None
    assert two.cpu_memory_bytes is not None
    assert 1.5 < one.cpu_memory_bytes / two.cpu_memory_bytes < 2.5


def test_free_disk_is_divided_too(tmp_path: Path) -> None:
    """Each rank planned with all that was free of it."""
    free = psutil.disk_usage(str(tmp_path)).free
    part = divide(HOST, 4, ranks=4)
    assert part.hardware.disk_bytes is None
    found = part.with_disk(part.hardware, tmp_path).disk_bytes
    assert found is not None
    assert 0.5 < 4 * found / free < 1.5
    assert part.with_disk(replace(part.hardware, disk_bytes=5), tmp_path).disk_bytes == 5


def test_rates_are_those_of_the_whole_machine_divided(tmp_path: Path) -> None:
    """They were looked for as if each rank's few threads had been calibrated, and never found."""
    links = {"disk_read": 8e8, "disk_write": 4e8}
    rates = Rates({Tier.CPU: planner_machines.CPU_SITE}, links=links)
    save_rates(Calibration(rates, describe(4), "quick", "now"), path_for(tmp_path, 4))
    found = divide(HOST, 4, ranks=2).open_device(tmp_path).hardware.rates
    assert found is not None
    assert found.sites[Tier.CPU].memory == planner_machines.CPU_SITE.memory / 2
    assert found.links == {"disk_read": 4e8, "disk_write": 2e8}
    assert divide(HOST, 4).open_device(tmp_path).hardware.rates == rates


def test_layers_are_divided_evenly_unless_stated() -> None:
    assert [len(s.layers) for s in divide(HOST, 1, ranks=3).stages(10)] == [3, 4, 3]
    stated = replace(HOST, count=3, layers_per_rank=(1, 2, 7))
    assert [len(s.layers) for s in divide(stated, 1).stages(10)] == [1, 2, 7]


@pytest.mark.parametrize(
    ("machine", "ranks", "field"),
    [
        (HOST, 0, "ranks"),
        (HOST, True, "ranks"),
        (replace(HOST, count=2, layers_per_rank=(1, 2)), 3, "gpu.layers_per_rank"),
    ],
)
def test_numbers_that_contradict_each_other_are_named(machine: HardwareProfile, ranks: int | None, field: str) -> None:
    with pytest.raises(UserError) as raised:
        divide(machine, 1, ranks)
    assert raised.value.field == field


def test_ranges_that_do_not_cover_the_layers_are_named_before_anything_starts(tmp_path: Path) -> None:
    folder = save(random_model("opt"), tmp_path / "model")  # of 3 layers
    machine = replace(HOST, count=2, layers_per_rank=(1, 1))
    setup = Setup(folder, DType.FLOAT32, tmp_path, None, machine, 1, tmp_path)
    with pytest.raises(UserError, match=r"gpu.layers_per_rank = \[1, 1\]: .* the 3 layers of the model"):
        Ranks(divide(machine, 1), setup)
    with pytest.raises(UserError, match=r"gpu.count = 4: must be 1 to 3"):
        Ranks(divide(HOST, 1, ranks=4), setup)


def test_fewer_cuda_devices_than_ranks_are_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CannotRun, match=r"gpu.count = 2 .* has 1 CUDA devices"):
        divide(HardwareProfile("h200", Accelerator.CUDA, count=2), 8)


def test_torchrun_says_how_many_there_are() -> None:
    torchrun = Torchrun.of({**TORCHRUN, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert torchrun == Torchrun(1, 4, 2, 1, "node0", 29500)
    part = divide(HOST, 8, torchrun=torchrun)
    assert (part.ranks, part.here, part.rank, part.threads) == (4, 2, 1, 4)
    with pytest.raises(UserError, match="ranks = 3: must be 4, as many as torchrun has started"):
        divide(HOST, 8, ranks=3, torchrun=torchrun)
    with pytest.raises(UserError, match=r"gpu.count = 2: must be 4"):
        divide(replace(HOST, count=2), 8, torchrun=torchrun)


def test_a_device_that_each_process_has_been_given_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processes that see one device each, the second was refused, for too few, or took the first one's."""
    torchrun = Torchrun.of({**TORCHRUN, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert torchrun is not None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    machine = HardwareProfile("h200", Accelerator.CUDA)
    monkeypatch.setenv(VISIBLE, "7")
    assert divide(machine, 8, torchrun=torchrun).ranks == 4
    division._take_own_device(torchrun)
    assert os.environ[VISIBLE] == "7"
    monkeypatch.delenv(VISIBLE)
    with pytest.raises(CannotRun, match="has 1 CUDA devices"):
        divide(machine, 8, torchrun=torchrun)


def test_a_model_of_one_rank_does_not_mind_torchrun() -> None:
    """Programs whose processes each have a model of their own."""
    alone = divide(HOST, 8, 1, Torchrun.of(TORCHRUN))
    assert (alone.ranks, alone.rank, alone.torchrun, alone.threads) == (1, 0, None, 8)


def test_one_process_of_torchrun_is_no_rank() -> None:
    assert Torchrun.of({}) is None
    assert Torchrun.of({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(("name", "value"), [("RANK", "4"), ("RANK", "x"), ("MASTER_PORT", "70000")])
def test_variables_that_cannot_be_are_named(name: str, value: str) -> None:
    with pytest.raises(UserError, match=name):
        Torchrun.of({**TORCHRUN, name: value})


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_policy_is_chosen_for_one_rank_of_several(ranks: int, tmp_path: Path) -> None:
    """On devices that only together have room for all: everything stays on them, in as many blocks as there are ranks.
    (It was chosen as for a model with so few layers that was alone, and its block was divided afterwards: caches of all
    sequences of the job had to fit into one block's room, and a rank had room for more than it took.)"""
    folder = save(random_model("qwen2"), tmp_path / "model")
    weights = PackedWeights.from_checkpoint(folder, DType.FLOAT32, tmp_path / "cache")
    requests, stages, gpu = [Request(9, 6)] * 8, even_stages(4, ranks), Placement.all_on(Tier.GPU)

    def plans(policy: Policy, machine: HardwareProfile) -> list[MemoryPlan]:
        return [plan_job(weights.model, policy, machine, requests, stage=stage) for stage in stages]

    block = len(requests) // ranks
    needed = [sum(plan.bytes[Site.GPU].values()) for plan in plans(Policy(block, 1, gpu, gpu, gpu), EMULATED)]
    device = Device.open(replace(EMULATED, gpu_memory_bytes=max(needed)), 1)
    chosen = weights.choose_policy(device, tmp_path, requests, stages=stages)
    assert (chosen.block_size, chosen.weights, chosen.kv_cache) == (block, gpu, gpu)
    for plan in plans(chosen, device.hardware):
        plan.check({})
    assert weights.choose_policy(device, tmp_path, requests, ranks, stages=stages).block_size == 1


def test_profiles_of_one_device_are_written_as_before() -> None:
    """Else the hashes of every stored record would change."""
    written = to_json(HOST)
    assert not {"count", "layers_per_rank"} & set(written)
    ranks = replace(HOST, count=2, layers_per_rank=(1, 2))
    assert from_json(HardwareProfile, to_json(ranks), "gpu") == ranks
    with pytest.raises(UserError, match=r"gpu.count"):
        replace(HOST, count=0)
    for count, layers in ((2, (3,)), (1, (1, 2))):
        with pytest.raises(UserError, match=r"gpu.layers_per_rank"):
            replace(HOST, count=count, layers_per_rank=layers)
