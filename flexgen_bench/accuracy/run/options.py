"""What ``python -m flexgen_bench accuracy`` is asked: the schema of its configuration, and the checked request it
becomes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexgen_bench.accuracy.compare.compare import Margins
from flexgen_bench.accuracy.run.modes import Mode, load_mode, load_modes
from flexgen_bench.config.build import list_systems, run_parts
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.config.schema import MISSING, GpuConf, ModelConf, PolicyConf, SystemConf, TrackerConf
from flexgen_bench.core.accuracy import EXACT_MODE
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.folders import expanded
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Policy

EXACT_REFERENCE, YARDSTICK = "exact", "yardstick"
# Items of each task where neither the command line nor a set says.
USUAL_LIMIT = 500


@dataclass
class MarginConf:
    """See ``compare.Margins``."""

    score: float = 0.02
    bits: float = 0.02


@dataclass
class AccuracyConf:
    """conf/accuracy_run.yaml, which says what each key is."""

    model: ModelConf = field(default_factory=ModelConf)
    gpu: GpuConf = field(default_factory=GpuConf)
    policy: PolicyConf = field(default_factory=PolicyConf)
    system: SystemConf = field(default_factory=SystemConf)
    checkpoint: str | None = None
    weights: str | None = None
    location: str | None = None
    dtype: str = MISSING
    threads: int | None = None
    tasks: Any = MISSING
    mode: Any = MISSING
    reference: str = MISSING
    limit: Any = "auto"
    margin: MarginConf = field(default_factory=MarginConf)
    text_tokens: int = 0
    loss_tokens: int = 0
    loss_text: str | None = None
    batch_size: int | None = None
    max_length: int | None = None
    rerun: bool = False
    dry_run: bool = False
    results_dir: str = MISSING
    cache_dir: str | None = None
    tracker: TrackerConf = field(default_factory=TrackerConf)


@dataclass(frozen=True)
class Request:
    """A checked command. source: what ``make_lm`` takes for a model. exact: the uncompressed mode; modes: the others.
    limit: items of each task; None: all; "auto": what a set says, else ``USUAL_LIMIT``."""

    model: str
    source: str
    system: str
    hardware: HardwareProfile
    policy: Policy | None
    dtype: str
    threads: int | None
    tasks: tuple[str, ...]
    exact: Mode
    modes: tuple[Mode, ...]
    reference: str
    limit: int | str | None
    margins: Margins
    text_tokens: int
    loss_tokens: int
    loss_text: Path | None
    batch_size: int | None
    max_length: int | None
    rerun: bool
    dry_run: bool
    results_dir: Path
    cache: Path
    overrides: tuple[str, ...]
    tracker: TrackerConf = field(default_factory=TrackerConf)


def to_request(conf: AccuracyConf, overrides: tuple[str, ...]) -> Request:
    """Raises UserError naming the key for anything that cannot be."""
    if conf.reference not in (EXACT_REFERENCE, YARDSTICK, *list_systems()):
        raise unknown_choice("reference", conf.reference, (EXACT_REFERENCE, YARDSTICK, *list_systems()))
    if conf.dtype not in [str(d) for d in DType]:
        raise unknown_choice("dtype", conf.dtype, [str(d) for d in DType])
    for name, value, least in (
        ("text_tokens", conf.text_tokens, 0),
        ("loss_tokens", conf.loss_tokens, 0),
        ("batch_size", conf.batch_size, 1),
        ("max_length", conf.max_length, 2),
    ):
        if value is not None and value < least:
            raise UserError(name, value, f"an integer of at least {least}")
    model, hardware, policy = run_parts(conf.model, conf.gpu, conf.policy, conf.weights, conf.location)
    if not policy_is_neutral(conf):
        raise UserError(
            "policy.lossy", str(conf.policy.lossy), "left alone", "mode= says what may change of the results."
        )
    source, name = _source(conf, model)
    modes = load_modes(_names(conf.mode, "mode"))
    return Request(
        model=name,
        source=source,
        system=conf.system.name,
        hardware=hardware,
        policy=policy,
        dtype=conf.dtype,
        threads=conf.threads,
        tasks=_names(conf.tasks, "tasks"),
        exact=load_mode(EXACT_MODE),
        modes=tuple(mode for mode in modes if not mode.is_reference),
        reference=conf.reference,
        limit=_limit(conf.limit),
        margins=Margins(conf.margin.score, conf.margin.bits),
        text_tokens=conf.text_tokens,
        loss_tokens=conf.loss_tokens,
        loss_text=_loss_text(conf.loss_text),
        batch_size=conf.batch_size,
        max_length=conf.max_length,
        rerun=conf.rerun,
        dry_run=conf.dry_run,
        results_dir=expanded(conf.results_dir, "results_dir"),
        cache=expanded(conf.cache_dir, "cache_dir") if conf.cache_dir else default_cache_dir(),
        overrides=overrides,
        tracker=conf.tracker,
    )


def policy_is_neutral(conf: AccuracyConf) -> bool:
    """Whether the policy leaves it to the mode what may change of the results."""
    lossy = conf.policy.lossy
    return lossy.weights is None and lossy.kv_cache is None and lossy.value_share == 1.0


def _limit(value: Any) -> int | str | None:
    if value is None or value == "auto":
        return value if value is None else str(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError("limit", value, "an integer of at least 1, auto, or null for all items")
    return value


def _loss_text(value: str | None) -> Path | None:
    """A file of text in UTF-8."""
    if value is None:
        return None
    path = expanded(value, "loss_text")
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("loss_text", value, "a file of text in UTF-8, or null", str(error)) from error
    return path


def _names(value: Any, key: str) -> tuple[str, ...]:
    """``helm``, ``a,b`` or ``[a,b]`` as names, each once."""
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not listed or any(not str(n).strip() for n in listed):
        raise UserError(key, value, "a name, or several in brackets: [a,b]")
    return tuple(dict.fromkeys(str(name).strip() for name in listed))


def _source(conf: AccuracyConf, model: ModelSpec) -> tuple[str, str]:
    """What to evaluate, and what it is called."""
    if conf.checkpoint is not None:
        if conf.weights or conf.location:
            raise UserError("checkpoint", conf.checkpoint, "given alone, without weights= and location=")
        path = expanded(conf.checkpoint, "checkpoint")
        if os.path.exists(path):
            resolved = path.resolve()
            return str(path.absolute()), resolved.stem if path.is_file() else resolved.name
        if conf.checkpoint.count("/") == 1 and not conf.checkpoint.startswith((".", "/", "~")):
            return conf.checkpoint, conf.checkpoint.replace("/", "_")
        raise UserError(
            "checkpoint", conf.checkpoint, "an existing folder or .gguf file, or a hub id such as facebook/opt-1.3b"
        )
    if model.weights is WeightSource.DUMMY:
        raise UserError(
            "weights",
            "dummy",
            "trained ones: random numbers have no accuracy",
            "Take weights=hub, or checkpoint=/path/to/it.",
        )
    elsewhere = model.weights in (WeightSource.HUB, WeightSource.PATH)
    return model.location if elsewhere else model.shape.name, model.shape.name
