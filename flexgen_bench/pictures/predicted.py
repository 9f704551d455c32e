"""Predicted against measured: every run that was predicted from its machine's constants, and the diagonal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from flexgen_bench.core.digits import fixed
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.core.units import format_bytes
from flexgen_bench.pictures.facets import evidence_note, grouped, key_of, series_of
from flexgen_bench.pictures.gather import Material
from flexgen_bench.pictures.picture import Axis, Found, Guide, Panel, Picture, Point, point
from flexgen_bench.pictures.run import Run

NAME = "predicted-measured"
_RAN = (Evidence.MEASURED, Evidence.EMULATED)
X = Axis("measured generation throughput", "tokens/s", log=True)
Y = Axis("predicted from the machine's constants", "tokens/s", log=True)


def predicted_measured(material: Material) -> Found:
    """A picture for each machine, of all its models and workloads: each point says which."""
    pictures, missing = [], []
    ran = [run for run in material.runs if run.evidence in _RAN and run.status is Status.OK]
    for (machine, hardware), runs in grouped(ran, lambda r: (r.setting.machine, r.hardware)).items():
        told = [run for run in runs if run.predicted is not None and run.throughput is not None]
        without = len(runs) - len(told)
        if told:
            pictures.append(_picture(machine, hardware, told, without))
        else:
            missing.append(
                f"{machine}; {hardware}: none of {len(runs)} records has a prediction (measured before predictions "
                f"were kept, or nobody has a model of the system); measure again: {runs[0].rerun_command}"
            )
    return Found(tuple(pictures), tuple(missing))


def _picture(machine: str, hardware: str, runs: Sequence[Run], without: int) -> Picture:
    parts = _telling(runs)
    series = series_of(runs, lambda run: _point(run, parts))
    ends = [value for one in series for p in one.points for value in (p.x, p.y)]
    line = Guide("predicted = measured", ((min(ends), min(ends)), (max(ends), max(ends))))
    facts = {
        "machine": machine,
        "hardware": hardware,
        "model": ", ".join(sorted({run.setting.model_words for run in runs})),
        "workload": "; ".join(sorted({run.setting.workload for run in runs})),
    }
    off = [abs(p.y / p.x - 1) for one in series for p in one.points]
    notes = [
        f"Off by {_percent(statistics.median(off))} at the median, {_percent(max(off))} at most; {len(off)} runs.",
        "The prediction is SIMULATED, under the policy that ran; nothing measured in the run is in it.",
        *evidence_note(series),
        *([f"Not shown: {without} runs without a prediction."] if without else []),
    ]
    key = key_of((NAME, hardware), (machine, hardware))
    return Picture(NAME, key, "Predicted against measured", facts, (Panel("", X, Y, series, (line,)),), notes)


def _point(run: Run, parts: Sequence[int]) -> Point | None:
    if run.throughput is None or run.predicted is None:
        return None
    label = ", ".join(word for i in parts if (word := _words(run)[i]))
    return point(run.throughput.value, run.predicted, label, run.source, x_range=run.throughput.range, y_range=None)


def _words(run: Run) -> tuple[str, ...]:
    """What tells one run of a machine from another, the most telling first."""
    caps = (("host", run.cpu_cap), ("gpu", run.gpu_cap))
    held = (f"{name} {format_bytes(cap)}" if cap else "" for name, cap in caps)
    return (run.setting.model, run.workload, run.setting.dtype, *held, run.batch_words)


def _telling(runs: Sequence[Run]) -> list[int]:
    """Of the words those that tell runs apart which the ones before do not."""
    chosen: list[int] = []
    groups = 1
    for i in range(len(_words(runs[0]))):
        finer = len({tuple(_words(run)[j] for j in (*chosen, i)) for run in runs})
        if finer > groups:
            chosen.append(i)
            groups = finer
    return chosen


def _percent(share: float) -> str:
    return f"{fixed(100 * share, 0)} %"
