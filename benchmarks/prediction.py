"""Predicted against achieved: the simulator's times of a grid of policies next to the engine's, on the host and on an emulated accelerator.

``python benchmarks/prediction.py [--quick] [--recalibrate] [--out results/benchmarks/prediction.json]``

The machine is calibrated first, if it has not been (``--recalibrate``: in any case). No constant is fitted to these runs. Each policy's job is run once
to warm up and then once per round; predicted is the simulator's time with the calibrated rates, achieved the median of the rounds. The error is
|predicted / achieved - 1|.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from common import Bar, Options, Report, options
from engine_runs import HOST, Measured, Shape, dummy_weights, emulated, engine, predicted, run

from flexgen_bench.calibrate.store import ensure_calibrated, with_calibration
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.rates import Rates
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import GB
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.planner.forecast import Forecast

MEDIAN_LIMIT, WORST_LIMIT = 0.07, 0.20
LINK = 3 * GB  # of the emulated accelerator
JOB = Shape(prompts=16, prompt_len=32, gen_len=6)
LONG = Shape(prompts=16, prompt_len=24, gen_len=16)
FEW = Shape(prompts=2, prompt_len=48, gen_len=6)
GPU, CPU, DISK = (Placement.all_on(tier) for tier in (Tier.GPU, Tier.CPU, Tier.DISK))
FOUR = Lossy(weights=Compression(4))


@dataclass(frozen=True)
class Case:
    """A policy with its job. here: on the host itself, else on the emulated accelerator."""

    name: str
    here: bool
    policy: Policy
    job: Shape = JOB


def cases() -> Iterator[Case]:
    """The grid: each way of working, each link, alone and together."""
    host = Policy(16, 1, CPU, CPU, CPU)
    half = Placement(cpu=0.5, disk=0.5)
    yield Case("all in memory", True, host)
    yield Case("two micro-batches", True, replace(host, gpu_batch_size=8, num_gpu_batches=2))
    yield Case("four blocks", True, replace(host, gpu_batch_size=4))
    yield Case("few sequences", True, replace(host, gpu_batch_size=2), FEW)
    yield Case("half of the weights on disk", True, replace(host, weights=half))
    yield Case("weights on disk", True, replace(host, weights=DISK))
    yield Case("weights on disk, one slot", True, replace(host, weights=DISK, prefetch=1))
    yield Case(
        "weights on disk, few sequences", True, replace(host, gpu_batch_size=2, weights=DISK), FEW
    )
    yield Case("KV cache on disk", True, replace(host, kv_cache=DISK))
    yield Case("all on disk", True, replace(host, weights=DISK, kv_cache=DISK, activations=DISK))
    yield Case("no overlap, half on disk", True, replace(host, weights=half, overlap=False))
    yield Case("prompts in chunks", True, replace(host, prefill_chunk=256))
    yield Case("4-bit weights", True, replace(host, lossy=FOUR))
    yield Case("4-bit weights on disk", True, replace(host, weights=DISK, lossy=FOUR), FEW)
    yield Case("8-bit KV cache", True, replace(host, lossy=Lossy(kv_cache=Compression(8))), LONG)
    yield Case("continuous", True, replace(host, gpu_batch_size=8, schedule=Schedule.CONTINUOUS))
    moved = Policy(16, 1, CPU, GPU, GPU)
    quarter = Placement(gpu=0.25, cpu=0.75)
    yield Case("all resident", False, replace(moved, weights=GPU))
    yield Case("weights moved", False, moved)
    yield Case("weights moved, few sequences", False, replace(moved, gpu_batch_size=2), FEW)
    yield Case(
        "weights moved, two micro-batches",
        False,
        replace(moved, gpu_batch_size=8, num_gpu_batches=2),
    )
    yield Case("a quarter resident", False, replace(moved, weights=quarter))
    yield Case("KV cache moved", False, replace(moved, kv_cache=CPU), LONG)
    yield Case("activations moved", False, replace(moved, activations=CPU))
    attended = replace(
        moved, kv_cache=CPU, attention=AttentionSite.CPU, gpu_batch_size=8, num_gpu_batches=2
    )
    yield Case("attended by the cpu", False, attended, LONG)
    yield Case(
        "continuous, attended by the cpu",
        False,
        replace(attended, schedule=Schedule.CONTINUOUS),
        LONG,
    )
    yield Case("weights from disk", False, replace(moved, weights=DISK))
    yield Case("4-bit weights moved", False, replace(moved, lossy=FOUR))
    yield Case("no overlap, moved", False, replace(moved, overlap=False))
    yield Case(
        "computed where they lie",
        False,
        replace(moved, gpu_batch_size=2, offloaded=Offloaded.IN_PLACE),
        FEW,
    )


@dataclass(frozen=True)
class Outcome:
    """A case with both times, in seconds."""

    case: Case
    predicted: Forecast
    achieved: tuple[Measured, ...]

    @property
    def seconds(self) -> float:
        return statistics.median(m.prefill_s + m.decode_s for m in self.achieved)

    @property
    def error(self) -> float:
        """Signed: above 0, the engine was faster than predicted."""
        return self.predicted.total_s / self.seconds - 1

    def to_dict(self) -> dict[str, object]:
        return {
            "case": self.case.name,
            "machine": "host" if self.case.here else "emulated",
            "policy": self.case.policy.to_dict(),
            "job": vars(self.case.job),
            "predicted": {
                "prefill_s": self.predicted.prefill_s,
                "decode_s": self.predicted.decode_s,
            },
            "achieved": [m.to_dict() for m in self.achieved],
            "error": self.error,
        }

    def line(self) -> str:
        where = "host" if self.case.here else "emulated"
        phases = [
            f"{kind} {getattr(self.predicted, kind + '_s'):.2f}/{statistics.median(getattr(m, kind + '_s') for m in self.achieved):.2f}"
            for kind in ("prefill", "decode")
        ]
        return f"{where:8} {self.case.name:34} {self.error:+7.1%}  predicted/achieved s: {', '.join(phases)}"


def measure(case: Case, rates: Rates, weights: PackedWeights, opts: Options) -> Outcome:
    """One case: predicted, and run."""
    profile = HOST if case.here else emulated(LINK, LINK)
    known = with_calibration(profile, rates)
    times = predicted(weights, case.policy, case.job, known)
    with engine(weights, case.policy, profile, opts) as made:
        run(made, case.job)
        return Outcome(case, times, tuple(run(made, case.job, seed=n) for n in range(opts.rounds)))


def main() -> int:
    arguments = sys.argv[1:]
    again = "--recalibrate" in arguments
    opts = options(__doc__, rounds=2, arguments=[a for a in arguments if a != "--recalibrate"])
    rates = ensure_calibrated(opts.cache, opts.threads, print) if not again else _recalibrated(opts)
    packed = {None: dummy_weights(opts), FOUR.weights: dummy_weights(opts, FOUR.weights)}
    outcomes = []
    for case in cases():
        outcomes.append(measure(case, rates, packed[case.policy.lossy.weights], opts))
        print(outcomes[-1].line(), flush=True)
    report = Report("prediction", Evidence.EMULATED, opts)
    report.settings = {"rates": rates.to_dict(), "link_bytes_per_s": LINK}
    report.rounds = [outcome.to_dict() for outcome in outcomes]
    for where, mine in (
        ("all", outcomes),
        ("host", [o for o in outcomes if o.case.here]),
        ("emulated", [o for o in outcomes if not o.case.here]),
    ):
        errors = [abs(o.error) for o in mine]
        count = f"{len(errors)} policies"
        report.bars += [
            Bar(f"median error, {where}", "0", count, (statistics.median(errors),), MEDIAN_LIMIT, at_most=True),
            Bar(f"worst error, {where}", "0", count, (max(errors),), WORST_LIMIT, at_most=True),
        ]  # fmt: skip
    return report.finish()


def _recalibrated(opts: Options) -> Rates:
    from flexgen_bench.calibrate.__main__ import main as calibrate

    calibrate(["--cache-dir", str(opts.cache), "--threads", str(opts.threads)])
    return ensure_calibrated(opts.cache, opts.threads, print)


if __name__ == "__main__":
    sys.exit(main())
