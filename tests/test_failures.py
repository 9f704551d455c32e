"""What goes wrong in the middle of a job ends it with a clear error, leaves nothing behind, and the next job works."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from failing_hardware import (
    DISK,
    HOST,
    NEW_TOKENS,
    RIGS,
    FailingDisk,
    Leftovers,
    Tiny,
    open_files,
)
from tiny_models import random_model, random_prompts, save

from flexgen_bench import LLM, Placement, Policy, SamplingParams
from flexgen_bench.core.cell import CellSpec, MeasureSpec, ModelSpec
from flexgen_bench.core.errors import NotFinite, OutOfMemory, StoreError, UserError
from flexgen_bench.core.model import DType
from flexgen_bench.core.status import Status
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.units import MIB
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.engine import actions
from flexgen_bench.engine.actions import Actions
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import Engine
from flexgen_bench.engine.executor import Executor, LaneSettings
from flexgen_bench.memory import host
from flexgen_bench.memory.host import PAGE
from flexgen_bench.planner.cohorts import Request
from flexgen_bench.runner.cell import run_cell
from flexgen_bench.runner.endings import ending
from flexgen_bench.runner.events import SilentDisplay
from flexgen_bench.runner.job import CellState
from flexgen_bench.runner.prepare import Prepared
from flexgen_bench.schedule.steps import Step, StepKind


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(shared: Tiny, tmp_path: Path) -> Tiny:
    return shared.own_store(tmp_path)


@pytest.fixture
def offload(tmp_path: Path) -> Path:
    folder = tmp_path / "offload"
    folder.mkdir()
    return folder


@pytest.fixture(params=RIGS)
def engine(request: pytest.FixtureRequest, tiny: Tiny, offload: Path) -> Iterator[Engine]:
    """An open engine; closing it must leave nothing, whatever a test has done to it."""
    before = Leftovers(offload)
    made = tiny.engine(request.param, offload)
    yield made
    made.close()
    made.close()  # a second time does nothing
    before.check()
    with pytest.raises(UserError, match="must be open"):
        made.generate(tiny.sequences())


def told(error: BaseException) -> str:
    """All of what an error tells."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


# Disks


@pytest.mark.parametrize(
    ("call", "file", "number", "words"),
    [
        ("preadv", "weights.bin", errno.EIO, "could not read at byte"),
        ("preadv", "spill-", errno.EIO, "could not read at byte"),
        ("pwritev", "spill-", errno.EIO, "could not write at byte"),
        ("pwritev", "spill-", errno.ENOSPC, "disk full: could not write at byte"),
    ],
)
def test_a_disk_that_fails_in_the_middle(
    engine: Engine, tiny: Tiny, offload: Path, call: str, file: str, number: int, words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    disk, leftovers = FailingDisk(monkeypatch, call, file), Leftovers(offload)
    tiny.check(engine)
    requests = disk.count
    assert requests > 10
    for after in (0, requests // 3, requests - 1):
        disk.fail(after, number)
        with pytest.raises(StoreError, match=words) as caught:
            engine.generate(tiny.sequences())
        disk.heal()
        leftovers.check()
        message = told(caught.value)
        assert file in message
        assert "directory" in message, "what to do"
        # Rows of a table on disk are gathered by the cpu.
        lanes = ("disk_write",) if call == "pwritev" else ("disk_read", "cpu")
        assert any(f"(lane {lane}" in message for lane in lanes)
        tiny.check(engine)
    leftovers.check()


def test_a_full_disk_is_found_before_the_first_pass(tiny: Tiny, tmp_path: Path) -> None:
    """A real one: somebody else fills it while the engine is open."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)]
    if (
        os.geteuid() != 0
        or subprocess.run(command, check=False, capture_output=True).returncode != 0
    ):
        pytest.skip("a small file system needs root")
    try:
        engine, leftovers = tiny.engine("host", mount), Leftovers(mount)
        tiny.check(engine)
        filler = mount / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(mount).f_bavail * PAGE - 8 * PAGE)
        with pytest.raises(StoreError, match=r"disk full: could not reserve .* left\). Free space"):
            engine.generate(tiny.sequences())
        filler.unlink()
        leftovers.check()
        tiny.check(engine)
        engine.close()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_limit_on_the_size_of_files(tiny: Tiny, offload: Path) -> None:
    engine, leftovers = tiny.engine("emulated", offload), Leftovers(offload)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"could not reserve .*ulimit -f"):
            engine.generate(tiny.sequences())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    leftovers.check()
    tiny.check(engine)
    engine.close()


def test_a_limit_on_open_files(tiny: Tiny, offload: Path) -> None:
    engine, leftovers = tiny.engine("host", offload), Leftovers(offload)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(n) for n in os.listdir("/proc/self/fd"))
    held = [os.dup(0) for _ in range(highest)]  # no gaps below the limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, limits[1]))
    try:
        with pytest.raises((StoreError, UserError), match="Too many open files"):
            engine.generate(tiny.sequences())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in held:
            os.close(fd)
    leftovers.check()
    tiny.check(engine)
    engine.close()


# The weight store


def streamed(tiny: Tiny) -> tuple[int, str]:
    """Where the second layer lies, and the name of its first tensor."""
    unit = tiny.weights.packed.units[2]
    return unit.offset, unit.entries[0].tensor.sources[0]


@pytest.mark.parametrize("rig", RIGS)
def test_a_corrupt_block_is_named_and_repairing_it_is_enough(
    rig: str, tiny: Tiny, offload: Path
) -> None:
    at, name = streamed(tiny)
    good = tiny.file.read_bytes()
    leftovers = Leftovers(offload)
    flip(tiny.file, at)
    with pytest.raises(StoreError, match="the block is corrupt") as caught:  # noqa: PT012
        engine = tiny.engine(rig, offload)
        engine.generate(tiny.sequences())
    message = told(caught.value)
    assert name in message
    assert f"Delete {tiny.file.parent} to convert the checkpoint again" in message
    assert str(tiny.file) in message
    if (
        "in step" in message
    ):  # a unit that is streamed: the engine could be made, and can be used again
        assert "in step load_weights of unit 2 (lane disk_read)" in message
        with pytest.raises(StoreError, match="the block is corrupt"):
            engine.generate(tiny.sequences())
        tiny.file.write_bytes(good)
        tiny.check(engine)
        engine.close()
    leftovers.check()


def test_a_corrupt_table_is_found_when_the_engine_opens(tiny: Tiny, offload: Path) -> None:
    leftovers = Leftovers(offload)
    flip(tiny.file, tiny.weights.packed.tables[0].offset + 5)
    for rig in RIGS:
        with pytest.raises(StoreError, match=r"embed.* is wrong: the block is corrupt"):
            tiny.engine(rig, offload)
        leftovers.check()


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("beyond", [0, 1, PAGE - 3, PAGE, 2 * PAGE + 512])
def test_a_weight_file_truncated_while_in_use(
    engine: Engine, tiny: Tiny, offload: Path, beyond: int
) -> None:
    """Wherever it is cut: a direct read that ends within a page once asked the disk for the rest of the page."""
    good, leftovers = tiny.file.read_bytes(), Leftovers(offload)
    calls = []

    def truncate(phase: str, done: int, total: int) -> None:
        calls.append(phase)
        if len(calls) == 3:
            with tiny.file.open("r+b") as file:
                file.truncate(streamed(tiny)[0] + beyond)

    with pytest.raises(StoreError, match="too early: the file is truncated") as caught:
        engine.generate(tiny.sequences(), truncate)
    assert str(tiny.file) in str(caught.value)
    assert "lane disk_read" in told(caught.value)
    leftovers.check()
    tiny.file.write_bytes(good)
    tiny.check(engine)


def test_a_truncated_store_is_refused_by_the_next_process(shared: Tiny, tmp_path: Path) -> None:
    folder = save(random_model("llama-tied-grouped"), tmp_path / "ckpt")
    weights = PackedWeights.from_checkpoint(folder, DType.FLOAT32, tmp_path / "cache")
    os.truncate(weights.store.path, weights.packed.file_bytes - PAGE)
    with pytest.raises(StoreError, match=r"truncated or of another model. Delete"):
        PackedWeights.from_checkpoint(folder, DType.FLOAT32, tmp_path / "cache")


# Memory


@pytest.mark.parametrize("after", [0, 3, 17])
@pytest.mark.parametrize(
    ("error", "tier"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "gpu"),
        (MemoryError("cannot allocate"), "cpu"),
    ],
)
def test_memory_that_runs_out_in_a_step(
    engine: Engine, tiny: Tiny, offload: Path, error: Exception, tier: str, after: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    leftovers, left = Leftovers(offload), [after]
    real = actions.decode_attention

    def attention(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise error
        return real(*arguments)

    monkeypatch.setattr(actions, "decode_attention", attention)
    with pytest.raises(
        OutOfMemory, match=f"out of memory on tier {tier} in step attend of unit"
    ) as caught:
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
    tiny.check(engine)
    count = -1 - left[0]
    assert count > 2
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


def test_a_job_that_the_system_has_no_memory_for(
    tiny: Tiny, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real refusal: the address space of this process is limited to what it has, and a little."""
    policy = Policy(2000, 1, DISK[0], Placement(cpu=1.0), DISK[0])
    engine = tiny.weights.engine(policy, Device.open(HOST, 1), offload)
    many = replace(tiny, prompts=tiny.prompts * 400)
    leftovers, limits = Leftovers(offload), resource.getrlimit(resource.RLIMIT_AS)
    size = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (size + 32 * MIB, limits[1]))
    try:
        with pytest.raises(
            OutOfMemory, match=r"on tier cpu in allocating .* of kv_cache: cannot allocate"
        ):
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


@pytest.mark.parametrize(
    "when", ["load_weights", "load_kv", "attend", "output", "sample", "callback", "construction"]
)
@pytest.mark.parametrize("rig", RIGS)
def test_memory_is_back_before_the_error_is_forgotten(
    rig: str, when: str, tiny: Tiny, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error's traceback once held caches and slots, and itself; whoever kept it, or kept none, kept the memory."""
    memory = Memory(monkeypatch)
    engine = tiny.engine(rig, offload)
    tiny.check(engine)
    gc.collect()
    of_engine = memory.bytes[0]
    assert of_engine > 0
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
sys.path.insert(0, {tests!r})
import test_failures
test_failures.print_growth_over_failing_jobs(Path(sys.argv[1]))
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
    print(after - before, plan.bytes[Tier.CPU]["kv_cache"])


def test_the_resident_set_does_not_grow_from_failure_to_failure(tmp_path: Path) -> None:
    """Without the garbage collector's help. The C library is told to give memory back: what it keeps for later, in
    a heap for every thread, is up to 100 MiB more or less, after good jobs as after bad ones."""
    threshold = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", FAILING_JOBS.format(tests=str(tests)), str(tmp_path)],
        env=os.environ | threshold, cwd=tests.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown, of_a_job = map(int, done.stdout.splitlines()[-1].split())
    assert of_a_job > 40 * MIB
    assert grown < of_a_job // 2


# Numbers


def overflowing(folder: Path, name: str, factor: float) -> tuple[Path, Path]:
    """A model in which one matrix makes float16 overflow, though all of its weights are finite."""
    model = random_model("llama-multi-query")
    with torch.no_grad():
        matrix = dict(model.named_parameters())[name]
        matrix.mul_(factor)
        assert bool(torch.isfinite(matrix.half()).all())
    return save(model, folder / "ckpt"), folder / "cache"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.1.self_attn.v_proj.weight", "layer 1 has produced values"),
        ("model.layers.1.self_attn.k_proj.weight", "layer 1 has produced keys"),
        ("model.layers.0.mlp.down_proj.weight", "layer 1 has produced keys"),
        ("model.layers.2.mlp.down_proj.weight", "layer 2 has produced hidden states"),
        ("lm_head.weight", "the head has produced logits"),
    ],
)
@pytest.mark.parametrize("rig", RIGS)
def test_float16_that_overflows_names_the_layer(
    rig: str, name: str, words: str, tmp_path: Path, offload: Path
) -> None:
    hardware, policy = RIGS[rig]
    ckpt, cache = overflowing(tmp_path, name, 8e4)
    prompts, params = random_prompts([6, 3, 11]), SamplingParams(max_tokens=4, ignore_eos=True)
    settings: dict[str, Any] = {"cache_dir": cache, "policy": policy, "gpu": hardware, "threads": 1}
    with LLM(ckpt, dtype="float16", offload_dir=offload, **settings) as llm:
        leftovers = Leftovers(offload)
        for sampling in (params, replace(params, temperature=0.7)):
            with pytest.raises(NotFinite, match=f"{words} that are NaN or infinite") as caught:
                llm.generate(prompts, sampling)
            assert "bfloat16" in str(caught.value), "what to do"
            assert "in step" in told(caught.value)
            leftovers.check()
        with pytest.raises(NotFinite, match=words):
            llm.score(prompts, prompts)
        leftovers.check()
    with LLM(ckpt, dtype="float32", offload_dir=offload, **settings) as llm:
        assert len(llm.generate(prompts, params)) == 3


# Whoever drives the engine


@pytest.mark.parametrize("calls", [1, 4, 15])
def test_an_exception_in_the_progress_callback(
    engine: Engine, tiny: Tiny, offload: Path, calls: int
) -> None:
    leftovers, left = Leftovers(offload), [calls]

    def progress(phase: str, done: int, total: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise LookupError("the callback's own")

    with pytest.raises(LookupError, match="the callback's own"):
        engine.generate(tiny.sequences(), progress)
    leftovers.check()
    tiny.check(engine)


@pytest.mark.parametrize("error", [LookupError("odd"), SystemExit(3), StopIteration("odd")])
def test_an_exception_in_a_stop_test(
    engine: Engine, tiny: Tiny, offload: Path, error: BaseException
) -> None:
    leftovers = Leftovers(offload)

    def stop(new: list[int]) -> bool:
        if len(new) == 3:
            raise error
        return False

    sequences = tiny.sequences(stop_text=stop)
    with pytest.raises(type(error)) as caught:
        engine.generate(sequences)
    assert caught.value is error
    assert "in step sample of unit 4 (lane cpu" in told(error)
    leftovers.check()
    with pytest.raises(UserError, match=r"sequences\[\d\] = '[23] tokens from an earlier job'"):
        engine.generate(sequences)
    tiny.check(engine)


def test_an_exception_in_a_sampler(engine: Engine, tiny: Tiny, offload: Path) -> None:
    class Odd:
        def choose(self, logits: torch.Tensor) -> int:
            raise LookupError("no token is good enough")

    leftovers = Leftovers(offload)
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0)
    with pytest.raises(LookupError, match="good enough"):
        engine.generate(tiny.sequences(sampler=Odd(), params=params))
    leftovers.check()
    tiny.check(engine)


@pytest.mark.parametrize("token", [1, 4])
def test_an_interrupt_while_the_main_thread_waits(
    engine: Engine, tiny: Tiny, offload: Path, token: int
) -> None:
    """A real signal, sent from within a step: the main thread is waiting for it or handing out others."""
    leftovers = Leftovers(offload)

    def stop(new: list[int]) -> bool:
        if len(new) == token:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return False

    with pytest.raises(KeyboardInterrupt):
        engine.generate(tiny.sequences(stop_text=stop))
    leftovers.check()
    tiny.check(engine)


def test_an_interrupt_in_the_progress_callback(engine: Engine, tiny: Tiny, offload: Path) -> None:
    leftovers = Leftovers(offload)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(tiny.sequences(), lambda *_: signal.raise_signal(signal.SIGINT))
    leftovers.check()
    tiny.check(engine)


def test_more_interrupts_while_the_first_one_is_obeyed(
    engine: Engine, tiny: Tiny, offload: Path
) -> None:
    """Impatient people press again; the main thread is waiting for the running step to end then."""
    leftovers, left = Leftovers(offload), [4]

    def stop(new: list[int]) -> bool:
        while left[0]:
            left[0] -= 1
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.1)
        return False

    with pytest.raises(KeyboardInterrupt):
        engine.generate(tiny.sequences(stop_text=stop))
    leftovers.check()
    tiny.check(engine)


def test_abort_waits_for_steps_in_flight_and_drops_the_others() -> None:
    """What steps use is released after it: none may be running, and none may begin."""
    executor = Executor({lane: LaneSettings() for lane in Lane})
    running, seen = threading.Barrier(len(Lane) + 1, timeout=20), []
    release = threading.Event()

    def slow(step: Step) -> None:
        running.wait()
        release.wait(20)
        seen.append("ended")

    for lane in Lane:
        executor.submit(Step(lane, StepKind.ATTEND, 1), slow)
        executor.submit(Step(lane, StepKind.ATTEND, 2), lambda step: seen.append("begun"))
    running.wait()
    threading.Timer(0.2, release.set).start()
    executor.abort()
    assert seen == ["ended"] * len(Lane)
    with pytest.raises(RuntimeError, match="stopped from outside"):
        executor.submit(Step(Lane.CPU, StepKind.ATTEND, 3), slow)
    executor.close()


# The library


def test_an_llm_goes_on_after_a_failure_and_says_so_after_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(random_model("llama-tied-grouped"), tmp_path / "ckpt")
    prompts, params = random_prompts([4, 9]), SamplingParams(max_tokens=4, ignore_eos=True)
    broken = [False]

    def progress(phase: str, done: int, total: int) -> None:
        if broken[0] and phase == "decode":
            raise LookupError("the callback's own")

    files = open_files()
    llm = LLM(folder, dtype="float32", cache_dir=tmp_path / "cache", gpu="cpu", progress=progress)
    expected = [o.token_ids for o in llm.generate(prompts, params)]
    broken[0] = True
    for _ in range(3):
        with pytest.raises(LookupError):
            llm.generate(prompts, params)
    broken[0] = False
    assert [o.token_ids for o in llm.generate(prompts, params)] == expected
    with monkeypatch.context() as patch:  # at another policy's engine
        patch.setattr(Engine, "fits", lambda *_: False)
        patch.setattr(Device, "allocate", _no_memory)
        with pytest.raises(OutOfMemory):
            llm.generate(prompts, params)
    assert [o.token_ids for o in llm.generate(prompts, params)] == expected
    llm.close()
    llm.close()
    assert open_files() == files
    assert not list((tmp_path / "cache").glob("offload-*"))
    with pytest.raises(UserError, match="LLM = 'closed': must be open"):
        llm.generate(prompts, params)


def _no_memory(*arguments: Any) -> Any:
    raise MemoryError("no")


def test_an_interrupted_conversion_leaves_no_store_that_looks_complete(tmp_path: Path) -> None:
    folder = save(random_model("llama-tied-grouped"), tmp_path / "ckpt")

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "convert" and done > total // 2:
            raise KeyboardInterrupt

    files = open_files()
    settings: dict[str, Any] = {"dtype": "float32", "cache_dir": tmp_path / "cache", "gpu": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        LLM(folder, progress=progress, **settings)
    assert open_files() == files
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    assert not list((tmp_path / "cache").glob("offload-*"))
    with LLM(folder, **settings) as llm:
        assert llm.generate([[5, 6]], SamplingParams(max_tokens=2))


# The runner


def run_cell_with(
    folder: Path, name: str, damage: Callable[[PackedWeights], None], dtype: DType, factor: float
) -> CellState:
    ckpt, cache = overflowing(folder, name, factor)
    weights = PackedWeights.from_checkpoint(ckpt, dtype, cache)
    damage(weights)
    hardware, policy = RIGS["host"]
    spec = CellSpec(
        "flexgen", "flexgen_bench.systems.flexgen_system:FlexGenSystem", ModelSpec(weights.shape),
        Workload("w", PromptKind.SYNTHETIC, 4, 5, 6), hardware, dtype, 1,
        MeasureSpec(repetitions=1, warmup=0, time_limit_s=90.0), policy,
    )  # fmt: skip
    prepared = Prepared(Status.OK, checkpoint=ckpt, prompts=[[5, 6, 7, 8, 9]] * 4)
    state, _ = run_cell(spec, prepared, cache, folder / "work", SilentDisplay())
    return state


def corrupt_layer(weights: PackedWeights) -> None:
    flip(weights.store.path, weights.packed.units[2].offset)


def cut(weights: PackedWeights) -> None:
    os.truncate(weights.store.path, weights.packed.file_bytes - 100)


@pytest.mark.parametrize(
    ("damage", "dtype", "factor", "words"),
    [
        (corrupt_layer, DType.FLOAT32, 1.0, ["block is corrupt", "to convert the checkpoint again", "in step load_weights of unit 2"]),
        (cut, DType.FLOAT32, 1.0, ["truncated", "to convert again"]),
        (lambda weights: None, DType.FLOAT16, 8e4, ["layer 1 has produced values", "check the checkpoint", "in step attend"]),
    ],
)  # fmt: skip
def test_failures_become_records_that_say_what_to_do(
    damage: Callable[[PackedWeights], None], dtype: DType, factor: float, words: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "work").mkdir()
    name = "model.layers.1.self_attn.v_proj.weight"
    state = run_cell_with(tmp_path, name, damage, dtype, factor)
    assert state.status is Status.FAILED
    for word in words:
        assert word in state.reason
    assert "Traceback" not in state.reason


def test_what_an_error_says_about_a_cell() -> None:
    memory = OutOfMemory("cpu", "allocating 1 GiB of kv_cache", "cannot allocate", "free it.")
    assert ending(memory) == (Status.OOM, str(memory))
    assert ending(torch.OutOfMemoryError("CUDA out\nmore")) == (Status.OOM, "CUDA out")
    assert ending(MemoryError()) == (Status.OOM, "MemoryError")
    status, reason = ending(ValueError("odd"))
    assert status is Status.FAILED
    assert reason.endswith("ValueError: odd")
    long = StoreError("x" * 2000 + " Delete it.")
    assert ending(long) == (Status.FAILED, str(long)), "what to do stands at the end"
