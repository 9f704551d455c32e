"""A cell that a command line asks for, and who settles what it leaves open."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flexgen_bench.cells.budget import Fitted
from flexgen_bench.config.build import dtype_by_rule
from flexgen_bench.config.schema import AppConf
from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.simulated import SIMULATED_ONLY, SystemModel

COMMAND = "python -m flexgen_bench"


@dataclass(frozen=True)
class Cell:
    """A cell with its name in the suite ("" outside one) and the overrides that choose it again.

    model: what predicts its system. keys: what the command line or the suite says, where the rest is default. named:
    its system was asked for, not just all of them. conf: what it was made of. given: of a cell outside a suite, the
    keys of the command line. subject: its system is what the benchmark is about, not one beside it. note: what of its
    workload was left out, and why.
    """

    name: str
    spec: CellSpec
    overrides: tuple[str, ...]
    model: SystemModel = field(default_factory=SystemModel)
    keys: frozenset[str] = frozenset()
    named: bool = True
    subject: bool = False
    note: str = ""
    conf: AppConf = field(default_factory=AppConf, repr=False, compare=False)
    given: frozenset[str] = frozenset()

    @property
    def num_prompts(self) -> int | None:
        """Prompts of a simulated run; None, as in the paper, for as many as a block of the system holds."""
        return self.spec.workload.num_prompts if "workload.num_prompts" in self.keys else None

    @property
    def lossy_is_given(self) -> bool:
        """Whether somebody has said what may change of the results."""
        given = any(key.startswith("policy.lossy") for key in self.keys)
        return given or not self.spec.lossy.is_exact

    @property
    def can_run(self) -> bool:
        """Whether there is anything to run, on any machine."""
        return self.spec.target != SIMULATED_ONLY

    @property
    def command(self) -> str:
        """What to type to measure this cell again."""
        return f"{COMMAND} {shlex.join([*self.overrides, 'rerun=true'])}"


class Local(Protocol):
    """What cells leave to the machine that they run on, settled before there is a ``CellSpec``: a record says what
    ran."""

    def fastest(self, hardware: HardwareProfile, threads: int) -> DType:
        """The dtype of ``dtype=fastest``."""

    def fitted(self, cells: Mapping[str, Cell], budget_s: float, stated: Collection[str]) -> Fitted:
        """What is to be left out of the workload of cells that differ in the system alone (their keys), so that none
        takes longer than
        ``budget_s`` seconds. stated: fields of the workload that must stay."""


class Unmeasured:
    """Nothing is known of this machine but its processor's instructions."""

    def fastest(self, hardware: HardwareProfile, threads: int) -> DType:
        return dtype_by_rule(hardware, threads)

    def fitted(self, cells: Mapping[str, Cell], budget_s: float, stated: Collection[str]) -> Fitted:
        return Fitted({}, "")
