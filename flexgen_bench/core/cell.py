"""One cell of a benchmark: system x model x workload x machine, as data that crosses a process border."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from flexgen_bench.core.codec import OMITTED, to_json
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.workload import Workload


class WeightSource(StrEnum):
    """Where a model's numbers come from."""

    DUMMY = "dummy"  # seeded random weights of sane scale; throughput only
    PACKAGE = "package"  # a trained model carried by a package of the package index
    TRAINED = "trained"  # trained on this machine by a script of the project
    HUB = "hub"  # downloaded from the Hugging Face hub
    PATH = "path"  # a checkpoint folder or .gguf file on this machine


@dataclass(frozen=True)
class ModelSpec:
    """A shape and where its weights come from. ``location``: hub id, package name, name of a trained model, or path."""

    shape: ModelShape
    weights: WeightSource = WeightSource.DUMMY
    location: str = ""
    seed: int = 0


@dataclass(frozen=True)
class MeasureSpec:
    """How a cell is measured. A repetition is one full generation of the workload.

    repetitions: measured repetitions; warmup: repetitions before them, kept apart.
    time_limit_s: the cell's process is ended after this long and recorded as a timeout.
    batch_sizes: candidates for the tuning search; empty means the system's own default batch.
    tuning_gen_len: tokens generated per tuning probe.
    """

    repetitions: int = 3
    warmup: int = 1
    time_limit_s: float = 600.0
    batch_sizes: tuple[int, ...] = ()
    tuning_gen_len: int = 2

    def __post_init__(self) -> None:
        for name, least in (("repetitions", 1), ("warmup", 0), ("tuning_gen_len", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"measure.{name}", value, f"an integer of at least {least}")
        if not self.time_limit_s > 0:
            raise UserError("measure.time_limit_s", self.time_limit_s, "more than zero seconds")
        object.__setattr__(self, "batch_sizes", tuple(self.batch_sizes))
        if any(not isinstance(b, int) or b < 1 for b in self.batch_sizes):
            raise UserError("measure.batch_sizes", self.batch_sizes, "integers of at least 1")


def check_latency(seconds: float | None, policy_is_given: bool) -> None:
    """Raises UserError for a bound that cannot be, or that nobody is left to keep to."""
    if seconds is None:
        return
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not (number and 0 < seconds < math.inf):
        raise UserError("policy.max_latency_s", seconds, "more than zero seconds, or null")
    if policy_is_given:
        raise UserError(
            "policy.max_latency_s",
            seconds,
            "left out where a policy is given",
            "It is for policy=auto, which chooses within it.",
        )


@dataclass(frozen=True)
class CellSpec:
    """Everything that decides what a cell measures. Equal specs have equal hashes.

    system: a name from ``conf/system``; ``target``: the ``module:Class`` that implements it;
    ``system_options``: that system's own settings. policy None means the system chooses ("auto"); ``lossy`` is
    what it may change of the results then (a given policy brings its own), ``max_latency_s`` how long a block may take
    then.
    """

    system: str
    target: str
    model: ModelSpec
    workload: Workload
    hardware: HardwareProfile
    dtype: DType
    threads: int
    measure: MeasureSpec = field(default_factory=MeasureSpec)
    policy: Policy | None = None
    system_options: Mapping[str, Any] = field(default_factory=dict)
    # What was not always there, where it says something: specs without it keep their hashes.
    lossy: Lossy = field(default=EXACT, metadata=OMITTED)
    max_latency_s: float | None = field(default=None, metadata=OMITTED)

    def __post_init__(self) -> None:
        check_latency(self.max_latency_s, self.policy is not None)
        if self.policy is not None:
            object.__setattr__(self, "lossy", self.policy.lossy)
        if not isinstance(self.threads, int) or self.threads < 1:
            raise UserError("threads", self.threads, "an integer of at least 1")

    @property
    def evidence(self) -> Evidence:
        """What numbers of a run of this cell are."""
        emulated = self.hardware.accelerator is Accelerator.EMULATED
        return Evidence.EMULATED if emulated else Evidence.MEASURED

    @property
    def spec_hash(self) -> str:
        """The first 16 hex digits of the SHA-256 of the canonical JSON of this spec."""
        # What is known about a machine's speed, and who says so, decides no result; nor what lies outside of a cap, nor
        # in which words its bytes were asked for.
        machine = replace(self.hardware, sources={}, rates=None, gpu_memory_is_cap=False, weight_shares={})
        data = to_json(replace(self, hardware=machine))
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
