"""The lm-eval models of a run: a system of the suite under a mode, and the round-to-nearest baseline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexgen_bench.accuracy.run.modes import Mode
from flexgen_bench.accuracy.run.options import Request
from flexgen_bench.checkpoints.gguf.rounding import ROUNDING_VERSION, Rounded, rounded_checkpoint
from flexgen_bench.checkpoints.prepared import locked
from flexgen_bench.core.accuracy import Role, Subject
from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.model import DType
from flexgen_bench.core.progress import quiet
from flexgen_bench.store.writer import safe_name

_RTN_BATCH = 8


@dataclass(frozen=True)
class Setup:
    """A system under a mode, not loaded yet."""

    system: str
    mode: Mode
    role: Role = Role.EVALUATED

    @property
    def lossy(self) -> Lossy:
        return self.mode.lossy


def dtype_of(setup: Setup, request: Request) -> str:
    """The mode's own, or that of the run."""
    return setup.mode.dtype or request.dtype


def rounded_weights(setup: Setup, subject: Subject, cache: Path, folder: Path) -> Rounded | None:
    """The checkpoint in ``folder`` with its weights rounded to the mode's format, made if need be; None: it has
    none."""
    form = setup.mode.weight_format
    if form is None:
        return None
    name = f"{safe_name(subject.model)}-{subject.fingerprint}-{form}-{subject.dtype}-{ROUNDING_VERSION}"
    target = cache / "accuracy" / "formats" / name
    with locked(target):
        return rounded_checkpoint(folder, form, DType(subject.dtype), target, quiet)


@contextlib.contextmanager
def opened(setup: Setup, request: Request, folder: Path) -> Iterator[Any]:
    """The lm-eval model, closed at the end. folder: the checkpoint; rounded, if the mode has its weights rounded."""
    made = _rtn_baseline(setup, request, folder) if setup.role is Role.YARDSTICK else _of_system(setup, request, folder)
    try:
        yield made
    finally:
        close = getattr(made, "close", None)
        if close is not None:
            close()


def _of_system(setup: Setup, request: Request, folder: Path) -> Any:
    from flexgen_bench.accuracy.run.lm import make_lm

    policy = request.policy and replace(request.policy, lossy=setup.lossy)
    return make_lm(
        setup.system,
        request.source if setup.mode.weight_format is None else folder,
        lossy=setup.lossy,
        dtype=dtype_of(setup, request),
        gpu=request.hardware,
        policy=policy,
        threads=request.threads,
        cache_dir=request.cache,
        batch_size=request.batch_size,
        max_length=request.max_length,
    )


def _rtn_baseline(setup: Setup, request: Request, folder: Path) -> Any:
    """transformers with weights rounded to the mode's grid by plain torch, under lm-eval's own adapter."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flexgen_bench.accuracy.run.rtn_baseline import apply_rtn

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype_of(setup, request)))
    assert setup.lossy.weights is not None, "the yardstick rounds weights"
    apply_rtn(model, setup.lossy.weights)
    return HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
        batch_size=request.batch_size or _RTN_BATCH,
        max_length=request.max_length,
    )
