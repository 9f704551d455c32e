"""What the cells of a command line would do, without doing it: a summary for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexgen_bench.cells.local_rates import LocalRates
from flexgen_bench.cells.work import as_in_paper, is_simulated, known_shapes, refuse_out_of_place
from flexgen_bench.checkpoints.prepared import is_prepared
from flexgen_bench.config.cell import Cell
from flexgen_bench.core.cell import WeightSource
from flexgen_bench.core.simulated import Simulated
from flexgen_bench.core.units import format_bytes
from flexgen_bench.report.plan_summary import PlanSummary
from flexgen_bench.runner.feasibility import Refusal, checkpoint_bytes, disk_bytes, explain
from flexgen_bench.runner.predictions import exactly, simulate
from flexgen_bench.runner.suite import finished_record
from flexgen_bench.store.reader import find_record

_MAKING = {
    WeightSource.DUMMY: "making random weights",
    WeightSource.PACKAGE: "downloading (once) and converting",
    WeightSource.HUB: "downloading (once) and converting",
    WeightSource.PATH: "converting",
}


def plan_summaries(
    cells: Sequence[Cell], suite: str, results: Path, cache: Path, rates: LocalRates
) -> list[PlanSummary]:
    """One summary for each cell, more where it would be simulated compressed, too. Writes nothing but, into the cache,
    what ``rates`` measures on first use and the policies that were searched for."""
    known = known_shapes()
    refusals = [explain(cell.spec, cache, known) for cell in cells]
    for cell, refusal in zip(cells, refusals, strict=True):
        refuse_out_of_place(cell, refusal)
    requests = [
        as_in_paper(cell) if _is_elsewhere(refusal) else exactly(rates.of(cell))
        for cell, refusal in zip(cells, refusals, strict=True)
    ]
    return [
        _summary(request.cell, row, refusal, suite, results, cache)
        for request, refusal, rows in zip(requests, refusals, simulate(requests, cache, rates.notify), strict=True)
        for row in rows
    ]


def _is_elsewhere(refusal: Refusal | None) -> bool:
    """Whether the cell is of a machine that is not this one."""
    return refusal is not None and bool(refusal.machine)


def _summary(
    cell: Cell, row: Simulated, refusal: Refusal | None, suite: str, results: Path, cache: Path
) -> PlanSummary:
    elsewhere = _is_elsewhere(refusal)
    return PlanSummary(
        cell=cell,
        row=row,
        obstacle=_obstacle(cell, refusal),
        fits=refusal is None or elsewhere,
        first="" if elsewhere else _first(cell, cache),
        recorded=find_record(results, cell.spec.spec_hash, suite),
        done=finished_record(results, cell.spec.spec_hash, suite) is not None,
    )


def _obstacle(cell: Cell, refusal: Refusal | None) -> str:
    if refusal is None:
        return "" if cell.can_run else "this system can only be simulated"
    if not refusal.machine:
        return refusal.text
    then = "the run is simulated" if is_simulated(cell, refusal) else "nothing can be run"
    return f"{refusal.machine}: {then}"


def _first(cell: Cell, cache: Path) -> str:
    """What the first run makes or fetches before it begins."""
    spec = cell.spec
    if not cell.can_run or is_prepared(spec.model, spec.dtype, cache):
        return ""
    checkpoint, whole = checkpoint_bytes(spec.model, spec.dtype), disk_bytes(spec)
    text = f"{_MAKING[spec.model.weights]}: a checkpoint of {format_bytes(checkpoint)}"
    packed = whole - checkpoint
    return text + (f", and {format_bytes(packed)} packed for streaming" if packed > 0 else "")
