"""How close a run comes to its slowest link: weights on the cpu, an emulated accelerator behind a slow h2d link.

``python benchmarks/link_bound.py [--quick] [--out results/benchmarks/link_bound.json]``

Bound: bytes over the h2d link / its bandwidth. Judged for the whole run (prefill, start and end included) and for
the steady passes (decode). The sequences are few, so that computing takes a fraction of the link's time.
"""

from __future__ import annotations

import sys

from common import Bar, Report, median, options
from engine_runs import Measured, Shape, dummy_weights, emulated, engine, lane_lines, run

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.units import GB

LIMIT = 1.05
# A pass over OPT-1.3B's 2.6 GB takes 2.6 s on this link; computing it takes a fifth of that on two cores.
H2D = {"opt-1.3b": 1.0 * GB, "opt-125m": 0.25 * GB}
JOB = Shape(prompts=4, prompt_len=16, gen_len=8)


def main() -> int:
    opts = options(__doc__)
    rate = H2D[opts.model]
    weights = dummy_weights(opts)
    gpu = Placement.all_on(Tier.GPU)
    policy = Policy(4, 1, Placement.all_on(Tier.CPU), gpu, gpu)
    rounds: list[Measured] = []
    with engine(weights, policy, emulated(h2d=rate), opts) as made:
        for _ in range(opts.rounds):
            rounds.append(run(made, JOB))
    units = rounds[0].plan.job.streamed
    pass_bytes = sum(unit.load_bytes for unit in units)
    whole = [m.wall_s / (m.bytes(Lane.H2D) / rate) for m in rounds]
    steady = [sum(m.pass_s) / (len(m.pass_s) * pass_bytes / rate) for m in rounds]
    report = Report("link_bound", Evidence.EMULATED, opts)
    report.settings = {"h2d_bytes_per_s": rate, "policy": to_json(policy), "job": vars(JOB)}
    report.rounds = [m.to_dict() for m in rounds]
    report.bars = [
        Bar(
            "whole run",
            f"{rounds[0].bytes(Lane.H2D) / rate:.2f} s",
            f"{median([m.wall_s for m in rounds]):.2f} s",
            tuple(whole),
            LIMIT,
            at_most=True,
        ),
        Bar(
            "steady passes",
            f"{pass_bytes / rate:.3f} s/pass",
            f"{median([sum(m.pass_s) / len(m.pass_s) for m in rounds]):.3f} s/pass",
            tuple(steady),
            LIMIT,
            at_most=True,
        ),
    ]
    if not all(bar.met for bar in report.bars):
        report.where_time_goes = lane_lines(rounds[-1], "last round")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
