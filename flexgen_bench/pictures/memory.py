"""The memory ladder: throughput against how much memory a system may use, as a share of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flexgen_bench.core.digits import settled
from flexgen_bench.core.status import Status
from flexgen_bench.core.units import format_bytes
from flexgen_bench.pictures.facets import Facet, evidence_note, facets, grouped, series_of, short
from flexgen_bench.pictures.gather import Material
from flexgen_bench.pictures.picture import Axis, Better, Failure, Found, Panel, Picture, Point, Series, point
from flexgen_bench.pictures.run import Run

NAME = "memory"
TIERS = {"cpu": "host memory", "gpu": "gpu memory"}
Y = Axis("generation throughput", "tokens/s", log=True, better=Better.HIGHER)


def memory(material: Material) -> Found:
    """A ladder for each setting whose host memory, or gpu memory, was capped at two sizes or more."""
    pictures, missing = [], []
    for tier, name in TIERS.items():
        for facet in facets(material.runs, free=tier):
            shares = {_share(run, tier) for run in facet.runs} - {None}
            if len(shares) >= 2:
                pictures.append(_picture(facet, tier, name))
            elif shares:
                (only,) = shares
                missing.append(
                    f"{facet.words}: all {len(facet.runs)} runs have one cap of {name}, {only:.0f} % of the weights; "
                    f"measure others with gpu.{tier}_memory=SIZE added: {facet.runs[0].rerun_command}"
                )
    return Found(tuple(pictures), tuple(missing))


def _share(run: Run, tier: str) -> float | None:
    """The cap in percent of the uncompressed weights."""
    cap = run.cpu_cap if tier == "cpu" else run.gpu_cap
    return settled(100 * cap / run.weight_bytes) if cap and run.weight_bytes else None


def _picture(facet: Facet, tier: str, name: str) -> Picture:
    capped = [run for run in facet.runs if _share(run, tier) is not None]
    fastest, slower = _fastest(capped, tier)
    series = [_with_failures(one, capped, tier) for one in series_of(fastest, lambda r: _point(r, tier), joined=True)]
    series += _only_failures(series, capped, tier)
    weights = capped[0].weight_bytes or 0
    x = Axis(f"{name}, share of {format_bytes(weights)} of weights", "%")
    notes = [
        *evidence_note(series),
        *([f"Where a system ran several times under a cap, its fastest run ({slower} left out)."] if slower else []),
        *(["× = ended without a result."] if any(one.failures for one in series) else []),
    ]
    uncapped = len(facet.runs) - len(capped)
    if uncapped:
        notes.append(f"Not shown: {uncapped} runs without a cap of {name}.")
    title = f"Throughput against {name}"
    return Picture(NAME, facet.key(NAME, tier), title, facet.facts, (Panel("", x, Y, series),), notes)


def _point(run: Run, tier: str) -> Point | None:
    x, y = _share(run, tier), run.throughput
    if x is None or y is None:
        return None
    return point(x, y.value, run.batch_words, run.source, x_range=None, y_range=y.range)


def _fastest(runs: Sequence[Run], tier: str) -> tuple[list[Run], int]:
    """Of runs of one system, compression, evidence and cap the fastest; how many others gave a number."""
    kept, others = [], 0
    for members in grouped(runs, lambda r: (r.system, r.lossy, r.evidence.value, _share(r, tier))).values():
        timed = [run for run in members if run.throughput is not None]
        if timed:
            kept.append(max(timed, key=lambda run: settled(run.throughput.value) if run.throughput else 0.0))
            others += len(timed) - 1
    return kept, others


def _failures(runs: Sequence[Run], tier: str) -> tuple[Failure, ...]:
    found = []
    for run in runs:
        x = _share(run, tier)
        if x is not None and run.status is not Status.OK:
            found.append(Failure(x, run.status.value, short(run.reason), run.source))
    return tuple(sorted(found, key=lambda f: (f.x, f.source.run_id)))


def _with_failures(one: Series, runs: Sequence[Run], tier: str) -> Series:
    """A cap under which another run gave a number is no failure of the system."""
    reached = {p.x for p in one.points}
    mine = [r for r in runs if (r.system, r.lossy, r.evidence) == (one.system, one.lossy, one.evidence)]
    return replace(one, failures=tuple(f for f in _failures(mine, tier) if f.x not in reached))


def _only_failures(series: Sequence[Series], runs: Sequence[Run], tier: str) -> list[Series]:
    """Systems that gave no number at all are in the picture too."""
    shown = {(one.system, one.lossy, one.evidence) for one in series}
    rest = [run for run in runs if (run.system, run.lossy, run.evidence) not in shown]
    groups = grouped(rest, lambda run: (run.system, run.lossy, run.evidence))
    made = [Series(s, c, e, (), True, _failures(members, tier)) for (s, c, e), members in groups.items()]
    return [one for one in made if one.failures]
