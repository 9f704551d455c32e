"""Predicted against achieved: the simulator's times of a grid of policies next to the engine's, on the host and on an
emulated accelerator.

``python benchmarks/prediction.py [--quick] [--rounds N] [--keep-calibration]
[--out results/benchmarks/prediction.json]``

A round calibrates the machine anew (not with ``--keep-calibration``, nor if quick), then runs every policy's job: once
to warm up, once on the clock. No constant is fitted to these runs. The error of a run is predicted / achieved - 1, that
of a policy the median of its rounds, whatever its sign.

Beside it stands the error as drifted: what was predicted from the same constants times the machine's speed between the
jobs of the round over its calibrated speed (``yardstick.py``). Where the two differ, the machine did not run as it was
calibrated.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from common import Bar, Options, Report, options
from engine_runs import HOST, Measured, Shape, dummy_weights, emulated, engine, predicted, run
from yardstick import Yardstick, as_fast, open_yardstick

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.rates import Rates
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import GB
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.machine.measured_rates import ensure_calibrated, with_calibration
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
    yield Case("weights on disk, few sequences", True, replace(host, gpu_batch_size=2, weights=DISK), FEW)
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
    yield Case("weights moved, two micro-batches", False, replace(moved, gpu_batch_size=8, num_gpu_batches=2))
    yield Case("a quarter resident", False, replace(moved, weights=quarter))
    yield Case("KV cache moved", False, replace(moved, kv_cache=CPU), LONG)
    yield Case("activations moved", False, replace(moved, activations=CPU))
    attended = replace(moved, kv_cache=CPU, attention=AttentionSite.CPU, gpu_batch_size=8, num_gpu_batches=2)
    yield Case("attended by the cpu", False, attended, LONG)
    yield Case("continuous, attended by the cpu", False, replace(attended, schedule=Schedule.CONTINUOUS), LONG)
    yield Case("weights from disk", False, replace(moved, weights=DISK))
    yield Case("4-bit weights moved", False, replace(moved, lossy=FOUR))
    yield Case("no overlap, moved", False, replace(moved, overlap=False))
    yield Case("computed where they lie", False, replace(moved, gpu_batch_size=2, offloaded=Offloaded.IN_PLACE), FEW)


@dataclass(frozen=True)
class Ran:
    """A case on the clock, and what had been predicted from the constants of its round."""

    case: Case
    predicted: Forecast
    achieved: Measured

    @property
    def seconds(self) -> float:
        return self.achieved.prefill_s + self.achieved.decode_s

    def line(self) -> str:
        where = "host" if self.case.here else "emulated"
        phases = [
            f"{kind} {getattr(self.predicted, kind + '_s'):.2f}/{getattr(self.achieved, kind + '_s'):.2f}"
            for kind in ("prefill", "decode")
        ]
        error = _error(self.predicted, self.seconds)
        return f"{where:8} {self.case.name:34} {error:+7.1%}  predicted/achieved s: {', '.join(phases)}"


@dataclass(frozen=True)
class Outcome:
    """A case in one round: as calibrated, and as the machine ran in that round."""

    ran: Ran
    drifted: Forecast

    @property
    def error(self) -> float:
        """Signed: above 0, the engine was faster than predicted."""
        return _error(self.ran.predicted, self.ran.seconds)

    @property
    def error_as_drifted(self) -> float:
        return _error(self.drifted, self.ran.seconds)

    def to_dict(self) -> dict[str, object]:
        case = self.ran.case
        return {
            "case": case.name,
            "machine": "host" if case.here else "emulated",
            "policy": to_json(case.policy),
            "job": vars(case.job),
            "predicted": _phases(self.ran.predicted),
            "as_drifted": _phases(self.drifted),
            "achieved": self.ran.achieved.to_dict(),
            "error": self.error,
            "error_as_drifted": self.error_as_drifted,
        }


@dataclass(frozen=True)
class Round:
    """rates: calibrated at its beginning. speeds: the yardstick's, over all of it."""

    rates: Rates
    speeds: Mapping[str, float]
    outcomes: tuple[Outcome, ...]

    def to_dict(self) -> dict[str, object]:
        return {
            "rates": to_json(self.rates),
            "speeds": dict(self.speeds),
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
        }


def _error(predicted: Forecast, seconds: float) -> float:
    return predicted.total_s / seconds - 1


def _phases(times: Forecast) -> dict[str, float]:
    return {"prefill_s": times.prefill_s, "decode_s": times.decode_s}


class Bench:
    """The packed weights, and the yardstick that is held between the jobs."""

    def __init__(self, opts: Options, yardstick: Yardstick) -> None:
        self._opts, self._yardstick = opts, yardstick
        self._packed = {None: dummy_weights(opts), FOUR.weights: dummy_weights(opts, FOUR.weights)}

    def round(self, number: int, rates: Rates) -> Round:
        """Every case once."""
        self._yardstick.begin_anew()
        self._yardstick.look()
        all_ran = []
        for case in cases():
            all_ran.append(self._run(case, rates, number))
            print(all_ran[-1].line(), flush=True)
            self._yardstick.look()
        speeds = self._yardstick.speeds(rates)
        ratios = ", ".join(f"{name} {speed:.2f}" for name, speed in speeds.items())
        print(f"round {number + 1}: speed over calibrated {ratios}", flush=True)
        now = as_fast(rates, speeds)
        outcomes = tuple(Outcome(ran, self._predicted(ran.case, now)) for ran in all_ran)
        return Round(rates, speeds, outcomes)

    def _predicted(self, case: Case, rates: Rates) -> Forecast:
        known = with_calibration(_machine(case), rates)
        return predicted(self._weights(case), case.policy, case.job, known)

    def _run(self, case: Case, rates: Rates, seed: int) -> Ran:
        times = self._predicted(case, rates)
        with engine(self._weights(case), case.policy, _machine(case), self._opts) as made:
            run(made, case.job)
            return Ran(case, times, run(made, case.job, seed=seed))

    def _weights(self, case: Case) -> PackedWeights:
        return self._packed[case.policy.lossy.weights]


def _machine(case: Case) -> HardwareProfile:
    return HOST if case.here else emulated(LINK, LINK)


def main() -> int:
    arguments = sys.argv[1:]
    keep = "--keep-calibration" in arguments
    opts = options(__doc__, rounds=3, arguments=[a for a in arguments if a != "--keep-calibration"])
    keep |= opts.quick
    rounds = []
    for number in range(opts.rounds):
        rates = ensure_calibrated(opts.cache, opts.threads, print) if keep else _recalibrated(opts)
        with open_yardstick(opts.threads, opts.cache) as yardstick:
            rounds.append(Bench(opts, yardstick).round(number, rates))
    report = Report("prediction", Evidence.EMULATED, opts)
    report.settings = {"link_bytes_per_s": LINK}
    report.rounds = [one.to_dict() for one in rounds]
    for label, error in (("", _of_run), (", as drifted", _as_drifted)):
        report.bars += [*_bars(rounds, label, error)]
    return report.finish()


def _of_run(outcome: Outcome) -> float:
    return outcome.error


def _as_drifted(outcome: Outcome) -> float:
    return outcome.error_as_drifted


def _bars(rounds: Sequence[Round], label: str, error: Callable[[Outcome], float]) -> Iterator[Bar]:
    """Of each policy the median over the rounds; of those the median and the largest."""
    by_case = [
        (same[0].ran.case.here, abs(statistics.median(map(error, same))))
        for same in zip(*(one.outcomes for one in rounds), strict=True)
    ]
    for where, errors in (
        ("all", [e for _, e in by_case]),
        ("host", [e for here, e in by_case if here]),
        ("emulated", [e for here, e in by_case if not here]),
    ):
        count = f"{len(errors)} policies"
        middle, worst = (statistics.median(errors),), (max(errors),)
        yield Bar(f"median error, {where}{label}", "0", count, middle, MEDIAN_LIMIT, at_most=True)
        yield Bar(f"worst error, {where}{label}", "0", count, worst, WORST_LIMIT, at_most=True)


def _recalibrated(opts: Options) -> Rates:
    from flexgen_bench.cli.calibrate import main as calibrate

    calibrate(["--cache-dir", str(opts.cache), "--threads", str(opts.threads)])
    return ensure_calibrated(opts.cache, opts.threads, print)


if __name__ == "__main__":
    sys.exit(main())
