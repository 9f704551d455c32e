"""What ``python -m flexgen_bench model=X gpu=Y`` asks of each system, for the pairs whose answers are shipped with the
project."""

from __future__ import annotations

from collections.abc import Iterable

from flexgen_bench.cells.compose import command_cells
from flexgen_bench.cells.work import as_in_paper
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.planner.ask import Ask
from flexgen_bench.runner.predictions import questions

# (machine, model) of the commands in the README; those of the paper's tables are found by who writes the tables.
IN_README = (("t4", "opt-30b"),)


def title_asks(pairs: Iterable[tuple[str, str]]) -> list[Ask]:
    """The questions behind every row of these pairs' tables, and of the README's. A machine that leaves its sizes to
    the one in front of us has other questions on every machine, so it is left out."""
    asks = []
    for machine, model in sorted({*pairs, *IN_README}):
        for cell in command_cells([f"model={model}", f"gpu={machine}"]):
            hardware = cell.spec.hardware
            whole = hardware.cpu_memory_bytes is not None and hardware.disk_bytes is not None
            if cell.model.predictor is not None and hardware.rates is not None and whole:
                asks += questions(as_in_paper(cell), default_cache_dir())
    return asks
