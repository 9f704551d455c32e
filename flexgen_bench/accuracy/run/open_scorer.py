"""A system of conf/system with a model's checkpoint, ready to be asked for its scorer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexgen_bench.checkpoints.source import open_source
from flexgen_bench.config.build import hardware_profile
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.config.schema import SystemConf
from flexgen_bench.config.typed import load_choice
from flexgen_bench.core.cell import CellSpec, ModelSpec, WeightSource
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.errors import CannotRun, UserError, unknown_choice
from flexgen_bench.core.folders import make_writable
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.llm.model_source import checkpoint_of
from flexgen_bench.machine.host import physical_cores
from flexgen_bench.systems.contract import ModelFiles, System
from flexgen_bench.systems.load_system import check_capable, load_target


@dataclass(frozen=True)
class Opened:
    """A system that has checked itself, the checkpoint it reads, and its folder for temporary files."""

    system: System
    checkpoint: Path
    shape: ModelShape
    scratch: tempfile.TemporaryDirectory[str]

    def close(self) -> None:
        self.system.close()
        self.scratch.cleanup()


def open_system(
    name: str,
    model: str | Path,
    *,
    lossy: Lossy,
    dtype: str | DType | None,
    gpu: str | HardwareProfile,
    policy: Policy | None,
    threads: int | None,
    cache_dir: str | Path | None,
    batch_size: int | None,
    options: Mapping[str, Any],
) -> Opened:
    """Raises UserError for an unknown name or value, CannotRun for a system that cannot do this or has no scorer."""
    import torch

    conf = system_conf(name)
    unknown = [key for key in options if key not in conf.options]
    if unknown:
        raise unknown_choice(f"option of {name}", unknown[0], conf.options)
    if conf.target is None:
        raise CannotRun(f"{name} is simulated only: there is nothing here that could be scored")
    if batch_size is not None and batch_size < 1:
        raise UserError("batch_size", batch_size, "an integer of at least 1, or None")
    if policy is not None:
        if not conf.follows_policy:
            raise UserError("policy", policy, f"None: {name} follows no policy of this engine")
        policy = replace(policy, lossy=lossy) if lossy != EXACT else policy
    kind = load_target(conf.target)
    if not kind.capabilities.scores:
        raise CannotRun(f"{name} gives no log-likelihoods")
    cache = make_writable(Path(cache_dir) if cache_dir else default_cache_dir(), "cache_dir")
    hardware = gpu if isinstance(gpu, HardwareProfile) else hardware_profile(gpu)
    threads = threads or physical_cores()
    folder, chosen = checkpoint_of(model, dtype, cache, lambda what, done, total: None, plain=True)
    with open_source(folder) as source:
        shape = source.shape
    spec = CellSpec(
        system=name,
        target=conf.target,
        model=ModelSpec(shape, WeightSource.PATH, str(folder)),
        # What a batch may need: systems that divide memory up ahead look at it.
        workload=Workload("accuracy", PromptKind.TEXT, batch_size or 1, shape.max_positions - 1, 1),
        hardware=hardware,
        dtype=chosen,
        threads=threads,
        policy=policy,
        system_options={**conf.options, **options},
        lossy=lossy,
    )
    check_capable(kind, spec)
    torch.set_num_threads(threads)
    scratch = tempfile.TemporaryDirectory(prefix="offload-", dir=cache)
    try:
        system = kind(spec, ModelFiles(folder, Path(scratch.name), cache))
        system.check()
        if not system.is_prepared():
            system.prepare()
    except BaseException:
        scratch.cleanup()
        raise
    return Opened(system, folder, shape, scratch)


def system_conf(name: str) -> SystemConf:
    """``conf/system/<name>.yaml``. UserError listing the names for an unknown one."""
    conf = load_choice(SystemConf, "system", name)
    assert isinstance(conf, SystemConf)
    return conf
