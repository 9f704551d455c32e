"""Peak resident memory of the process next to what the plan says, under several policies.

``python benchmarks/memory.py [--quick] [--out results/benchmarks/memory.json]``

Every policy runs in a process of its own. Planned: the bytes of the plan's cpu tier, and of the gpu tier where the
accelerator is emulated (its arena is host memory too). The interpreter, torch and its libraries are in no plan; half a
GiB is allowed for them. Judged is (peak - 0.5 GiB) / planned.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from common import Bar, Options, Report, options
from engine_runs import HOST, Shape, dummy_weights, emulated, engine, run

from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import GIB
from flexgen_bench.machine.probes import peak_resident_bytes

LIMIT = 1.05
NOT_PLANNED_BYTES = GIB // 2
SHORT, LONG = Shape(8, 32, 3), Shape(2, 800, 2)


@dataclass(frozen=True)
class Case:
    """A policy, where it runs, and the job it is tried with."""

    policy: Policy
    hardware: HardwareProfile = HOST
    job: Shape = SHORT


def cases() -> dict[str, Case]:
    gpu, cpu, disk = (Placement.all_on(tier) for tier in Tier)
    four_bits = Lossy(weights=Compression(4))
    resident = Policy(8, 1, cpu, cpu, cpu)
    streamed = replace(resident, weights=disk)
    moved = Policy(4, 2, cpu, cpu, gpu)
    return {
        "resident": Case(resident),
        "streamed from disk": Case(streamed),
        "half on disk": Case(replace(resident, weights=Placement(cpu=0.5, disk=0.5))),
        "all on disk": Case(Policy(2, 4, disk, disk, disk)),
        "4-bit resident": Case(replace(resident, lossy=four_bits)),
        "4-bit streamed": Case(replace(streamed, lossy=four_bits)),
        "long prompts": Case(replace(streamed, gpu_batch_size=2), job=LONG),
        "long prompts in chunks": Case(replace(streamed, gpu_batch_size=2, prefill_chunk=128), job=LONG),
        "emulated, all on gpu": Case(Policy(8, 1, gpu, gpu, gpu), emulated()),
        "emulated, all on cpu": Case(moved, emulated()),
        "emulated, all on disk": Case(Policy(4, 2, disk, disk, disk), emulated()),
    }


def main() -> int:
    if "--case" in sys.argv:
        place = sys.argv.index("--case")
        name = sys.argv[place + 1]
        return _child(name, options(__doc__, arguments=sys.argv[1:place] + sys.argv[place + 2 :]))
    opts = options(__doc__, rounds=1)
    for compression in {case.policy.lossy.weights for case in cases().values()}:
        dummy_weights(opts, compression)  # packing is not what is measured
    report = Report("memory", Evidence.MEASURED, opts)
    for name in cases():
        result = _measure(name)
        report.rounds.append({"case": name} | dict(result))
        if "error" in result:
            report.where_time_goes.append(f"{name}: did not run: {result['error']}")
            continue
        planned, peak = result["planned_bytes"], result["peak_bytes"]
        report.bars.append(
            Bar(
                name,
                f"{planned / GIB:.2f} GiB planned",
                f"{peak / GIB:.2f} GiB peak",
                ((peak - NOT_PLANNED_BYTES) / planned,),
                LIMIT,
                at_most=True,
            )
        )
        if not report.bars[-1].met:
            over = (peak - NOT_PLANNED_BYTES - LIMIT * planned) / GIB
            report.where_time_goes.append(f"{name}: {over:.2f} GiB too much; {result['parts']}")
    return report.finish()


def _measure(name: str) -> Mapping[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--case", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit status {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _child(name: str, opts: Options) -> int:
    case = cases()[name]
    weights = dummy_weights(opts, case.policy.lossy.weights)
    before = peak_resident_bytes()
    with engine(weights, case.policy, case.hardware, opts) as made:
        measured = run(made, case.job)
    planned = sum(measured.plan.total(tier) for tier in (Tier.GPU, Tier.CPU))
    parts = {site.name: dict(p) for site, p in measured.plan.bytes.items() if site.tier is not Tier.DISK}
    print(
        json.dumps(
            {"planned_bytes": planned, "peak_bytes": peak_resident_bytes(), "before_bytes": before, "parts": parts}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
