"""A disk or a weight store that fails in the middle of a job: a clear error, nothing left behind, and the next job
works."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from pathlib import Path

import pytest

from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.model import DType
from flexgen_bench.core.units import PAGE
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.engine import Engine
from tests.support.failing_hardware import RIGS, FailingDisk, Leftovers, Tiny, flip, told
from tests.support.tiny_models import random_model, save

pytest_plugins = "tests.support.failure_fixtures"


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
    engine: Engine,
    tiny: Tiny,
    offload: Path,
    call: str,
    file: str,
    number: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
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
def test_a_corrupt_block_is_named_and_repairing_it_is_enough(rig: str, tiny: Tiny, offload: Path) -> None:
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
    if "in step" in message:  # a unit that is streamed: the engine could be made, and can be used again
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


@pytest.mark.parametrize("beyond", [0, 1, PAGE - 3, PAGE, 2 * PAGE + 512])
def test_a_weight_file_truncated_while_in_use(engine: Engine, tiny: Tiny, offload: Path, beyond: int) -> None:
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
