"""Predictors for tests of the command line: figures that can be checked by hand, and every way of refusing."""

from __future__ import annotations

import os
from dataclasses import replace

from flexgen_bench.core.errors import CannotRun, DoesNotFit, UserError
from flexgen_bench.core.job import Job
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.units import GB
from flexgen_bench.planner.predictor import Predictor


class Plain(Predictor):
    """Two seconds for each sequence of its batch, in the ratio 1:3; what it was told is in its settings."""

    def predict(self, job: Job) -> Prediction:
        self._check(job)
        batch = int(self.constants.get("batch", 4))
        prompts = job.num_prompts or batch
        return Prediction(
            prefill_s=0.5 * prompts,
            decode_s=1.5 * prompts,
            num_prompts=prompts,
            prompt_len=job.prompt_len,
            gen_len=job.gen_len,
            batch_size=min(batch, prompts),
            bytes={"gpu": 4 * GB, "cpu": 52 * GB, "disk": 0},
            lane_busy_s={"gpu": 1.0},
            bottleneck="the link to the gpu",
            settings=self._settings(job),
            disk_written_bytes=3 * GB,
            notes=("a remark",),
        )

    def _settings(self, job: Job) -> dict[str, object]:
        return {"options": dict(self.options), "asked": job.dtype.value}

    def _check(self, job: Job) -> None:
        """What this one refuses."""
        if not job.lossy.is_exact:
            raise CannotRun("it computes with what the checkpoint holds")
        if job.hardware.rates is None:
            raise UserError("gpu.rates", None, "given for a machine to be simulated")


class Compressing(Plain):
    """Follows a policy, and compresses: then it is twice as fast. Tells all that a card may show."""

    def predict(self, job: Job) -> Prediction:
        done = super().predict(job)
        if job.lossy.is_exact:
            return done
        return Prediction(**(done.__dict__ | {"prefill_s": done.prefill_s / 2, "decode_s": done.decode_s / 2}))

    def _settings(self, job: Job) -> dict[str, object]:
        policy = self.options.get("policy") or {
            "gpu_batch_size": 2,
            "num_gpu_batches": 2,
            "weights": {"gpu": 0.2, "cpu": 0.8, "disk": 0.0},
            "kv_cache": {"gpu": 0.0, "cpu": 1.0, "disk": 0.0},
            "attention": "cpu",
        }
        return {
            "policy": policy,
            "why": ["the link is busier than anything else", "so blocks are large"],
            "binding": "cpu memory",
            "gains": {"1 GB of gpu memory": 0.25, "10 % faster h2d": 1.5},
        }

    def _check(self, job: Job) -> None:
        if job.hardware.rates is None:
            raise UserError("gpu.rates", None, "given for a machine to be simulated")


class Overlapping(Plain):
    """Four blocks whose prompts are computed while others decode."""

    def predict(self, job: Job) -> Prediction:
        done = super().predict(replace(job, num_prompts=16))
        return replace(done, overlapped=True)


class WeightsOnly(Compressing):
    """Compresses weights, and no KV cache."""

    def _check(self, job: Job) -> None:
        if job.lossy.kv_cache is not None:
            raise CannotRun("its KV cache is not compressed")


class TooLarge(Plain):
    """Has no room for anything."""

    def predict(self, job: Job) -> Prediction:
        super()._check(job)
        raise DoesNotFit("cpu", 300 * GB, 208 * GB, "weights 300 GB", "Take a smaller model.")


class Strict(Plain):
    """Refuses what it is told."""

    def predict(self, job: Job) -> Prediction:
        raise UserError("system.options.speed", "warp", "one of slow, slower")


class Impossible(Plain):
    """Cannot do any job."""

    def predict(self, job: Job) -> Prediction:
        raise CannotRun("it knows no such model")


class Mistaken(Plain):
    """Has a mistake in it."""

    def predict(self, job: Job) -> Prediction:
        raise ZeroDivisionError("division by zero")


class DiesElsewhere(Compressing):
    """Answers in the process that ``FAKE_PREDICTOR_HOME`` names; any other one is gone, without a word."""

    def predict(self, job: Job) -> Prediction:
        if os.getpid() != int(os.environ["FAKE_PREDICTOR_HOME"]):
            os._exit(9)
        return super().predict(job)
