"""Memory that is refused in the middle of a job, and memory that comes back after any failure."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from flexgen_bench import Placement, Policy
from flexgen_bench.core.errors import OutOfMemory
from flexgen_bench.core.status import Status
from flexgen_bench.core.tiers import Lane, Site, Tier
from flexgen_bench.core.units import MIB
from flexgen_bench.engine import actions
from flexgen_bench.engine.actions import Actions
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import Engine
from flexgen_bench.engine.executor import Executor
from flexgen_bench.memory import host
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.schedule.steps import Step
from tests.support.failing_hardware import DISK, HOST, NEW_TOKENS, RIGS, Leftovers, Tiny

pytest_plugins = "tests.support.failure_fixtures"


@pytest.mark.one_in(5)
@pytest.mark.parametrize("after", [0, 3, 17])
@pytest.mark.parametrize(
    ("error", "tier"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "gpu"),
        (MemoryError("cannot allocate"), "cpu"),
    ],
)
def test_memory_that_runs_out_in_a_step(
    engine: Engine, tiny: Tiny, offload: Path, error: Exception, tier: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftovers, left = Leftovers(offload), [after]
    real = actions.decode_attention

    def attention(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise error
        return real(*arguments)

    monkeypatch.setattr(actions, "decode_attention", attention)
    with pytest.raises(OutOfMemory, match=f"out of memory on tier {tier} in step attend of unit") as caught:
        engine.generate(tiny.sequences())
    assert "micro-batch" in str(caught.value)
    assert "lower" in str(caught.value), "what to do"
    assert caught.value.status is Status.OOM
    leftovers.check()
    tiny.check(engine)


@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_refused_before_the_first_pass(
    engine: Engine, tiny: Tiny, offload: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every single allocation of a job: what was allocated before it must go."""
    leftovers, real, left = Leftovers(offload), Device.allocate, [-1]

    def refusing(self: Device, tier: Tier, num_bytes: int) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return real(self, tier, num_bytes)

    monkeypatch.setattr(Device, "allocate", refusing)
    engine.release_kept()
    tiny.check(engine)
    count = -1 - left[0]
    assert count > 2
    engine.release_kept()
    for number in range(1, count + 1):
        left[0] = number
        with pytest.raises(OutOfMemory, match=r"out of memory on tier .* in allocating .* of \w+"):
            engine.generate(tiny.sequences())
        leftovers.check()
    tiny.check(engine)


@pytest.mark.parametrize("rig", RIGS)
def test_memory_refused_while_the_engine_opens(
    rig: str, tiny: Tiny, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftovers, real, left = Leftovers(offload), Device.allocate, [-1]

    def refusing(self: Device, tier: Tier, num_bytes: int) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("no")
        return real(self, tier, num_bytes)

    monkeypatch.setattr(Device, "allocate", refusing)
    tiny.engine(rig, offload).close()
    count = -1 - left[0]
    assert count >= 1
    for number in range(1, count + 1):
        left[0] = number
        with pytest.raises(OutOfMemory, match=r"in allocating .* of "):
            tiny.engine(rig, offload)
        leftovers.check()


def test_a_job_that_the_system_has_no_memory_for(tiny: Tiny, offload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real refusal: the address space of this process is limited to what it has, and a little."""
    policy = Policy(2000, 1, DISK[0], Placement(cpu=1.0), DISK[0])
    engine = tiny.weights.engine(policy, Device.open(HOST, 1), offload)
    many = replace(tiny, prompts=tiny.prompts * 400)
    leftovers, limits = Leftovers(offload), resource.getrlimit(resource.RLIMIT_AS)
    size = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (size + 32 * MIB, limits[1]))
    try:
        with pytest.raises(OutOfMemory, match=r"on tier cpu in allocating .* of kv_cache: cannot allocate"):
            engine.generate(many.sequences())
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    leftovers.check()
    tiny.check(engine)
    engine.close()


def test_a_system_without_another_thread(
    engine: Engine, tiny: Tiny, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftovers, real = Leftovers(offload), threading.Thread.start

    def start(self: threading.Thread) -> None:
        if self.name == f"lane-{Lane.CPU}":
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OutOfMemory, match=r"starting the lanes: can't start new thread.*ulimit"):
        engine.generate(tiny.sequences())
    leftovers.check()
    monkeypatch.undo()
    tiny.check(engine)


class Memory:
    """Every region of host memory that is still there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = bytes_ = [0]

        class Counted(host._Region):
            def __init__(self, fileno: int, size: int, **options: int) -> None:
                self.counted = size
                bytes_[0] += size

            def __del__(self) -> None:
                bytes_[0] -= self.counted
                super().__del__()

        monkeypatch.setattr(host, "_Region", Counted)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("when", ["load_weights", "load_kv", "attend", "output", "sample", "callback", "construction"])
@pytest.mark.parametrize("rig", RIGS)
def test_memory_is_back_before_the_error_is_forgotten(
    rig: str, when: str, tiny: Tiny, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error's traceback once held caches and slots, and itself; whoever kept it, or kept none, kept the memory."""
    memory = Memory(monkeypatch)
    engine = tiny.engine(rig, offload)
    gc.collect()
    of_engine = memory.bytes[0]
    assert of_engine > 0
    tiny.check(engine)  # what this job leaves for the next is the next one's
    seen = []
    real = Actions.act

    def act(self: Actions, step: Step) -> None:
        real(self, step)
        if (step.kind == when and step.token > 1) or (when == "load_weights" and step.kind == when):
            seen.append(memory.bytes[0])
            held = self._cache, self._hidden  # as the frames inside an action hold them
            raise OSError(len(held), "odd")

    def callback(phase: str, done: int, total: int) -> None:
        if when == "callback" and phase == "decode":
            seen.append(memory.bytes[0])
            raise OSError(1, "odd")

    if when == "construction":
        monkeypatch.setattr(Executor, "__init__", lambda *_: seen.append(memory.bytes[0]) or 1 / 0)
    else:
        monkeypatch.setattr(Actions, "act", act)
    gc.disable()
    try:
        with pytest.raises((OSError, ZeroDivisionError)) as caught:
            engine.generate(tiny.sequences(), callback)
        assert memory.bytes[0] == of_engine
        assert caught.value is not None
    finally:
        gc.enable()
    assert max(seen) > of_engine, "the job had memory of its own"
    engine.close()
    assert memory.bytes[0] == 0


FAILING_JOBS = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.engine import test_memory_failures
test_memory_failures.print_growth_over_failing_jobs(Path(sys.argv[1]))
"""


def print_growth_over_failing_jobs(folder: Path) -> None:
    """In a process of its own: by how much the resident set grows over eight failures, and what one job holds."""
    tiny = Tiny.make(folder)
    many = replace(tiny, prompts=tiny.prompts * 480)
    everything = Placement(cpu=1.0)
    policy = Policy(2400, 1, everything, everything, everything)
    engine = tiny.weights.engine(policy, Device.open(HOST, 1), folder / "offload")
    plan = engine.plan([Request(len(p), NEW_TOKENS) for p in many.prompts])

    def fail() -> int:
        def stop(phase: str, done: int, total: int) -> None:
            if phase == "decode":
                raise ValueError("enough")

        with pytest.raises(ValueError, match="enough"):
            engine.generate(many.sequences(), stop)
        return int(psutil.Process().memory_info().rss)

    gc.disable()
    before = fail()
    after = [fail() for _ in range(8)][-1]
    print(after - before, plan.bytes[Site.CPU]["kv_cache"])


@pytest.mark.slow
def test_the_resident_set_does_not_grow_from_failure_to_failure(tmp_path: Path) -> None:
    """Without the garbage collector's help. The C library is told to give memory back: what it keeps for later, in
    a heap for every thread, is up to 100 MiB more or less, after good jobs as after bad ones."""
    threshold = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FAILING_JOBS.format(root=str(root)), str(tmp_path)],
        env=os.environ | threshold,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown, of_a_job = map(int, done.stdout.splitlines()[-1].split())
    assert of_a_job > 40 * MIB
    assert grown < of_a_job // 2
