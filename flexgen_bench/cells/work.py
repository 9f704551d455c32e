"""What is to be done with the cells of a command line: which are measured here, which can only be simulated, which
neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexgen_bench.cells.expected_time import CellForecast, Expected
from flexgen_bench.config.build import model_spec
from flexgen_bench.config.cell import Cell
from flexgen_bench.config.ignored_options import refuse_unmeasured, refuse_unthrottled
from flexgen_bench.config.paths import conf_dir, list_models
from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.hardware import Accelerator
from flexgen_bench.core.model import ModelShape
from flexgen_bench.published.lookup import published_values
from flexgen_bench.runner.feasibility import Refusal, explain
from flexgen_bench.runner.predictions import FOUR_BITS, PredictionRequest
from flexgen_bench.runner.suite import PlannedCell


@dataclass(frozen=True)
class Work:
    """measure: cells for the runner, those included that will be recorded as unavailable. simulate: cells of machines
    that are not here.

    why: what this machine lacks to measure the simulated ones. explanations: of refusals, each once.
    """

    measure: tuple[PlannedCell, ...]
    simulate: tuple[PredictionRequest, ...]
    why: str
    explanations: tuple[str, ...]


def divide(cells: Sequence[Cell], cache: Path, expected: Expected) -> Work:
    """Sort out the cells of a command line. Nothing is run, but this machine may be measured (``expected.rates``)."""
    known = known_shapes()
    measure: list[PlannedCell] = []
    simulate: list[PredictionRequest] = []
    why: dict[str, None] = {}
    explanations: dict[str, None] = {}
    for cell in cells:
        refusal = explain(cell.spec, cache, known)
        refuse_out_of_place(cell, refusal)
        if refusal is not None and is_simulated(cell, refusal):
            simulate.append(as_in_paper(cell))
            why[f"Not measured, as this is not gpu={cell.spec.hardware.name}: {refusal.machine}."] = None
        elif cell.can_run and refusal is not None:
            measure.append(PlannedCell(cell, refusal.reason))
            explanations[_explained(cell, refusal)] = None
        elif cell.can_run:
            measure.append(_to_measure(expected.rates.of(cell), expected))
        elif cell.named:
            reason = f"{cell.spec.system} can only be simulated: there is a model of it, but nothing to run"
            measure.append(PlannedCell(cell, reason))
            explanations[f"{reason}. Ask for a machine such as gpu=t4."] = None
    return Work(tuple(measure), tuple(simulate), " ".join(why), tuple(explanations))


def refuse_out_of_place(cell: Cell, refusal: Refusal | None) -> None:
    """Raises UserError for an option about measuring of a machine that is not here, and for the links of one that
    is."""
    hardware = cell.spec.hardware
    if refusal is not None and refusal.machine:
        if is_simulated(cell, refusal):
            refuse_unmeasured(cell.conf, cell.given, hardware.name)
    elif hardware.accelerator is not Accelerator.EMULATED:
        refuse_unthrottled(cell.conf, cell.given)


def is_simulated(cell: Cell, refusal: Refusal) -> bool:
    """Whether a cell that cannot be measured is simulated: this is another machine, and that one's constants are
    known."""
    return bool(refusal.machine) and cell.spec.hardware.rates is not None


def as_in_paper(cell: Cell) -> PredictionRequest:
    """A cell of a machine that is not here: as the paper has it, where the command line says nothing else.

    Exact, in 4 bits, and compressed as the paper did where that is something else; a system that chooses its policy
    chooses that, too.
    """
    if cell.lossy_is_given:
        return PredictionRequest(cell, cell.num_prompts)
    also: tuple[tuple[Lossy, ...], ...] = (FOUR_BITS,)
    if not cell.model.follows_policy:
        shape, workload, name = cell.spec.model.shape, cell.spec.workload, cell.model.printed_as
        lengths = (workload.prompt_len, workload.gen_len)
        papers = published_values(published_tables(), name, True, shape.name, *lengths)
        also += ((papers.lossy,),) if papers else ()
    return PredictionRequest(cell, cell.num_prompts, also)


def published_tables() -> Path:
    """The file of what the paper prints."""
    return conf_dir() / "paper" / "tables.csv"


def known_shapes() -> list[ModelShape]:
    """The shapes in conf/model, to choose a smaller model from."""
    return [model_spec(name).shape for name in list_models()]


def _to_measure(cell: Cell, expected: Expected) -> PlannedCell:
    known = cell.spec.hardware.rates is not None
    return PlannedCell(cell, forecast=CellForecast(cell, expected) if known else None)


def _explained(cell: Cell, refusal: Refusal) -> str:
    if not refusal.machine:
        return refusal.text
    name = cell.spec.hardware.name
    return f"{refusal.text}\nIt cannot be simulated either: conf/gpu has no rates for {name}."
