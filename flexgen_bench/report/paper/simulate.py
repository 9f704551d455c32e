"""Predictions for the cells of the paper's tables, each question asked once."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexgen_bench.config import hardware_profile, model_spec
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.errors import CannotRun, DoesNotFit, UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.prediction import Prediction, Question
from flexgen_bench.core.status import Status
from flexgen_bench.planner.predictor import make_predictor
from flexgen_bench.report.paper.policy_text import PolicyText
from flexgen_bench.table_conf import ConfiguredSystem

OOM = "OOM"
NO_MODEL = "no model"
CANNOT_RUN = "cannot run"
_DTYPE = DType.FLOAT16  # the paper's


@dataclass(frozen=True)
class Job:
    """A question by the names of the configuration. num_prompts None: one block of the system's own choosing."""

    model: str
    machine: str
    prompt_len: int
    gen_len: int
    num_prompts: int | None = None
    lossy: Lossy = EXACT
    num_gpus: int = 1


@dataclass(frozen=True)
class Answer:
    """A prediction, or the word that stands for it (OOM, no model, cannot run) and the reason."""

    run: Prediction | None = None
    word: str = ""
    reason: str = ""


@dataclass
class Simulations:
    """Asks the systems' predictors, and remembers. models: the names in conf/model."""

    systems: Sequence[ConfiguredSystem]
    models: Container[str]
    _answers: dict[str, Answer] = field(default_factory=dict)
    _shapes: dict[str, ModelShape] = field(default_factory=dict)
    _machines: dict[str, HardwareProfile] = field(default_factory=dict)

    def named(self, name: str) -> ConfiguredSystem | None:
        return next((s for s in self.systems if s.name == name), None)

    def printed_as(self, name: str, other_than: str) -> ConfiguredSystem | None:
        """The system that the paper calls ``name``, not the one of our own that stands beside it."""
        return next(
            (s for s in self.systems if s.printed_as == name and s.name != other_than), None
        )

    def ask(self, system: ConfiguredSystem, options: Mapping[str, Any], job: Job) -> Answer:
        """What ``system`` with ``options`` (over those of its configuration) is predicted to do with ``job``."""
        options = {**system.options, **options}
        key = json.dumps([system.name, options, repr(job)], sort_keys=True, default=str)
        if key not in self._answers:
            self._answers[key] = self._answer(system, options, job)
        return self._answers[key]

    def _answer(self, system: ConfiguredSystem, options: Mapping[str, Any], job: Job) -> Answer:
        if system.predictor is None:
            return Answer(word=NO_MODEL, reason=f"{system.name}: no predictor is configured")
        if job.model not in self._shapes:
            self._shapes[job.model] = model_spec(job.model).shape
        if job.machine not in self._machines:
            self._machines[job.machine] = hardware_profile(job.machine)
        question = Question(
            self._shapes[job.model],
            _DTYPE,
            self._machines[job.machine],
            job.prompt_len,
            job.gen_len,
            job.num_prompts,
            job.lossy,
            job.num_gpus,
        )
        try:
            predictor = make_predictor(system.predictor, system.constants, options)
            return Answer(predictor.predict(question))
        except DoesNotFit as error:
            return Answer(word=OOM, reason=f"{system.name}: {error}")
        except CannotRun as error:
            word = OOM if error.status is Status.OOM else CANNOT_RUN
            return Answer(word=word, reason=f"{system.name}: {error}")
        except UserError as error:
            return Answer(word=CANNOT_RUN, reason=f"{system.name}: {error}")


def policy_options(policy: PolicyText, system: ConfiguredSystem) -> dict[str, Any]:
    """The policy in the terms of a system: of the settings that it knows by name, those that the policy states."""
    stated: dict[str, Any] = {
        "percent": None if policy.percent is None else list(policy.percent),
        "gpu_batch_size": policy.gpu_batch_size,
        "num_gpu_batches": policy.num_gpu_batches,
        "cpu_cache_compute": policy.cpu_attention,
        "pin_weight": policy.pin_weight,
        "overlap": policy.overlap,
        "offload": _offload(policy.weights_on, system.choices.get("offload", [])),
    }
    found = {k: v for k, v in stated.items() if k in system.options and v is not None}
    if "gpu_batch_size" not in system.options and policy.block_size is not None:
        found["batch_size"] = policy.block_size
    return found


def _offload(weights_on: str, choices: Sequence[str]) -> str | None:
    """A system's own word for weights below the GPU: a disk may be called by its interface."""
    words = {"disk": ("disk", "nvme"), "cpu": ("cpu",), "gpu": ("gpu", "none", "auto")}
    return next((w for w in words.get(weights_on, ()) if w in choices), None)
