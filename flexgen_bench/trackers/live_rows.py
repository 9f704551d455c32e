"""Rows of history from moments: rates over the time since the moment before.

Every field that a live panel may query is named here (``conf/dashboard.yaml``).
"""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_bench.core.moment import JobState, Moment
from flexgen_bench.trackers.base import Value

# What rows are plotted against.
TIME, PASS = "time_s", "pass"


@dataclass
class LiveRows:
    """Turns the moments of one cell, in order, into rows."""

    _last: Moment | None = None
    _passes: int = 0  # of the generations that are over
    _generation_passes: int = 0

    def row(self, moment: Moment) -> dict[str, Value]:
        """``time_s``: seconds since the cell's first generation began; ``pass``: sweeps over the model since then, of
        systems that tell; ``queue/*``: sequences; ``memory/*``: bytes; ``link/*``: bytes since this generation began,
        and bytes/s; ``lane/*``: the share of the time in which a lane worked. A step counts when it is over: what is
        more than the time is shown as all of it."""
        before = self._last
        if before is None or before.generation != moment.generation:
            self._passes += self._generation_passes
            before = None
        self._last = moment
        begun_s = 0.0 if before is None else before.elapsed_s
        seconds = max(moment.elapsed_s - begun_s, 1e-9)
        row: dict[str, Value] = {TIME: moment.time_s, "generation": moment.generation, "stage": moment.stage}
        for phase in ("prefill", "decode"):
            done = getattr(moment, f"{phase}_tokens")
            row[f"live/{phase}_tokens"] = done
            row[f"live/{phase}_tok_per_s"] = (
                done - (getattr(before, f"{phase}_tokens") if before is not None else 0)
            ) / seconds
        row |= _of_process(moment, before, seconds)
        if moment.job is not None:
            self._generation_passes = moment.job.passes
            row[PASS] = self._passes + moment.job.passes
            row |= _of_job(moment.job, None if before is None else before.job, seconds)
        return row


def _of_process(moment: Moment, before: Moment | None, seconds: float) -> dict[str, Value]:
    row: dict[str, Value] = {}
    if moment.resident_bytes is not None:
        row["memory/process_resident_bytes"] = moment.resident_bytes
    if moment.gpu_bytes is not None:
        row["memory/torch_gpu_bytes"] = moment.gpu_bytes
    if moment.storage_read_bytes is not None:
        earlier = (before.storage_read_bytes or 0) if before is not None else 0
        row["storage/read_bytes_per_s"] = (moment.storage_read_bytes - earlier) / seconds
    return row


def _of_job(job: JobState, before: JobState | None, seconds: float) -> dict[str, Value]:
    row: dict[str, Value] = {f"queue/{name}": getattr(job, name) for name in ("waiting", "prefill", "decode", "done")}
    row |= {f"memory/{tier}_used_bytes": count for tier, count in job.used_bytes.items()}
    row |= {f"memory/{tier}_planned_bytes": count for tier, count in job.planned_bytes.items()}
    for lane, count in job.link_bytes.items():
        earlier = 0 if before is None else before.link_bytes.get(lane, 0)
        row |= {f"link/{lane}_bytes": count, f"link/{lane}_bytes_per_s": (count - earlier) / seconds}
    for lane, busy_s in job.busy_s.items():
        earlier_s = 0.0 if before is None else before.busy_s.get(lane, 0.0)
        row[f"lane/{lane}_busy_share"] = min(1.0, (busy_s - earlier_s) / seconds)
    return row
