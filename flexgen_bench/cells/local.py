"""Who settles what a command line leaves open."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from flexgen_bench.cells.budget import Fitted
from flexgen_bench.config.build import dtype_by_rule
from flexgen_bench.config.cell import Cell
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType


class Local(Protocol):
    """What cells leave to the machine that they run on, settled before there is a ``CellSpec``: a record says what
    ran."""

    def fastest(self, hardware: HardwareProfile, threads: int) -> DType:
        """The dtype of ``dtype=fastest``."""

    def fitted(self, cells: Mapping[str, Cell], budget_s: float, stated: Collection[str]) -> Fitted:
        """What is to be left out of the workload of cells that differ in the system alone (their keys), so that none
        takes longer than ``budget_s`` seconds. stated: fields of the workload that must stay."""


class Unmeasured:
    """Nothing is known of this machine but its processor's instructions."""

    def fastest(self, hardware: HardwareProfile, threads: int) -> DType:
        return dtype_by_rule(hardware, threads)

    def fitted(self, cells: Mapping[str, Cell], budget_s: float, stated: Collection[str]) -> Fitted:
        return Fitted({}, "")
