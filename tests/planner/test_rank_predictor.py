"""What this engine is predicted to do over several ranks, and how a model is divided among them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_bench.core.compression import EXACT
from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType
from flexgen_bench.core.pipeline import Stage
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.engine_predictor import EnginePredictor
from flexgen_bench.planner.rank_machines import RankMachine, in_one_machine, machines_of
from flexgen_bench.planner.rank_plans import Ranks
from flexgen_bench.planner.rank_stages import divided
from flexgen_bench.schedule.sequence_groups import Request
from tests.support.planner_machines import CPU_SITE, GPU_SITE, MIB, accelerator, host, model_of, site, small_opt

CPU, GPU = Placement.all_on(Tier.CPU), Placement.all_on(Tier.GPU)
SHAPE = small_opt(layers=8, hidden=256)
REQUEST = Request(32, 8)


def job(hardware: HardwareProfile, ranks: int = 1, prompts: int | None = 8) -> Job:
    return Job(SHAPE, DType.FLOAT16, hardware, REQUEST.prompt_len, REQUEST.gen_len, prompts, num_gpus=ranks)


def predicted(asked: Job, policy: Policy | None = None) -> Prediction:
    return EnginePredictor({}, {"policy": policy}).predict(asked)


def counts(stages: tuple[Stage, ...]) -> list[int]:
    return [len(stage.layers) for stage in stages]


def test_a_given_policy_is_simulated_on_all_ranks() -> None:
    done = predicted(job(accelerator(), 4), Policy(2, 1, GPU, GPU, GPU))
    assert done.batch_size == done.num_prompts == 8  # four waves of two
    assert done.settings["layers_per_rank"] == [2, 2, 2, 2]
    assert len(done.settings["bubble"]) == 4
    assert all(0 < bubble < 1 for bubble in done.settings["bubble"])
    assert {"gpu", "gpu:1", "gpu:2", "gpu:3"} <= set(done.bytes)
    assert {"gpu", "gpu:1", "gpu:2", "gpu:3", "net_out"} <= set(done.lane_busy_s)
    assert done.bottleneck.startswith(("gpu of rank", "h2d of rank"))
    assert "is the slowest" in " ".join(done.settings["why"])


def test_weights_that_fit_only_over_four_ranks_make_them_more_than_four_times_as_fast() -> None:
    """The paper's OPT-6.7B and OPT-30B: what one accelerator loads in every pass, four of them hold."""
    weights = model_of(SHAPE).packed.file_bytes
    machine = accelerator(gpu_memory=weights // 2 + 8 * MIB, kind=Accelerator.EMULATED, h2d=2e8)
    one, four = predicted(job(machine, 1)), predicted(job(machine, 4, 32))
    assert four.tok_per_s > 4 * one.tok_per_s


def test_a_policy_is_found_that_fits_every_rank() -> None:
    machine = accelerator(gpu_memory=48 * MIB, cpu_memory=256 * MIB, kind=Accelerator.EMULATED)
    done = predicted(job(machine, 3, None))
    assert done.settings["layers_per_rank"] == [2, 3, 3] or sum(done.settings["layers_per_rank"]) == 8
    for name, size in done.bytes.items():
        if name.startswith("cpu"):
            assert size <= 256 * MIB, name
    assert done.num_prompts == 4 * done.batch_size


def test_a_network_that_binds_is_named() -> None:
    done = predicted(job(accelerator(net_out=2e5, net_in=2e5), 2), Policy(2, 1, GPU, GPU, GPU))
    assert done.bottleneck.startswith("net_out of rank 0")
    assert "the link to other ranks" in " ".join(done.settings["why"])


def test_what_fits_no_rank_says_so() -> None:
    with pytest.raises(DoesNotFit):
        predicted(job(accelerator(gpu_memory=MIB, cpu_memory=MIB, disk=MIB), 2), Policy(2, 1, CPU, CPU, CPU))


def test_more_ranks_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"gpu\.count"):
        predicted(job(accelerator(), 9), Policy(1, 1, GPU, GPU, GPU))


def test_a_profile_of_several_devices_is_ranks_of_one_machine() -> None:
    """They share the host: the same policy is slower there than on a machine for each."""
    on_disk = Policy(2, 1, Placement.all_on(Tier.DISK), CPU, CPU)
    machine = accelerator(disk_read=1e8)
    apart = predicted(job(machine, 2), on_disk)
    together = predicted(job(replace(machine, count=2)), on_disk)
    assert together.total_s > 1.5 * apart.total_s
    stated = replace(machine, count=2, layers_per_rank=(3, 5))
    assert predicted(job(stated), on_disk).settings["layers_per_rank"] == [3, 5]
    assert len(machines_of(job(replace(machine, count=2), 2))) == 4


def test_like_machines_have_as_many_layers_each() -> None:
    assert counts(divided(model_of(SHAPE), in_one_machine(host(), 4), REQUEST)) == [2, 2, 2, 2]


def test_unlike_machines_have_unlike_numbers_of_layers() -> None:
    """A faster one more; one with less memory, which has to load what does not fit, fewer; also where no rates are
    known."""
    model = model_of(SHAPE)
    layer = model.packed.units[1].home_bytes

    def over(*machines: HardwareProfile) -> list[int]:
        return counts(divided(model, [RankMachine(one, number) for number, one in enumerate(machines)], REQUEST))

    plain = accelerator()
    fast = accelerator(gpu=replace(site(flops=3e12, memory=3e11), operator=1e-7))
    assert over(plain, fast)[1] >= 5
    assert over(fast, plain)[0] >= 5
    small = accelerator(gpu_memory=2 * layer, h2d=1e8, gpu=GPU_SITE, cpu=CPU_SITE)
    assert over(small, plain)[0] < 4
    unknown = [replace(plain, rates=None, gpu_memory_bytes=size * layer) for size in (20, 60)]
    assert over(*unknown)[1] >= 5
    with pytest.raises(UserError, match="layers_per_rank"):
        over(replace(unknown[0], gpu_memory_bytes=None), unknown[1])


def test_unequal_ranks_are_predicted_with_unequal_layers() -> None:
    plain, fast = accelerator(), accelerator(gpu=replace(site(flops=3e12, memory=3e11), operator=1e-7))
    ranks = Ranks(job(plain, 2), (RankMachine(plain, 0), RankMachine(fast, 1)), (EXACT,))
    found = ranks.forecast(Policy(4, 1, GPU, GPU, GPU), 8)
    assert counts(ranks.stages)[1] >= 5
    even = replace(ranks, job=replace(ranks.job, hardware=replace(plain, count=2, layers_per_rank=(4, 4))))
    assert counts(even.stages) == [4, 4]
    assert found.total_s < even.forecast(Policy(4, 1, GPU, GPU, GPU), 8).total_s
