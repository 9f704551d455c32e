"""What is asked of the systems' models for commands whose answers are shipped with the project, beside the paper's
tables: ``python -m flexgen_bench model=X gpu=Y`` for some pairs, and the ladder on machines that are not here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from hydra import initialize_config_dir

from flexgen_bench.cells.compose import command_cells, composed, plan
from flexgen_bench.cells.work import as_in_paper
from flexgen_bench.config.cell import Cell
from flexgen_bench.config.paths import conf_dir, default_cache_dir
from flexgen_bench.core.simulated import Simulated
from flexgen_bench.planner.ask import Ask
from flexgen_bench.runner.predictions import questions, simulate

# (machine, model) of the commands in the README; those of the paper's tables are found by who writes the tables.
IN_README = (("t4", "opt-30b"),)
LADDER = "ladder_gpu"


def shipped_asks(pairs: Iterable[tuple[str, str]]) -> list[Ask]:
    """The questions behind every row of these pairs' tables, of the README's, and of the ladders."""
    title = [
        cell
        for machine, model in sorted({*pairs, *IN_README})
        for cell in command_cells([f"model={model}", f"gpu={machine}"])
    ]
    return _asks([*title, *ladder_cells()])


@cache
def ladder_cells() -> tuple[Cell, ...]:
    """The cells of ``suite=ladder_gpu`` that somebody can predict."""
    overrides = [f"suite={LADDER}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cells = plan(composed(overrides), overrides, LADDER).cells
    return tuple(cell for cell in cells if cell.model.predictor is not None)


def ladder_rows(cache_dir: Path) -> list[Simulated]:
    """What is predicted of them: as kept, or asked now and kept in ``cache_dir``."""
    requests = [as_in_paper(cell) for cell in ladder_cells()]
    return [row for rows in simulate(requests, cache_dir, lambda _: None) for row in rows]


def _asks(cells: Sequence[Cell]) -> list[Ask]:
    """A machine that leaves its sizes to the one in front of us has other questions on every machine, so it is left
    out."""
    asks = []
    for cell in cells:
        hardware = cell.spec.hardware
        whole = hardware.cpu_memory_bytes is not None and hardware.disk_bytes is not None
        if hardware.rates is not None and whole:
            asks += questions(as_in_paper(cell), default_cache_dir())
    return asks
