"""What this machine sustains, for cells that run on it: as measured before, or measured now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flexgen_bench.calibrate.store import calibrated_rates, ensure_calibrated, with_calibration
from flexgen_bench.compose import Cell
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.folders import make_writable


@dataclass(frozen=True)
class LocalRates:
    """The rates of this machine, kept in ``cache``.

    is_worth_it: whether a cell is reason enough to measure them now (20 s, once). required: a machine that cannot be measured is an error; else
    the cell goes without rates, and so without a prediction.
    """

    cache: Path
    is_worth_it: Callable[[Cell], bool]
    tell: Callable[[str], None]
    required: bool = False

    def of(self, cell: Cell) -> Cell:
        """A cell that can be run here, with what is known of this machine where its profile states nothing. Raises StoreError (if required),
        and UserError for a cache that cannot be written."""
        spec = cell.spec
        if spec.hardware.rates is not None:
            return cell
        rates = calibrated_rates(self.cache, spec.threads)
        if rates is None and cell.model.predictor is not None and self.is_worth_it(cell):
            make_writable(self.cache, "cache_dir")
            try:
                rates = ensure_calibrated(self.cache, spec.threads, self.tell)
            except StoreError as error:
                if self.required:
                    raise
                self.tell(f"no predictions: {error}")
        if rates is None:
            return cell
        hardware = with_calibration(spec.hardware, rates)
        return replace(cell, spec=replace(spec, hardware=hardware))
