"""The page of ladders that were predicted, of machines that are not here."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_bench.core.simulated import Simulated
from flexgen_bench.report.ladder.markdown import ladder_lines
from flexgen_bench.report.ladder.rungs import predicted_ladders


def predicted_page(rows: Sequence[Simulated]) -> str:
    """Its text: nothing in it depends on when or where it is built."""
    lines = [
        "# Predicted ladders",
        "",
        "SIMULATED: from stated constants of each machine and a model of each system; nothing was run. Built by "
        "`python -m flexgen_bench report`; the same rows on a terminal: `python -m flexgen_bench suite=ladder_gpu`. "
        "Each system runs the batch that its model finds best.",
        "",
        *ladder_lines(predicted_ladders(rows), "## By machine"),
    ]
    return "\n".join(lines).rstrip() + "\n"
