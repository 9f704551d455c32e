"""Predicted against achieved on a GPU: layers of OPT-6.7B under policies that use every link, float16, 512 tokens in
and 32 out.

``python benchmarks/gpu_prediction.py [--layers 12] [--only NAME] [--kinds]
[--out results/benchmarks/gpu_prediction.json]``

Calibrates first if this machine has not been (quickly; ``python -m flexgen_bench calibrate`` does it thoroughly). Each
policy's job runs once with two tokens to warm up, then ``--rounds`` times. ``--kinds`` also shows where a prediction
goes wrong: seconds of each kind of step, predicted and achieved.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import Bar, Options, Report
from engine_runs import Shape, engine, lane_lines, predicted, run

from flexgen_bench.checkpoints import dummy_weights
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.config.build import hardware_profile, model_spec
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, Placement, Policy, Schedule
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.timeline import Timeline
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.machine.host import physical_cores
from flexgen_bench.machine.measured_rates import ensure_calibrated, with_calibration
from flexgen_bench.planner.forecast import Forecast

MEDIAN_LIMIT = 0.10  # of the errors, over all policies
MODEL = "opt-6.7b"
GPU, CPU, DISK = (Placement.all_on(tier) for tier in (Tier.GPU, Tier.CPU, Tier.DISK))
FOUR = Compression(4)
JOB = Shape(prompts=64, prompt_len=512, gen_len=32)
FEW = Shape(prompts=4, prompt_len=512, gen_len=32)
SOME = Shape(prompts=16, prompt_len=512, gen_len=16)


@dataclass(frozen=True)
class Case:
    name: str
    policy: Policy
    job: Shape = JOB


def cases() -> Iterator[Case]:
    """Each link, each place to attend, each schedule."""
    resident = Policy(32, 2, GPU, GPU, GPU)
    moved = replace(resident, weights=CPU)
    yield Case("all resident", resident)
    yield Case("few sequences", replace(resident, gpu_batch_size=4, num_gpu_batches=1), FEW)
    yield Case("weights moved", moved)
    yield Case("weights moved, one micro-batch", replace(moved, gpu_batch_size=64, num_gpu_batches=1))
    yield Case("half of the weights moved", replace(moved, weights=Placement(gpu=0.5, cpu=0.5)))
    yield Case("KV cache moved", replace(resident, kv_cache=CPU))
    yield Case("weights and KV cache moved", replace(moved, kv_cache=CPU))
    attended = replace(moved, kv_cache=CPU, attention=AttentionSite.CPU, gpu_batch_size=16, num_gpu_batches=4)
    yield Case("attended by the cpu", attended)
    continuous = replace(attended, gpu_batch_size=8, num_gpu_batches=1, schedule=Schedule.CONTINUOUS)
    yield Case("continuous, attended by the cpu", continuous, SOME)
    yield Case("activations moved", replace(resident, activations=CPU))
    yield Case("no overlap", replace(moved, overlap=False))
    yield Case("4-bit weights resident", replace(resident, lossy=Lossy(weights=FOUR)))
    yield Case("4-bit weights moved", replace(moved, lossy=Lossy(weights=FOUR)))
    yield Case("4-bit KV cache", replace(resident, lossy=Lossy(kv_cache=FOUR)))
    yield Case(
        "4-bit weights and KV cache moved", replace(moved, kv_cache=CPU, lossy=Lossy(weights=FOUR, kv_cache=FOUR))
    )
    yield Case("weights from disk", replace(moved, weights=Placement(gpu=0.5, disk=0.5)), replace(FEW, gen_len=8))


def packed_weights(layers: int, compression: Compression | None, cache: Path) -> PackedWeights:
    """Layers that repeat the first one: the disk holds it once, memory all of them."""
    spec = model_spec(MODEL)
    spec = replace(spec, shape=replace(spec.shape, name=f"{MODEL}-{layers}", num_layers=layers))
    folder = prepare_checkpoint(spec, DType.FLOAT16, cache, lambda *_: None)
    return PackedWeights.from_checkpoint(folder, DType.FLOAT16, cache, lambda *_: None, compression)


def kind_lines(times: Forecast, timeline: Timeline) -> list[str]:
    """Seconds of each kind of step of passes over prompts and of later ones, predicted and achieved."""
    ours: defaultdict[tuple[str, str, bool], float] = defaultdict(float)
    theirs: defaultdict[tuple[str, str, bool], float] = defaultdict(float)
    for event in times.events:
        ours[str(event.step.lane), str(event.step.kind), event.step.token == 0] += event.end_s - event.begin_s
    for lane, slices in timeline.lanes.items():
        for piece in slices:
            theirs[str(lane), piece.kind, piece.token == 0] += piece.seconds
    return [
        f"    {lane:12} {kind:16} {'prompt' if first else 'later':6} {ours[lane, kind, first]:7.3f} "
        f"{theirs[lane, kind, first]:7.3f}"
        for lane, kind, first in sorted(set(ours) | set(theirs))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--only", default="")
    parser.add_argument("--kinds", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=default_cache_dir())
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device", file=sys.stderr)
        return 2
    dummy_weights.REPEATED_FROM_BYTES = 0
    opts = Options(False, given.rounds, physical_cores(), given.out, given.cache, MODEL)
    rates = ensure_calibrated(opts.cache, opts.threads, print)
    whole = replace(hardware_profile("gpu16"), name="gpu", gpu_memory_bytes=None)
    profile = with_calibration(whole, rates)
    weights = {c: packed_weights(given.layers, c, given.cache) for c in (None, FOUR)}
    report = Report("gpu_prediction", Evidence.MEASURED, opts)
    report.settings = {"rates": to_json(rates), "layers": given.layers}
    errors = []
    for case in cases():
        if given.only not in case.name:
            continue
        mine = weights[case.policy.lossy.weights]
        # Events are kept for the table of kinds alone.
        how = {"points": None, "keep": given.kinds}
        times = predicted(mine, case.policy, case.job, profile, **how)
        with engine(mine, case.policy, profile, opts) as made:
            run(made, replace(case.job, gen_len=3))
            achieved = [run(made, case.job, seed=n) for n in range(given.rounds)]
        seconds = statistics.median(m.prefill_s + m.decode_s for m in achieved)
        errors.append(times.total_s / seconds - 1)
        last = achieved[-1]
        print(
            f"{case.name:34} {errors[-1]:+7.1%}  predicted/achieved s: prefill "
            f"{times.prefill_s:.2f}/{last.prefill_s:.2f}, "
            f"decode {times.decode_s:.2f}/{last.decode_s:.2f}",
            flush=True,
        )
        print("\n".join(lane_lines(last, "  lanes")), flush=True)
        if given.kinds:
            print("\n".join(kind_lines(times, last.timeline)), flush=True)
        report.rounds.append(
            {
                "case": case.name,
                "policy": to_json(case.policy),
                "job": vars(case.job),
                "predicted": {"prefill_s": times.prefill_s, "decode_s": times.decode_s},
                "achieved": [m.to_dict() for m in achieved],
                "error": errors[-1],
            }
        )
    report.bars.append(
        Bar(
            "median error",
            "0",
            f"{len(errors)} policies",
            (statistics.median(map(abs, errors)),),
            MEDIAN_LIMIT,
            at_most=True,
        )
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
