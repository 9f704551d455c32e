"""What a system's predictor is asked: every answer, refusals included, as something that can be kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexgen_bench.core.errors import CannotRun, DoesNotFit, UserError
from flexgen_bench.core.job import Job
from flexgen_bench.core.status import Status
from flexgen_bench.planner.predictor import make_predictor
from flexgen_bench.store.kept_predictions import Answer, as_read_back, key_of


@dataclass(frozen=True)
class Ask:
    """One job asked of one system.

    name: of the system, for the answer's words. predictor: written ``module:Class``. constants, options: all that it is
    told.
    """

    name: str
    predictor: str
    constants: Mapping[str, float]
    options: Mapping[str, Any]
    job: Job

    @property
    def key(self) -> str:
        """By which the answer is kept."""
        return key_of(self.predictor, self.constants, self.options, self.job)

    def answer(self) -> Answer:
        """What the predictor says. Raises whatever a mistake in it raises."""
        question = f"{self.name}: {in_words(self.job)}"
        try:
            predictor = make_predictor(self.predictor, self.constants, self.options)
            run = predictor.predict(self.job)
        except DoesNotFit as error:
            need, there = error.need_bytes, error.capacity_bytes
            return Answer(None, Status.OOM, str(error), str(error.tier), need, there, question)
        except CannotRun as error:
            return Answer(None, error.status, str(error), asked=question)
        except UserError as error:
            return Answer(None, Status.INVALID, str(error), asked=question)
        return as_read_back(Answer(run, asked=question))


def in_words(job: Job) -> str:
    """``opt-30b on t4, a block of 512, 32 generated, exact``."""
    prompts = "a block" if job.num_prompts is None else f"{job.num_prompts} prompts"
    gpus = f", {job.num_gpus} GPUs" if job.num_gpus > 1 else ""
    shared = job.hardware.tensor_parallel
    gpus += f", {shared} devices that share every layer" if shared > 1 else ""
    latest = job.max_latency_s
    soon = "" if latest is None else f", within {latest:g} s"
    return (
        f"{job.shape.name} on {job.hardware.name}{gpus}, {prompts} of {job.prompt_len}, "
        f"{job.gen_len} generated, {job.lossy}{soon}"
    )
