"""The memory cap: a real control group where this host allows one, and a clear record where it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.core.codec import from_json
from flexgen_bench.core.units import MIB
from flexgen_bench.machine.probes import drop_cached_pages
from flexgen_bench.runner import memory_cap
from flexgen_bench.runner.memory_cap import CapUnavailable, MemoryCap, MemoryGroup

LIMIT = 64 * MIB


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    try:
        made = memory_cap.create_group(LIMIT, f"flexgen-bench-test-{os.getpid()}")
    except CapUnavailable as reason:
        pytest.skip(f"no control group can be made here: {reason}")
    yield made
    made.remove()
    assert not made.path.exists()


def run_inside(group: MemoryGroup, code: str) -> int:
    return subprocess.run([sys.executable, "-c", code], preexec_fn=group.join, check=False).returncode


def test_more_than_the_cap_is_killed_and_counted(group: MemoryGroup) -> None:
    assert run_inside(group, "x = bytearray(b'1') * (200 << 20)") == -9
    cap = group.result()
    assert cap.enforced
    assert cap.oom_kills == 1
    assert cap.peak_bytes is not None
    assert cap.peak_bytes <= LIMIT
    assert "64.00 MiB" in memory_cap.describe(cap)


def test_less_than_the_cap_runs(group: MemoryGroup) -> None:
    assert run_inside(group, "x = bytearray(b'1') * (20 << 20)") == 0
    cap = group.result()
    assert cap.oom_kills == 0
    assert cap.peak_bytes is not None
    assert cap.peak_bytes > 20 * MIB


def test_page_cache_is_inside_the_cap(group: MemoryGroup, tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(os.urandom(MIB) * 150)
    assert drop_cached_pages(tmp_path) == 150 * MIB
    assert run_inside(group, f"f = open({str(file)!r}, 'rb')\nwhile f.read(1 << 20): pass") == 0
    cap = group.result()
    assert cap.oom_kills == 0
    assert cap.includes_page_cache
    assert cap.peak_bytes is not None
    assert LIMIT // 2 < cap.peak_bytes <= LIMIT


def fake_host(root: Path, cgroup: str, mounts: str) -> Path:
    """A folder that looks like / to the code that searches for control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mounts)
    return root


V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2_MOUNT = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"


def test_v1_group_lies_inside_ours(tmp_path: Path) -> None:
    """A group beside ours would escape a limit that somebody has set on us."""
    host = fake_host(tmp_path, "4:memory:/box/me\n", V1_MOUNT.format(root="/"))
    (host / "sys/fs/cgroup/memory/box/me").mkdir(parents=True)
    group = memory_cap.create_group(LIMIT, "cell", host)
    assert group.path == host / "sys/fs/cgroup/memory/box/me/cell"
    assert (group.path / "memory.limit_in_bytes").read_text() == str(LIMIT)
    assert "swap is not limited" in group.note


def test_v1_mount_of_a_container_starts_at_our_own_group(tmp_path: Path) -> None:
    host = fake_host(tmp_path, "4:memory:/docker/abc\n", V1_MOUNT.format(root="/docker/abc"))
    (host / "sys/fs/cgroup/memory").mkdir(parents=True)
    group = memory_cap.create_group(LIMIT, "cell", host)
    assert group.path == host / "sys/fs/cgroup/memory/cell"


def test_v2_group_lies_beside_ours_where_only_the_parent_hands_out_memory(tmp_path: Path) -> None:
    host = fake_host(tmp_path, "0::/user/scope\n", V2_MOUNT)
    ours = host / "sys/fs/cgroup/user/scope"
    ours.mkdir(parents=True)
    (ours / "cgroup.controllers").write_text("cpu\n")
    (ours / "cgroup.subtree_control").write_text("")
    (ours.parent / "cgroup.subtree_control").write_text("cpu memory\n")
    group = memory_cap.create_group(LIMIT, "cell", host)
    assert group.path == ours.parent / "cell"
    assert (group.path / "memory.max").read_text() == str(LIMIT)


def test_no_controller_is_a_reason(tmp_path: Path) -> None:
    host = fake_host(tmp_path, "0::/\n", "")
    with pytest.raises(CapUnavailable, match="no memory control group"):
        memory_cap.create_group(LIMIT, "cell", host)


WITHOUT_GROUPS = """
import sys
from flexgen_bench.runner import guard, memory_cap
def refuse(*_):
    raise memory_cap.CapUnavailable("cgroup: Permission denied")
memory_cap.create_group = refuse
sys.exit(guard.main())
"""


def guard_without_groups(tmp_path: Path, systemd_run: str) -> dict[str, Any]:
    """The outcome of a command run for a user who may not make groups, with this ``systemd-run``."""
    script = tmp_path / "systemd-run"
    script.write_text(f"#!/bin/sh\n{systemd_run}\n")
    script.chmod(0o755)
    command = [sys.executable, "-c", WITHOUT_GROUPS, "--parent", str(os.getpid())]
    command += ["--outcome", str(tmp_path / "outcome"), "--workdir", str(tmp_path)]
    command += ["--memory-bytes", str(256 * MIB), "--", sys.executable, "-c", "print(6 * 7)"]
    done = subprocess.run(
        command,
        env=os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "42\n", done.stderr
    outcome: dict[str, Any] = json.loads((tmp_path / "outcome").read_text())
    assert outcome["returncode"] == 0
    return outcome


def test_without_rights_the_cell_runs_uncapped_and_says_why(tmp_path: Path) -> None:
    outcome = guard_without_groups(tmp_path, "echo 'Failed to connect to bus' >&2; exit 1")
    cap = from_json(MemoryCap, outcome["memory_cap"], "memory_cap")
    assert not cap.enforced
    assert cap.requested_bytes == 256 * MIB
    assert cap.reason == "cgroup: Permission denied; systemd-run: Failed to connect to bus"


def test_a_scope_that_limits_nothing_is_not_taken_for_a_cap(tmp_path: Path) -> None:
    """A service manager without the memory controller starts the scope and ignores the limit."""
    pass_on = 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"'
    outcome = guard_without_groups(tmp_path, pass_on)
    cap = from_json(MemoryCap, outcome["memory_cap"], "memory_cap")
    assert not cap.enforced
    assert "scope has no memory limit" in cap.reason
