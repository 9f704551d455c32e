"""How well transfer and computation overlap when both take as long: wall time against the busiest lane.

``python benchmarks/balanced.py [--quick] [--out results/benchmarks/balanced.json]``

Weights on the cpu, an emulated accelerator. In each round the decode passes are timed over a link that is not felt, and
the link is then throttled to what moves the weights in that time. Bound: the busy time of the busiest lane. On a
machine whose cores are also the emulated accelerator, the copies of the link's lanes take processor time from the gpu
lane; that shows as gpu busy time and not as idle time, so enough sequences are computed that it is a small part.
"""

from __future__ import annotations

import sys

from common import Bar, Report, median, options
from engine_runs import Measured, Shape, dummy_weights, emulated, engine, lane_lines, run

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Lane, Tier

LIMIT = 1.20
JOB = Shape(prompts=64, prompt_len=4, gen_len=10)
CALIBRATION = Shape(prompts=64, prompt_len=4, gen_len=5)
# Judged only if the lanes came out alike: the lesser is busy for at least this share of the greater one's time.
BALANCE = 0.75


def main() -> int:
    opts = options(__doc__)
    weights = dummy_weights(opts)
    gpu = Placement.all_on(Tier.GPU)
    policy = Policy(32, 2, Placement.all_on(Tier.CPU), gpu, gpu)
    rounds: list[Measured] = []
    rates: list[float] = []
    for _ in range(opts.rounds):
        with engine(weights, policy, emulated(), opts) as made:
            free = run(made, CALIBRATION)
        pass_bytes = sum(unit.load_bytes for unit in free.plan.job.streamed)
        # The fastest pass: a link too slow would make the run link-bound, which is another benchmark.
        rates.append(pass_bytes / min(free.pass_s))
        with engine(weights, policy, emulated(h2d=rates[-1]), opts) as made:
            rounds.append(run(made, JOB))
    last = rounds[-1]
    whole = [m.wall_s / m.busy_s(m.busiest) for m in rounds]
    alike = [_balance(m, rate) for m, rate in zip(rounds, rates, strict=True)]
    steady = [sum(m.pass_s) / max(_steady_busy(m, rate)) for m, rate in zip(rounds, rates, strict=True)]
    report = Report("balanced", Evidence.EMULATED, opts)
    report.settings = {"h2d_bytes_per_s": rates, "policy": to_json(policy), "job": vars(JOB), "balance": alike}
    report.rounds = [m.to_dict() for m in rounds]
    report.bars = [
        Bar(
            "whole run",
            f"{last.busy_s(last.busiest):.2f} s ({last.busiest})",
            f"{median([m.wall_s for m in rounds]):.2f} s",
            tuple(whole),
            LIMIT,
            at_most=True,
        ),
        Bar(
            "decode passes",
            f"{max(_steady_busy(last, rates[-1])):.2f} s",
            f"{sum(last.pass_s):.2f} s",
            tuple(steady),
            LIMIT,
            at_most=True,
        ),
    ]
    if min(alike) < BALANCE:
        report.where_time_goes.append(
            f"link and compute were not alike (ratios {[round(a, 2) for a in alike]}): quieter machine, again"
        )
    if not all(bar.met for bar in report.bars):
        report.where_time_goes += lane_lines(last, "last round")
    return report.finish()


def _steady_busy(measured: Measured, rate: float) -> tuple[float, float]:
    """Busy seconds of the link and gpu in the decode passes: the link's from its bytes, the gpu's without the
    prefill's.

    In the prefill the gpu lane computes for longer than its share of the link takes, so it is busy throughout.
    """
    streamed = sum(unit.load_bytes for unit in measured.plan.job.streamed)
    link = len(measured.pass_s) * streamed / rate
    return link, measured.busy_s(Lane.GPU) - min(measured.prefill_s, measured.busy_s(Lane.GPU))


def _balance(measured: Measured, rate: float) -> float:
    link, gpu = _steady_busy(measured, rate)
    return min(link, gpu) / max(link, gpu)


if __name__ == "__main__":
    sys.exit(main())
