"""Predictions for the cells of the paper's tables, each question asked once."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from flexgen_bench.config.build import hardware_profile, model_spec
from flexgen_bench.config.table import ConfiguredSystem
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.processes import process_pool
from flexgen_bench.core.status import Status
from flexgen_bench.paper.settings import run_text
from flexgen_bench.planner.ask import Ask
from flexgen_bench.published.policy_text import PolicyText
from flexgen_bench.store.kept_predictions import Answer

OOM = "OOM"
NO_MODEL = "no model"
CANNOT_RUN = "cannot run"
PENDING = "pending"
_DTYPE = DType.FLOAT16  # the paper's
# Fewer questions are answered before other processes have started.
_WORTH_A_PROCESS = 4
_KEEP_EVERY_S = 20


@dataclass(frozen=True)
class PaperJob:
    """A question by the names of the configuration. num_prompts None: one block of the system's own choosing."""

    model: str
    machine: str
    prompt_len: int
    gen_len: int
    num_prompts: int | None = None
    lossy: Lossy = EXACT
    num_gpus: int = 1

    @property
    def resolved(self) -> Job:
        """The job that the names stand for."""
        return Job(
            _shape(self.model),
            _DTYPE,
            _machine(self.machine),
            self.prompt_len,
            self.gen_len,
            self.num_prompts,
            self.lossy,
            self.num_gpus,
        )


@dataclass(frozen=True)
class Simulation:
    """An answer as tables show it: a prediction, or the word that stands for it (OOM, cannot run) and the reason.
    lossy: what the system then changes of the results, in words."""

    run: Prediction | None = None
    word: str = ""
    reason: str = ""
    settings: str = ""
    lossy: str = ""


@dataclass
class Simulations:
    """What the systems' predictors say. models: the names in conf/model. known: answers by key, kept from earlier runs.

    A question that is not answered yet is noted and stands as pending; ``answer_all`` answers all that were noted,
    several at a time.
    """

    systems: Sequence[ConfiguredSystem]
    models: Container[str]
    known: dict[str, Answer] = field(default_factory=dict)
    used: dict[str, Answer] = field(default_factory=dict)
    pairs: set[tuple[str, str]] = field(default_factory=set)  # (machine, model) asked about
    _open: dict[str, Ask] = field(default_factory=dict)

    def named(self, name: str) -> ConfiguredSystem | None:
        return next((s for s in self.systems if s.name == name), None)

    def by_published_name(self, name: str, other_than: str) -> ConfiguredSystem | None:
        """The system that the paper calls ``name``, not the one of our own that stands beside it."""
        return next((s for s in self.systems if s.printed_as == name and s.name != other_than), None)

    def ask(self, system: ConfiguredSystem, options: Mapping[str, Any], job: PaperJob) -> Simulation:
        """What ``system`` with ``options`` (over those of its configuration) is predicted to do with ``job``."""
        if system.predictor is None:
            return Simulation(word=NO_MODEL, reason=f"{system.name}: no predictor is configured")
        all_options = {**system.options, **options}
        ask = Ask(system.name, system.predictor, system.constants, all_options, job.resolved)
        key = ask.key
        if job.num_gpus == 1:
            self.pairs.add((job.machine, job.model))
        if key not in self.known:
            self._open[key] = ask
            return Simulation(word=PENDING)
        self.used[key] = self.known[key]
        return _simulation(self.known[key], system, job)

    def note(self, ask: Ask) -> None:
        """A question of nobody's table, to be answered and kept with the others."""
        if ask.key in self.known:
            self.used[ask.key] = self.known[ask.key]
        else:
            self._open[ask.key] = ask

    @property
    def open(self) -> int:
        """Questions that have no answer yet."""
        return len(self._open)

    def answer_all(self, workers: int, keep: Callable[[], object]) -> None:
        """Answer what is open, in as many processes. keep: called now and then while answers become known."""
        asks, self._open = self._open, {}
        if workers == 1 or len(asks) < _WORTH_A_PROCESS:
            for key, ask in asks.items():
                self.known[key] = ask.answer()
            return
        with process_pool(workers) as pool:
            futures = {pool.submit(ask.answer): key for key, ask in asks.items()}
            kept = time.monotonic()
            for future in as_completed(futures):
                self.known[futures[future]] = future.result()
                if time.monotonic() > kept + _KEEP_EVERY_S:
                    keep()
                    kept = time.monotonic()


@cache
def _shape(name: str) -> ModelShape:
    return model_spec(name).shape


@cache
def _machine(name: str) -> HardwareProfile:
    return hardware_profile(name)


def _simulation(answer: Answer, system: ConfiguredSystem, job: PaperJob) -> Simulation:
    if answer.run is None:
        word = OOM if answer.status is Status.OOM else CANNOT_RUN
        return Simulation(word=word, reason=f"{system.name}: {answer.reason}")
    lossy = str(answer.run.changes(job.lossy))
    return Simulation(answer.run, settings=run_text(answer.run), lossy=lossy)


def policy_options(policy: PolicyText, system: ConfiguredSystem) -> dict[str, Any]:
    """The policy in the terms of a system: of the settings that it knows by name, those that the policy states."""
    policy = policy.completed
    stated: dict[str, Any] = {
        "percent": None if policy.percent is None else list(policy.percent),
        "gpu_batch_size": policy.gpu_batch_size,
        "num_gpu_batches": policy.num_gpu_batches,
        "cpu_cache_compute": policy.cpu_attention,
        "pin_weight": policy.pin_weight,
        "overlap": policy.overlap,
        "offload": _offload(policy.weights_on, system.choices.get("offload", [])),
    }
    known = {k: v for k, v in stated.items() if k in system.options and v is not None}
    if "gpu_batch_size" not in system.options and policy.block_size is not None:
        known["batch_size"] = policy.block_size
    return known


def _offload(weights_on: str, choices: Sequence[str]) -> str | None:
    """A system's own word for weights below the GPU: a disk may be called by its interface."""
    words = {"disk": ("disk", "nvme"), "cpu": ("cpu",), "gpu": ("gpu", "none", "auto")}
    return next((w for w in words.get(weights_on, ()) if w in choices), None)
