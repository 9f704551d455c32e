"""One cell of a command line: what is composed is then predicted, planned and measured, and stays this type. What is
added on the way holds the cell: ``PredictionRequest``, ``PlannedCell`` (runner), ``PlanSummary`` (report)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from flexgen_bench.config.schema import AppConf
from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.simulated import SIMULATED_ONLY, SystemModel

COMMAND = "python -m flexgen_bench"


@dataclass(frozen=True)
class Cell:
    """A cell with its name in the suite ("" outside one) and the overrides that choose it again.

    model: what predicts its system. keys: what the command line or the suite says, where the rest is default. named:
    its system was asked for, not just all of them. conf: what it was made of. given: of a cell outside a suite, the
    keys of the command line. subject: its system is what the benchmark is about, not one next to it. note: what of its
    workload was left out, and why.
    """

    name: str
    spec: CellSpec
    overrides: tuple[str, ...] = ()
    model: SystemModel = field(default_factory=SystemModel)
    keys: frozenset[str] = frozenset()
    named: bool = True
    subject: bool = False
    note: str = ""
    conf: AppConf = field(default_factory=AppConf, repr=False, compare=False)
    given: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        """The cell in a line of a display."""
        spec = self.spec
        lossy = "" if spec.lossy.is_exact else f"({spec.lossy})"
        parts = [self.name, spec.system, lossy, spec.model.shape.name, spec.workload.name]
        return " ".join(filter(None, parts))

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
    def chooses_policy(self) -> bool:
        """Whether its system follows policies and was given none."""
        return self.model.follows_policy and self.spec.policy is None

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables of its process that are its system's own."""
        return {} if self.conf.system is None else self.conf.system.environment

    @property
    def can_run(self) -> bool:
        """Whether there is anything to run, on any machine."""
        return self.spec.target != SIMULATED_ONLY

    @property
    def command(self) -> str:
        """What to type to measure this cell again."""
        return f"{COMMAND} {shlex.join([*self.overrides, 'rerun=true'])}"
