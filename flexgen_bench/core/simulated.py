"""A cell that was predicted instead of run: who was asked, what, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.status import Status

# The target of a system that there is a model of, but nothing to run.
SIMULATED_ONLY = ""


@dataclass(frozen=True)
class SystemModel:
    """How a system is predicted; ``config.schema.SystemConf`` explains the fields. predictor None: nobody has written
    one."""

    predictor: str | None = None
    constants: Mapping[str, float] = field(default_factory=dict)
    printed_as: str = ""
    follows_policy: bool = False


@dataclass(frozen=True)
class Simulated:
    """One row of what was predicted.

    status: OK with a prediction; OOM, it would not fit; UNAVAILABLE, the system cannot do the job or nobody has a model
    of it; INVALID, it was asked for something that cannot be; FAILED, its model has a mistake. All but OK have a
    reason. job: what was asked, with the machine's gaps filled in.
    """

    spec: CellSpec
    job: Job
    model: SystemModel
    status: Status
    reason: str = ""
    prediction: Prediction | None = None
    # Of a job that does not fit: the tier, what it would need and what there is, in bytes.
    tier: str = ""
    need_bytes: int | None = None
    capacity_bytes: int | None = None

    @property
    def system(self) -> str:
        return self.spec.system

    @property
    def lossy(self) -> Lossy:
        """What the results would differ by: as chosen, where a system was free to compress less than it was allowed
        to."""
        permitted = self.job.lossy
        return permitted if self.prediction is None else self.prediction.changes(permitted)

    @property
    def hardware(self) -> HardwareProfile:
        return self.job.hardware

    @property
    def is_beyond_its_machine(self) -> bool:
        """Whether somebody has asked for a policy that has no room; for a system's own choice, not fitting is a
        finding."""
        asked_for = self.model.follows_policy and self.spec.policy is not None
        return asked_for and self.status is Status.OOM

    @property
    def label(self) -> str:
        """The system, and what makes its results differ."""
        return self.system if self.lossy.is_exact else f"{self.system} ({self.lossy})"
