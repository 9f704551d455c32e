"""A cap on the memory of one cell's processes, page cache included, where the host allows it.

The cap is a control group (cgroup) of the Linux kernel, made for the cell and removed after it: version 1
and version 2 are used directly where this user may make groups, else ``systemd-run --scope`` where a service
manager answers. Where none works the cell runs without a cap and its record says why.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from flexgen_bench.core.units import format_bytes


@dataclass(frozen=True)
class MemoryCap:
    """What was asked for and what became of it; goes into the record.

    peak_bytes: highest use of the whole group, page cache included when ``includes_page_cache``.
    peak_anonymous_bytes: highest sampled use without file pages: what the kernel could not have dropped.
    oom_kills: processes of the group (or of the machine, without one) the kernel killed for memory.
    reason: why the cap is not enforced, or what limits its meaning.
    """

    requested_bytes: int | None = None
    enforced: bool = False
    mechanism: str = "none"
    peak_bytes: int | None = None
    peak_anonymous_bytes: int | None = None
    oom_kills: int = 0
    includes_page_cache: bool = False
    reason: str = ""


class CapUnavailable(RuntimeError):
    """No control group can be made here; the message says why."""


class MemoryGroup:
    """One control group with a limit. ``own`` groups are removed by :meth:`remove`."""

    def __init__(self, path: Path, version: int, limit_bytes: int, own: bool, note: str = "") -> None:
        self.path, self.version, self.limit_bytes, self.own = path, version, limit_bytes, own
        self.note = note
        self._peak = self._peak_anonymous = 0

    def join(self) -> None:
        """Move the calling process into the group. Meant for a child between fork and exec."""
        with (self.path / "cgroup.procs").open("w") as procs:
            procs.write("0")

    def sample(self) -> None:
        """Look at the current use; call now and then, for peaks the kernel does not keep."""
        with contextlib.suppress(OSError):  # the group can vanish with its last process
            current = "memory.current" if self.version == 2 else "memory.usage_in_bytes"
            self._peak = max(self._peak, int((self.path / current).read_text()))
            stat = _table(self.path / "memory.stat")
            anonymous = stat.get("anon" if self.version == 2 else "total_rss", 0)
            self._peak_anonymous = max(self._peak_anonymous, anonymous)

    def result(self) -> MemoryCap:
        """The cap as it turned out. Call before :meth:`remove`."""
        self.sample()
        kept = self.path / ("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")
        peak = int(kept.read_text()) if kept.exists() else 0
        events = "memory.events" if self.version == 2 else "memory.oom_control"
        return MemoryCap(
            requested_bytes=self.limit_bytes,
            enforced=True,
            mechanism=f"cgroup v{self.version}" + ("" if self.own else " (systemd scope)"),
            peak_bytes=max(peak, self._peak),
            peak_anonymous_bytes=self._peak_anonymous,
            oom_kills=_table(self.path / events).get("oom_kill", 0),
            includes_page_cache=True,
            reason=self.note,
        )

    def kill(self) -> None:
        """End every process of the group but the caller."""
        try:
            pids = [int(p) for p in (self.path / "cgroup.procs").read_text().split()]
        except FileNotFoundError:
            return
        for pid in pids:
            if pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def remove(self, patience_s: float = 10.0) -> None:
        """Drop the group's cached pages and remove it; its processes must have ended.

        Raises OSError if the kernel still refuses after ``patience_s`` seconds.
        """
        if not self.own:
            return
        with contextlib.suppress(OSError):  # an aid to the next cell, refused by some kernels
            if self.version == 1:
                (self.path / "memory.force_empty").write_text("0")
            else:
                (self.path / "memory.reclaim").write_text(str(2**60))
        deadline = time.monotonic() + patience_s
        while True:
            try:
                self.path.rmdir()
            except FileNotFoundError:
                return
            except OSError:  # busy until the kernel has let go of the last process
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return


def create_group(limit_bytes: int, name: str, root: Path = Path("/")) -> MemoryGroup:
    """Make a control group that holds its processes to ``limit_bytes`` of memory, swap included.

    The group lies inside (v1) or beside or inside (v2) the one we are in, so that a limit set on us stays in
    force. ``root`` is where /proc and the mounts are seen (for tests). Raises CapUnavailable.
    """
    reasons = []
    for version, places in _places(root):
        for parent in places:
            group = MemoryGroup(parent / name, version, limit_bytes, own=True)
            try:
                group.path.mkdir()
                group.note = _set_limit(group)
                _try_joining(group)
            except (OSError, subprocess.SubprocessError) as error:
                reasons.append(f"cgroup v{version} at {parent}: {error}")
                with contextlib.suppress(OSError):
                    group.path.rmdir()
            else:
                return group
    raise CapUnavailable("; ".join(reasons) or "no memory control group is mounted")


def current_group(limit_bytes: int, root: Path = Path("/")) -> MemoryGroup:
    """The v2 group this process is in, if it has exactly the wanted limit. Raises CapUnavailable."""
    for version, places in _places(root, enable=False):
        limit = places[0] / "memory.max"
        if version == 2 and limit.exists():
            text = limit.read_text().strip()
            # The kernel keeps limits in pages.
            if text != "max" and abs(int(text) - limit_bytes) < 2**16:
                return MemoryGroup(places[0], 2, limit_bytes, own=False)
    raise CapUnavailable("the systemd scope has no memory limit (memory controller not delegated)")


def scope_command(limit_bytes: int) -> list[str]:
    """The ``systemd-run`` prefix that runs a command under a limit. Raises CapUnavailable."""
    program = shutil.which("systemd-run")
    if program is None:
        raise CapUnavailable("systemd-run is not installed")
    command = [program, "--scope", "--quiet", "--collect", "-p", f"MemoryMax={limit_bytes}"]
    command += ["-p", "MemorySwapMax=0"] + (["--user"] if os.geteuid() else []) + ["--"]
    try:
        trial = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CapUnavailable(f"systemd-run: {error}") from error
    if trial.returncode:
        said = trial.stderr.strip().splitlines() or [f"exit status {trial.returncode}"]
        raise CapUnavailable(f"systemd-run: {said[-1]}")
    return command


def machine_oom_kills() -> int:
    """How many processes the kernel has killed for memory since it started; 0 where it does not say."""
    return _table(Path("/proc/vmstat")).get("oom_kill", 0)


def describe(cap: MemoryCap) -> str:
    """One clause for a reason: the cap and the highest use."""
    if cap.requested_bytes is None or not cap.enforced:
        return "no memory cap was in force"
    peak = "" if cap.peak_bytes is None else f", peak use {format_bytes(cap.peak_bytes)}"
    if cap.peak_anonymous_bytes:
        peak += f" of which {format_bytes(cap.peak_anonymous_bytes)} not file pages"
    return f"memory cap {format_bytes(cap.requested_bytes)}{peak}"


def _places(root: Path, enable: bool = True) -> list[tuple[int, list[Path]]]:
    """For each mounted hierarchy with a memory controller: its version and folders to make a group in."""
    ours = {}
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        ours[controllers] = path
    hierarchies = []
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        mount_root, mount_point = left.split(" ")[3:5]
        base = root / mount_point.lstrip("/")
        if kind == "cgroup" and "memory" in options.split(","):
            key = next((k for k in ours if "memory" in k.split(",")), "")
            hierarchies.append((1, [_below(base, mount_root, ours.get(key, "/"))]))
        elif kind == "cgroup2":
            own = _below(base, mount_root, ours.get("", "/"))
            places = [own] if own == base else [own, own.parent]
            if enable:
                places = [place for place in places if _controls_memory(place)]
            if places:
                hierarchies.append((2, places))
    return hierarchies


def _below(base: Path, mount_root: str, path: str) -> Path:
    """Where cgroup ``path`` is seen when the mount shows the hierarchy from ``mount_root`` down."""
    relative = os.path.relpath(path, mount_root)
    return base if relative.startswith("..") or relative == "." else base / relative


def _controls_memory(place: Path) -> bool:
    """Whether children of a v2 group can have memory limits; switched on where allowed."""
    switch = place / "cgroup.subtree_control"
    try:
        if "memory" in switch.read_text().split():
            return True
        if "memory" not in (place / "cgroup.controllers").read_text().split():
            return False
        switch.write_text("+memory")
    except OSError:  # not ours to change, or the group holds processes itself
        return False
    return True


def _set_limit(group: MemoryGroup) -> str:
    """Limit memory, then memory and swap together. Returns a remark if swap could not be limited."""
    if group.version == 2:
        (group.path / "memory.max").write_text(str(group.limit_bytes))
        swap, value = group.path / "memory.swap.max", "0"
    else:
        (group.path / "memory.limit_in_bytes").write_text(str(group.limit_bytes))
        swap, value = group.path / "memory.memsw.limit_in_bytes", str(group.limit_bytes)
    if not swap.exists():
        return "the kernel does not account for swap: swap is not limited"
    swap.write_text(value)
    return ""


def _try_joining(group: MemoryGroup) -> None:
    """Some groups can be made but not entered; better to find out with a process that does nothing."""
    subprocess.run(["true"], preexec_fn=group.join, check=True)


def _table(path: Path) -> dict[str, int]:
    """A kernel file of ``name value`` lines; empty where it does not exist."""
    if not path.exists():
        return {}
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}
