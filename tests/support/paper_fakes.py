"""Predictors whose answers tests can compute: a system's model without any physics."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import CannotRun, DoesNotFit, UserError
from flexgen_bench.core.job import Job
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.planner.predictor import Predictor


class FakePredictor(Predictor):
    """One second of prefill and one of decoding for each sequence of a block, times ``constants["slow"]``. With
    ``constants["overlaps"]`` the two overlap; with ``constants["kv_alone"]`` it chooses to compress the KV cache alone,
    where it may compress."""

    asked: ClassVar[list[tuple[dict[str, object], Job]]] = []

    def predict(self, job: Job) -> Prediction:
        FakePredictor.asked.append((self.options, job))
        options = self.options
        if job.num_gpus > 1:
            raise CannotRun("one GPU only")
        if job.shape.name == "opt-175b" and job.lossy.is_exact:
            raise DoesNotFit("cpu", 2, 1, "weights", "Take a smaller model.")
        if options.get("percent") == [4, 96, 0, 100, 0, 100]:
            raise UserError("system.options.percent", options["percent"], "something else")
        batch = options.get("batch_size") or 2
        if options.get("gpu_batch_size"):
            batch = options["gpu_batch_size"] * options["num_gpu_batches"]
        lossy = job.lossy
        free = "kv_alone" in self.constants and not lossy.is_exact
        chosen = replace(lossy, weights=None) if free else None
        seconds = self.constants["slow"] * batch
        return Prediction(
            seconds,
            seconds,
            job.num_prompts or batch,
            job.prompt_len,
            job.gen_len,
            batch,
            overlapped=bool(self.constants.get("overlaps")),
            settings={"policy": {"lossy": to_json(chosen)}} if chosen is not None else {},
        )
