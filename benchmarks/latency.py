"""A batch of one: layers in host memory moved to the accelerator in every pass, or computed where they lie.

``python benchmarks/latency.py [--quick] [--out results/benchmarks/latency.json]``

An emulated accelerator behind a 2 GB/s link, one prompt, all decoder layers on the cpu. Moving takes weights / link
bandwidth per token; computing in place reads the weights from memory instead. No outside bar: in place must be faster,
or the policy has no reason to be. Bound of the ratio: the link's time for a pass / the processor's own time for it
(the same model without accelerator).
"""

from __future__ import annotations

import sys
from dataclasses import replace

from common import Bar, Report, median, options
from engine_runs import HOST, Measured, Shape, dummy_weights, emulated, engine, lane_lines, run

from flexgen_bench.core.policy import Offloaded, Placement, Policy
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import GB

LIMIT = 1.0
H2D = 2 * GB
JOB = Shape(prompts=1, prompt_len=16, gen_len=12)


def main() -> int:
    opts = options(__doc__)
    weights = dummy_weights(opts)
    gpu, cpu = Placement.all_on(Tier.GPU), Placement.all_on(Tier.CPU)
    machine = emulated(h2d=H2D, d2h=H2D)
    policies = {
        "move": (Policy(1, 1, cpu, cpu, gpu, offloaded=Offloaded.MOVE), machine),
        "in place": (Policy(1, 1, cpu, cpu, gpu, offloaded=Offloaded.IN_PLACE), machine),
        "no accelerator": (Policy(1, 1, cpu, cpu, cpu), HOST),
    }
    runs: dict[str, list[Measured]] = {name: [] for name in policies}
    for _ in range(opts.rounds):
        for name, (policy, hardware) in policies.items():
            with engine(weights, policy, hardware, opts) as made:
                run(made, replace(JOB, gen_len=2))  # warm-up
                runs[name].append(run(made, JOB))
    seconds = {name: [_per_token(m) for m in measured] for name, measured in runs.items()}
    pass_s = sum(u.load_bytes for u in runs["move"][0].plan.job.streamed) / H2D
    report = Report("latency", Evidence.EMULATED, opts)
    report.settings = {"h2d_bytes_per_s": H2D, "job": vars(JOB), "seconds_per_token": seconds}
    report.rounds = [{"layers": name} | m.to_dict() for name in policies for m in runs[name]]
    report.bars = [
        Bar(
            "move / in place, s per token",
            f"{pass_s / median(seconds['no accelerator']):.2f}x",
            f"{median(seconds['move']):.3f} / {median(seconds['in place']):.3f}",
            tuple(m / p for m, p in zip(seconds["move"], seconds["in place"], strict=True)),
            LIMIT,
            at_most=False,
        )
    ]
    report.where_time_goes.append(f"no accelerator: {median(seconds['no accelerator']):.3f} s per token")
    if not report.bars[0].met:
        for name, measured in runs.items():
            report.where_time_goes += lane_lines(measured[-1], f"{name}, last round")
    return report.finish()


def _per_token(measured: Measured) -> float:
    return median(measured.pass_s)


if __name__ == "__main__":
    sys.exit(main())
