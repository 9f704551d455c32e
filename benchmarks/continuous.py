"""Continuous against block schedule, with balanced phases, on a job of eight blocks.

``python benchmarks/continuous.py [--quick] [--out results/benchmarks/continuous.json]``

An emulated accelerator, weights on the cpu. The prefill of a block is bound by computing, its decode passes by the
link; the link is throttled so that both take as long (measured at the start of every round). Block by block the two
phases follow each other; continuously, each pass prefills one micro-batch while the others decode, so a pass takes the
longer of the two. As many sequence groups in flight as new tokens: then one ends, and one can start, in every pass;
those that decode share one micro-batch. Both schedules have room for the same sequences, and compute as many at once.
Bound, if decoding took no time to compute: (8 blocks x both phases) / (passes of the continuous schedule).
"""

from __future__ import annotations

import sys
from dataclasses import replace

from common import Bar, Report, median, options
from engine_runs import UNTHROTTLED, Measured, Shape, dummy_weights, emulated, engine, lane_lines, run

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.policy import Placement, Policy, Schedule
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.units import GB

LIMIT = 1.3
BLOCKS = 8
# Sequence groups in flight, and new tokens per sequence: a sequence group lives for this many passes.
IN_FLIGHT = 6
# Of a sequence group. Long prompts and few new tokens, as in the paper's workload: what decoding computes is small
# beside prefill, and the prompts of one sequence group are enough rows for large matrix products.
SEQUENCES, PROMPT_LEN = 2, 200
MODEL = "opt-350m"  # eight blocks of a larger one would take a quarter of an hour


def main() -> int:
    opts = replace(options(__doc__, rounds=1), small_model=MODEL)
    weights = dummy_weights(opts)
    block = Shape(SEQUENCES * IN_FLIGHT, PROMPT_LEN, IN_FLIGHT)
    job = replace(block, prompts=block.prompts * (2 if opts.quick else BLOCKS))
    gpu = Placement.all_on(Tier.GPU)
    # Both lanes are busy all the time: with one layer ahead, every hesitation of one would stop the other.
    policy = Policy(block.prompts, 1, Placement.all_on(Tier.CPU), gpu, gpu, prefetch=4)
    runs: dict[Schedule, list[Measured]] = {schedule: [] for schedule in Schedule}
    rates: list[float] = []
    for _ in range(opts.rounds):
        with engine(weights, policy, emulated(), opts) as made:
            prefill = run(made, replace(block, gen_len=1))
        pass_bytes = sum(unit.load_bytes for unit in prefill.plan.job.streamed)
        rates.append(min(UNTHROTTLED, pass_bytes * (IN_FLIGHT - 1) / prefill.busy_s(Lane.GPU)))
        for schedule in Schedule:
            chosen = replace(policy, schedule=schedule)
            with engine(weights, chosen, emulated(h2d=rates[-1]), opts) as made:
                runs[schedule].append(run(made, job))
    pairs = list(zip(runs[Schedule.BLOCK], runs[Schedule.CONTINUOUS], strict=True))
    blocks = job.prompts // block.prompts
    bound = blocks * 2 * (IN_FLIGHT - 1) / (blocks * IN_FLIGHT + IN_FLIGHT - 1)
    report = Report("continuous", Evidence.EMULATED, opts)
    report.settings = {"h2d_bytes_per_s": rates, "policy": to_json(policy), "job": vars(job), "bound": bound}
    report.rounds = [{"schedule": str(s)} | m.to_dict() for s in Schedule for m in runs[s]]
    report.bars = [
        Bar(
            "block / continuous",
            f"{bound:.2f}x",
            f"{median([b.wall_s for b, _ in pairs]):.1f} s / {median([c.wall_s for _, c in pairs]):.1f} s",
            tuple(b.wall_s / c.wall_s for b, c in pairs),
            LIMIT,
            at_most=False,
        )
    ]
    report.where_time_goes.append(f"link throttled to {rates[-1] / GB:.2f} GB/s")
    same = [b.tokens == c.tokens for b, c in pairs]
    if not all(same):  # bfloat16: another batch shape may round a near tie the other way
        report.where_time_goes.append("some tokens differ between the schedules")
    if not report.bars[0].met:
        for schedule in Schedule:
            report.where_time_goes += lane_lines(runs[schedule][-1], f"{schedule}, last round")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
