"""What this machine sustains, for cells that run on it: as measured before, or measured now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flexgen_bench.config.cell import Cell
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.folders import make_writable
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.machine.measured_rates import calibrated_rates, ensure_calibrated, with_calibration


@dataclass(frozen=True)
class LocalRates:
    """The rates of this machine, kept in ``cache``.

    is_worth_it: whether a cell is reason enough to measure them now (20 s, once). required: a machine that cannot be
    measured is an error; else the cell goes without rates, and so without a prediction.
    """

    cache: Path
    is_worth_it: Callable[[Cell], bool]
    notify: Callable[[str], None]
    required: bool = False

    def of(self, cell: Cell) -> Cell:
        """A cell that can be run here, with what is known of this machine where its profile states nothing. Raises
        StoreError (if required), and UserError for a cache that cannot be written."""
        spec = cell.spec
        if spec.hardware.rates is not None:
            return cell
        worth_it = cell.model.predictor is not None and self.is_worth_it(cell)
        hardware = self.filled(spec.hardware, spec.threads, worth_it)
        return cell if hardware.rates is None else replace(cell, spec=replace(spec, hardware=hardware))

    def filled(self, hardware: HardwareProfile, threads: int, worth_it: bool) -> HardwareProfile:
        """The same of a profile of this machine. worth_it: whether to measure now what is not known."""
        if hardware.rates is not None:
            return hardware
        rates = calibrated_rates(self.cache, threads)
        if rates is None and worth_it:
            make_writable(self.cache, "cache_dir")
            try:
                rates = ensure_calibrated(self.cache, threads, self.notify)
            except StoreError as error:
                if self.required:
                    raise
                self.notify(f"no predictions: {error}")
        return hardware if rates is None else with_calibration(hardware, rates)
