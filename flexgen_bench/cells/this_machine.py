"""What cells leave open and the machine in front of us settles: their dtype, and how much of a workload a budget
allows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from flexgen_bench.cells.budget import Fitted, fitted
from flexgen_bench.cells.expected_time import Expected
from flexgen_bench.config.cell import Cell
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.instructions import usable
from flexgen_bench.core.model import DType
from flexgen_bench.core.workload import Workload
from flexgen_bench.planner.fastest_dtype import fastest_dtype
from flexgen_bench.runner.feasibility import explain, machine_reasons


@dataclass(frozen=True)
class ThisMachine:
    """Settles for ``compose.plan``. may_measure: whether this machine may be calibrated for it. notify: gets a line
    about each decision."""

    expected: Expected
    may_measure: bool
    notify: Callable[[str], None]

    def fastest(self, hardware: HardwareProfile, threads: int) -> DType:
        """By this machine's rates, measured now if they have to be; another machine's are in its profile."""
        if not machine_reasons(hardware):
            hardware = self.expected.rates.filled(hardware, threads, self.may_measure)
        return fastest_dtype(hardware, usable())

    def fitted(self, cells: Mapping[str, Cell], budget_s: float, stated: Collection[str]) -> Fitted:
        """Cells that cannot be run here take no time."""
        here = [n for n, c in cells.items() if c.can_run and not explain(c.spec, self.expected.cache)]
        if not here:
            return Fitted({}, "")

        def seconds(workload: Workload, systems: Collection[str]) -> Mapping[str, float]:
            return self.expected.of_workload(cells, workload, systems)

        first = cells[here[0]]
        name = first.name or first.spec.model.shape.name
        if self.expected.rates.of(first).spec.hardware.rates is None:
            self.notify(
                f"{name}: run at its full size, as this machine's rates are not known (calibrate=true measures them)"
            )
            return Fitted({}, "")
        fit = fitted(first.spec.workload, budget_s, here, seconds, stated)
        if fit.note:
            self.notify(f"{name}: {fit.note}")
        return fit
