"""How close a run comes to its slowest link: weights on the cpu, an emulated accelerator behind a slow h2d link.

``python benchmarks/link_bound.py [--quick] [--out results/benchmarks/link_bound.json]``

Bound: bytes over the h2d link / its bandwidth. Judged for the whole run (prefill, start and end included) and for
the steady passes (decode). The sequences are few, so that computing takes a fraction of the link's time. Once with all
weights of a dense model streamed, once with the experts of a mixture, whose other weights are on the accelerator.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

from common import Bar, Options, Report, median, options
from engine_runs import Measured, Shape, dummy_weights, dummy_weights_of, emulated, engine, lane_lines, run

from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.units import GB
from flexgen_bench.engine.build import PackedWeights

LIMIT = 1.05
# A pass over OPT-1.3B's 2.6 GB takes 2.6 s on this link; computing it takes a fifth of that on two cores.
H2D = {"opt-1.3b": 1.0 * GB, "opt-125m": 0.25 * GB}
JOB = Shape(prompts=4, prompt_len=16, gen_len=8)
# 16 experts of 6 MB in every layer, of which a token goes to 4; a pass over their 1.2 GB takes 2.4 s.
MIXTURE_H2D = 0.5 * GB
MIXTURE = ModelShape(
    name="mixture-of-16",
    family="qwen3_moe",
    num_layers=12,
    hidden_size=1024,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    ffn_size=4096,
    vocab_size=50_272,
    max_positions=2048,
    tied_embeddings=True,
    options={
        "rope_theta": 1e6,
        "norm_eps": 1e-6,
        "attention_bias": False,
        "experts": 16,
        "experts_per_token": 4,
        "expert_size": 1024,
        "renormalised": True,
        "dense_layers": [],
    },
)


def main() -> int:
    opts = options(__doc__)
    gpu, cpu = Placement.all_on(Tier.GPU), Placement.all_on(Tier.CPU)
    streamed = Policy(4, 1, cpu, gpu, gpu)
    apart = Policy(4, 1, gpu, gpu, gpu, experts=cpu)
    mixture = replace(MIXTURE, num_layers=2) if opts.quick else MIXTURE
    report = Report("link_bound", Evidence.EMULATED, opts)
    report.settings = {"job": vars(JOB)}
    for name, weights, policy, rate in (
        ("", dummy_weights(opts), streamed, H2D[opts.model]),
        ("experts: ", dummy_weights_of(ModelSpec(mixture), opts), apart, MIXTURE_H2D),
    ):
        report.settings[name or "dense"] = {"h2d_bytes_per_s": rate, "policy": to_json(policy)}
        bars = list(_bars(name, weights, policy, rate, opts, report))
        report.bars += bars
    return report.finish()


def _bars(
    name: str, weights: PackedWeights, policy: Policy, rate: float, opts: Options, report: Report
) -> Iterator[Bar]:
    rounds: list[Measured] = []
    with engine(weights, policy, emulated(h2d=rate), opts) as made:
        for _ in range(opts.rounds):
            rounds.append(run(made, JOB))
    report.rounds += [m.to_dict() for m in rounds]
    pass_bytes = sum(unit.load_bytes for unit in rounds[0].plan.job.streamed)
    whole = [m.wall_s / (m.bytes(Lane.H2D) / rate) for m in rounds]
    steady = [sum(m.pass_s) / (len(m.pass_s) * pass_bytes / rate) for m in rounds]
    yield Bar(
        f"{name}whole run",
        f"{rounds[0].bytes(Lane.H2D) / rate:.2f} s",
        f"{median([m.wall_s for m in rounds]):.2f} s",
        tuple(whole),
        LIMIT,
        at_most=True,
    )
    yield Bar(
        f"{name}steady passes",
        f"{pass_bytes / rate:.3f} s/pass",
        f"{median([sum(m.pass_s) / len(m.pass_s) for m in rounds]):.3f} s/pass",
        tuple(steady),
        LIMIT,
        at_most=True,
    )
    if median(whole) > LIMIT or median(steady) > LIMIT:
        report.where_time_goes += lane_lines(rounds[-1], f"{name}last round")


if __name__ == "__main__":
    sys.exit(main())
