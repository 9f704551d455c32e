"""What the host does per layer and micro-batch: operators, kernels and Python calls, and the time of the thread that
issues them.

``python benchmarks/host_cost.py [--quick] [--rounds 5] [--out results/benchmarks/host_cost.json]``

Counted for every kind of policy, in prefill and decode, on tiny models (an OPT, and a Llama that is resident);
``host_counts.py`` says how, and ``pass_counts.py`` counts whole passes, with graphs and without. The first layer of a
pass does what all of them share, so a count is that of a model of six layers. Times are those of the gpu lane's thread
beside streams and events that do nothing: the operators themselves, on tiny float32 tensors, are most of them. A GPU's
host takes longer for an operator (a launch) and does not compute it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import Bar, Report, median, options
from host_counts import CASES, MIXTURES, Counts, count, tiny_llama, tiny_mixture, tiny_opt
from null_device import IssueTime, issue_time
from pass_counts import count_pass

from flexgen_bench.core.status import Evidence

# Of a layer and micro-batch in decode: operators, kernels, Python calls at most.
BARS = {"resident": (25, 12, 40), "4-bit KV": (30, 14, 60)}
WHAT = ("operators", "kernels", "calls")


def main() -> int:
    opts = options(__doc__, rounds=5)
    report = Report("host_cost", Evidence.MEASURED, opts)
    with tempfile.TemporaryDirectory(prefix="host-cost-") as name:
        folder = Path(name)
        counted = {case: count(CASES[case], tiny_opt(), folder) for case in CASES}
        counted["resident Llama"] = count(CASES["resident"], tiny_llama(), folder)
        counted |= {case: count(MIXTURES[case], tiny_mixture(), folder) for case in MIXTURES}
        passes = {case: [count_pass(CASES[case], folder, graphs) for graphs in (False, True)] for case in CASES}
        timed: dict[str, list[IssueTime]] = {case: [] for case in CASES}
        for _ in range(opts.rounds):  # interleaved
            for case, times in timed.items():
                times.append(issue_time(CASES[case], folder))
    for case, limits in BARS.items():
        layer_counts = counted[case]["decode"].per_layer
        for what, limit in zip(WHAT, limits, strict=True):
            ratio = layer_counts[what] / limit
            text = f"{case}: {what}"
            report.bars.append(Bar(text, str(limit), f"{layer_counts[what]:.1f}", (ratio,), 1.0, True))
    launches = passes["resident"][1].launches
    report.bars.append(Bar("resident: launches of a pass", "5", f"{launches:.1f}", (launches / 5,), 1.0, True))
    report.where_time_goes += [
        f"{case}: decode pass of one micro-batch: launches {eager.launches:.0f}, with graphs {graphed.launches:.0f}"
        f" ({eager.fetched} units moved or unpacked); passes that wait for the host: {eager.waits}"
        for case, (eager, graphed) in passes.items()
    ]
    report.where_time_goes += [_line(case, phases) for case, phases in counted.items()]
    for case, times in timed.items():
        actions = median([t.actions_us for t in times])
        lane = [t.lane_us for t in times]
        report.where_time_goes.append(
            f"{case}: decode, us of the gpu lane's thread per layer and micro-batch: {median(lane):.0f} "
            f"({min(lane):.0f} to {max(lane):.0f}), of these in actions {actions:.0f}"
        )
    report.rounds = [
        {
            "counts": {case: {p: vars(c) for p, c in phases.items()} for case, phases in counted.items()},
            "issue_us": {case: [vars(t) for t in times] for case, times in timed.items()},
        }
    ]
    return report.finish()


def _line(case: str, phases: dict[str, Counts]) -> str:
    """``steps, operators, kernels, Python calls`` of both phases, and what weights add per layer and pass."""
    prefill, decode = (phases[p].per_layer for p in ("prefill", "decode"))
    words = [
        f"{name} {prefill[key]:.0f} -> {decode[key]:.0f}"
        for name, key in (
            ("steps", "steps"),
            ("operators", "operators"),
            ("kernels", "kernels"),
            ("Python calls", "calls"),
        )
    ]
    weights = phases["decode"].per_pass
    extra = ""
    if weights:
        extra = "; weights, per layer and pass: " + ", ".join(f"{n} {weights[n]:.0f}" for n in WHAT)
    return f"{case}: prefill -> decode: {', '.join(words)}{extra}"


if __name__ == "__main__":
    sys.exit(main())
