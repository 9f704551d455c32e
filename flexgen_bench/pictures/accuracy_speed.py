"""Accuracy lost against speed gained: records of accuracy beside records of throughput that change results alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flexgen_bench.accuracy.compare.outcome import ModelOutcome, ModeOutcome
from flexgen_bench.core.digits import settled
from flexgen_bench.core.status import Evidence
from flexgen_bench.pictures.facets import Facet, evidence_note, facets, grouped
from flexgen_bench.pictures.gather import Material
from flexgen_bench.pictures.picture import Axis, Better, Found, Guide, Panel, Picture, Point, Range, Series, point
from flexgen_bench.pictures.run import Quantity, Run

NAME = "accuracy-speed"
X = Axis("speed, as a multiple of the uncompressed run's", "x", log=True, better=Better.HIGHER)
Y = Axis("change of the mean score", "points", better=Better.HIGHER)
POINTS = 100  # hundredths of a score


def accuracy_speed(material: Material) -> Found:
    """A picture for each setting in which a system ran uncompressed and with a compression whose accuracy is known."""
    pictures, missing = [], []
    for facet in facets(material.runs):
        timed = [run for run in facet.runs if run.throughput is not None]
        if not any(run.lossy for run in timed):
            continue
        series, notes = [], []
        for (system, evidence), runs in grouped(timed, lambda r: (r.system, r.evidence.value)).items():
            points, lacking = _points(system, runs, material.accuracy)
            if points:
                series.append(Series(system, "", Evidence(evidence), points))
            notes += lacking
        if series:
            pictures.append(_picture(facet, series, notes))
        else:
            missing += [f"{facet.words}: {line}" for line in notes]
    missing += _untimed(material)
    return Found(tuple(pictures), tuple(missing))


def _picture(facet: Facet, series: Sequence[Series], lacking: Sequence[str]) -> Picture:
    notes = [
        "Scores: mean change over all tasks with a score between 0 and 1, in hundredths, with its 95 % interval "
        "(MEASURED). Of several runs of one kind the fastest.",
        *evidence_note(series),
        *(f"Not shown: {line}" for line in lacking),
    ]
    panel = Panel("", X, Y, series, (Guide("uncompressed", ((1.0, 0.0),)),))
    return Picture(NAME, facet.key(NAME), "Accuracy lost against speed gained", facet.facts, (panel,), notes)


def _points(system: str, runs: Sequence[Run], accuracy: Iterable[ModelOutcome]) -> tuple[tuple[Point, ...], list[str]]:
    """The compressed runs of a system, and what those lack that have no point."""
    exact = _fastest([run for run in runs if not run.lossy])
    points, lacking = [], []
    for lossy, members in grouped([run for run in runs if run.lossy], lambda run: run.lossy).items():
        run = _fastest(members)
        found = _mode(run, accuracy) if run else None
        if exact is None:
            lacking.append(f"{system} ({lossy}): no uncompressed run of {system} to compare its speed with.")
        elif found is None:
            command = f"python -m flexgen_bench accuracy model={members[0].setting.model} mode=..."
            lacking.append(f"{system} ({lossy}): its accuracy is not known; {command} (--help lists the modes)")
        elif run is not None and (made := _point(run, exact, found)) is not None:
            points.append(made)
        else:
            lacking.append(f"{system} ({lossy}): none of its tasks has a score between 0 and 1.")
    return tuple(sorted(points, key=lambda p: (p.x, p.y, p.label))), lacking


def _fastest(runs: Sequence[Run]) -> Run | None:
    return max(runs, key=lambda run: settled(run.throughput.value) if run.throughput else 0.0, default=None)


def _mode(run: Run, accuracy: Iterable[ModelOutcome]) -> ModeOutcome | None:
    """The same model, system and change of results; of several dtypes the run's own."""
    matching = [
        mode
        for outcome in accuracy
        if (outcome.model, outcome.system) == (run.setting.model, run.system)
        for mode in outcome.modes
        if str(mode.lossy) == run.lossy
    ]
    return max(matching, key=lambda mode: mode.subject.dtype == run.setting.dtype, default=None)


def _point(run: Run, exact: Run, mode: ModeOutcome) -> Point | None:
    change = None if mode.comparison is None else mode.comparison.score
    if change is None or run.throughput is None or exact.throughput is None:
        return None
    dtype = mode.subject.dtype
    scored = f", scored in {dtype}" if dtype != run.setting.dtype else ""
    on_grid = ", weights lie on its grid" if mode.on_grid else ""
    return point(
        run.throughput.value / exact.throughput.value,
        POINTS * change.value,
        f"{mode.mode} ({run.lossy}{scored}{on_grid})",
        run.source,
        x_range=_ratio_range(run.throughput, exact.throughput),
        y_range=(POINTS * change.low, POINTS * change.high),
    )


def _ratio_range(one: Quantity, other: Quantity) -> Range | None:
    """Slowest over fastest to fastest over slowest: no narrower than the truth."""
    if one.range is None or other.range is None:
        return None
    return one.range[0] / other.range[1], one.range[1] / other.range[0]


def _untimed(material: Material) -> list[str]:
    """Modes whose accuracy is known and whose speed is not."""
    timed = {(run.setting.model, run.system, run.lossy) for run in material.runs if run.throughput is not None}
    lines = []
    for outcome in material.accuracy:
        whose = outcome.model, outcome.system
        modes = [m.mode for m in outcome.modes if not m.lossy.is_exact and (*whose, str(m.lossy)) not in timed]
        if modes:
            lines.append(
                f"{outcome.model}, {outcome.system}: accuracy of {', '.join(modes)} is known, its speed is not; "
                f"measure it: python -m flexgen_bench model={outcome.model} system={outcome.system} "
                "policy.lossy.weights=..."
            )
    return lines
