"""Records with known raw samples, for tests of what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexgen_bench.core.cell import CellSpec, MeasureSpec, ModelSpec, WeightSource
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.record import LinkUse, Record, Sample, SystemReport
from flexgen_bench.core.status import Status
from flexgen_bench.core.workload import PromptKind, Workload

GIB = 2**30
SHAPE = ModelShape("tiny", "opt", 2, 64, 4, 4, 16, 256, 512, 128, True)
ENVIRONMENT = {
    "code": {"commit": "0123456789abcdef", "dirty": False},
    "cpu": {"model": "Some CPU", "usable_cores": 2},
    "memory": {"total_bytes": 8 * GIB},
    "gpus": [],
    "process": {"peak_resident_bytes": 3 * GIB},
}


def make_spec(system: str, kind: PromptKind = PromptKind.SYNTHETIC, **changes: Any) -> CellSpec:
    values: dict[str, Any] = {
        "system": system,
        "target": "module:Class",
        "model": ModelSpec(SHAPE, WeightSource.DUMMY),
        "workload": Workload("8-4", kind, num_prompts=4, prompt_len=8, gen_len=4),
        "hardware": HardwareProfile("cpu", Accelerator.NONE, cpu_memory_bytes=2 * GIB),
        "dtype": DType.BFLOAT16,
        "threads": 2,
        "measure": MeasureSpec(repetitions=3),
    }
    return CellSpec(**(values | changes))


def make_samples(times: Sequence[tuple[float, float]]) -> tuple[Sample, ...]:
    """Repetitions of ``make_spec``'s workload with these (prefill, decode) seconds."""
    return tuple(Sample(p, d, 4 * 8, 4 * 4, 4 * 3) for p, d in times)


def make_record(
    system: str = "flexgen",
    times: Sequence[tuple[float, float]] = ((1.0, 3.0), (2.0, 4.0), (1.0, 5.0)),
    spec: CellSpec | None = None,
    run: int = 0,
    **changes: Any,
) -> Record:
    spec = make_spec(system) if spec is None else spec
    values: dict[str, Any] = {
        "run_id": f"run{run}",
        "spec_hash": spec.spec_hash,
        "spec": to_json(spec),
        "suite": "default",
        "status": Status.OK,
        "reason": "",
        "started_utc": f"2026-01-02T03:0{run}:00+00:00",
        "ended_utc": f"2026-01-02T03:0{run}:30+00:00",
        "rerun_command": f"python -m flexgen_bench system={system}",
        "batch_size": 2,
        "samples": make_samples(times),
        "report": SystemReport(
            peak_bytes={"cpu": GIB},
            links={"disk_read": LinkUse(6 * GIB, 4.0)},
            lowest_tier="disk",
            notes=("reads go through the page cache",),
        ),
        "memory_cap": {
            "requested_bytes": 2 * GIB,
            "enforced": True,
            "peak_bytes": 3 * GIB // 2,
            "peak_anonymous_bytes": GIB,
        },
        "outputs": {"token_ids": [[1, 2, 3, 4]] * 4},
        "environment": ENVIRONMENT,
    }
    return Record(**(values | changes))
