"""How long cells will take on this machine, from what their systems are predicted to do; asked once for each cell of a
command."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flexgen_bench.cells.local_rates import LocalRates
from flexgen_bench.config.cell import Cell
from flexgen_bench.core.cell import CellSpec, MeasureSpec
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.simulated import Simulated
from flexgen_bench.core.status import Status
from flexgen_bench.core.tiers import Lane
from flexgen_bench.core.workload import Workload
from flexgen_bench.models.registry import weight_bytes
from flexgen_bench.runner import tuning
from flexgen_bench.runner.predictions import as_recorded, exactly, predict, predict_policy

# A cell's process: Python, torch, transformers and what else the system imports, and the end of it all; and one whose
# system refuses. MEASURED in results/default, 2 cores: 2.2 to 3.0 s of rivals beside their loading and generating, 8 s
# of ours with its first packing.
STARTUP_S, REFUSED_S = 4.0, 3.0
# Loading reads every weight once, and copies it once more within memory. MEASURED there: 2.2 to 2.8 s for 0.5 GB of
# SmolLM2, most of it making the model's objects.
_LOAD_S = 2.0


@dataclass(frozen=True)
class Expected:
    """rates: of this machine. cache: on whose disk files go."""

    rates: LocalRates
    cache: Path
    _rows: dict[str, Simulated] = field(default_factory=dict)

    def row(self, cell: Cell) -> Simulated | None:
        """What the cell is predicted to do here; None where this machine's rates are not known."""
        known = self.rates.of(cell)
        if known.spec.hardware.rates is None:
            return None
        name = known.spec.spec_hash
        if name not in self._rows:
            self._rows[name] = predict(exactly(known), known.spec.lossy, self.cache)
        return self._rows[name]

    def seconds(self, cell: Cell) -> float | None:
        """What the cell will take; None where nobody can say."""
        row = self.row(cell)
        return None if row is None else cell_seconds(row)

    def of_workload(self, cells: Mapping[str, Cell], workload: Workload, systems: Collection[str]) -> dict[str, float]:
        """The same of the cells of some systems if they had another workload, by system; those of which nobody can say
        are left out."""
        changed = {name: replace(cells[name], spec=replace(cells[name].spec, workload=workload)) for name in systems}
        known = {name: self.seconds(cell) for name, cell in changed.items()}
        return {name: seconds for name, seconds in known.items() if seconds is not None}


@dataclass(frozen=True)
class CellForecast:
    """``runner.suite.Forecast`` of a cell of this machine."""

    cell: Cell
    expected: Expected

    def seconds(self) -> float | None:
        return self.expected.seconds(self.cell)

    def before_run(self) -> Mapping[str, Any]:
        row = self.expected.row(self.cell)
        return {} if row is None else as_recorded(row)

    def of_policy(self, policy: Mapping[str, Any]) -> Mapping[str, Any] | None:
        row = predict_policy(exactly(self.cell), policy, self.expected.cache)
        return None if row is None else as_recorded(row)


def cell_seconds(row: Simulated) -> float | None:
    """Seconds of a whole cell: its process, loading, the search for its batch size, warm-up and repetitions.

    None for a system without a model, or whose model fails. Where a model goes on to what its users would do instead of
    what is asked for, the system itself refuses.
    """
    if row.status in (Status.OOM, Status.UNAVAILABLE) and row.model.predictor is not None:
        return REFUSED_S
    if row.prediction is None:
        return None
    if not _is_as_requested(row.spec, row.prediction):
        return REFUSED_S
    measure = row.spec.measure
    generations = (measure.warmup + measure.repetitions) * row.prediction.total_s
    search = search_seconds(row.prediction, measure)
    return STARTUP_S + _load_seconds(row) + search + generations


def search_seconds(prediction: Prediction, measure: MeasureSpec) -> float:
    """Seconds of the search for a batch size (``runner/tuning.py``): for each size a prefill of that many prompts, and
    a few tokens.

    A prefill takes its share of the whole one's time, but no less than a decode step, which is a pass over the weights,
    too.
    """
    sizes = tuning.candidates(measure.batch_sizes, prediction.num_prompts)
    if len(sizes) < 2:
        return 0.0
    passes = prediction.blocks * max(1, prediction.gen_len - 1)
    step_s = prediction.decode_s / passes
    tokens = min(measure.tuning_gen_len, max(2, prediction.gen_len))
    prefills = (prediction.prefill_s * size / prediction.num_prompts for size in sizes)
    return sum(max(prefill, step_s) + (tokens - 1) * step_s for prefill in prefills)


def _load_seconds(row: Simulated) -> float:
    spec, hardware = row.spec, row.hardware
    size = weight_bytes(spec.model.shape, spec.dtype)
    disk = hardware.link_rate(Lane.DISK_READ)
    return _LOAD_S + (size / disk if disk else 0.0)


def _is_as_requested(spec: CellSpec, prediction: Prediction) -> bool:
    """Whether the prediction has kept to the system's options."""
    kept = {k: v for k, v in spec.system_options.items() if v is not None and v != "auto"}
    return all(prediction.settings.get(key, value) == value for key, value in kept.items())
