"""What 4-bit weights save when the link is the limit: bytes over it and wall time, against 16-bit weights.

``python benchmarks/compression.py [--quick] [--out results/benchmarks/compression.json]``

Weights on the cpu, an emulated accelerator behind an h2d link that is slow for 4-bit weights too; runs alternate.
Bound:
16 bits / 4.5 bits per value (codes, and two float16 parameters per group of 64) for the matrices, 1 for the rest.
"""

from __future__ import annotations

import sys

from common import Bar, Report, median, options
from engine_runs import Measured, Shape, dummy_weights, emulated, engine, lane_lines, run

from flexgen_bench.core.compression import EXACT, Compression, Lossy
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.units import GB

FEWER_BYTES, FASTER = 3.4, 3.0
FOUR_BITS = Compression(4)
# A pass over OPT-1.3B takes 10.5 s in 16 bits and 3 s in 4: above what unpacking and computing take on two cores.
H2D = {"opt-1.3b": 0.25 * GB, "opt-125m": 0.05 * GB}
JOB = Shape(prompts=4, prompt_len=8, gen_len=3)


def main() -> int:
    opts = options(__doc__)
    rate = H2D[opts.model]
    gpu = Placement.all_on(Tier.GPU)
    kinds = {"16-bit": None, "4-bit": FOUR_BITS}
    weights = {kind: dummy_weights(opts, compression) for kind, compression in kinds.items()}
    runs: dict[str, list[Measured]] = {kind: [] for kind in kinds}
    for _ in range(opts.rounds):
        for kind, compression in kinds.items():
            lossy = Lossy(weights=compression) if compression else EXACT
            policy = Policy(4, 1, Placement.all_on(Tier.CPU), gpu, gpu, lossy=lossy)
            with engine(weights[kind], policy, emulated(h2d=rate), opts) as made:
                runs[kind].append(run(made, JOB))
    pairs = list(zip(runs["16-bit"], runs["4-bit"], strict=True))
    report = Report("compression", Evidence.EMULATED, opts)
    report.settings = {"h2d_bytes_per_s": rate, "job": vars(JOB)}
    report.rounds = [{"weights": kind} | m.to_dict() for kind in kinds for m in runs[kind]]
    report.bars = [
        Bar(
            "fewer bytes",
            f"{pairs[0][0].bytes(Lane.H2D) / GB:.2f} GB in 16 bits",
            f"{pairs[0][1].bytes(Lane.H2D) / GB:.2f} GB in 4",
            tuple(a.bytes(Lane.H2D) / b.bytes(Lane.H2D) for a, b in pairs),
            FEWER_BYTES,
            at_most=False,
        ),
        Bar(
            "faster",
            f"{median([a.wall_s for a, _ in pairs]):.2f} s in 16 bits",
            f"{median([b.wall_s for _, b in pairs]):.2f} s in 4",
            tuple(a.wall_s / b.wall_s for a, b in pairs),
            FASTER,
            at_most=False,
        ),
    ]
    if not all(bar.met for bar in report.bars):
        for kind in kinds:
            report.where_time_goes += lane_lines(runs[kind][-1], f"{kind}, last round")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
