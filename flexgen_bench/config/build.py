"""The conf groups checked against each other, and turned into core types."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from flexgen_bench.config.machine import machine_profile
from flexgen_bench.config.paths import choices
from flexgen_bench.config.schema import AppConf, GpuConf, LossyConf, ModelConf, PolicyConf, SystemConf
from flexgen_bench.config.typed import load_choice
from flexgen_bench.core.cell import CellSpec, MeasureSpec, ModelSpec, WeightSource
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.folders import expanded
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.instructions import usable
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.pipeline import divided
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.simulated import SIMULATED_ONLY, SystemModel
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.machine import host as machine
from flexgen_bench.models.registry import weight_bytes
from flexgen_bench.planner.fastest_dtype import fastest_dtype

# The dtype that leaves it to the machine.
FASTEST = "fastest"


def run_parts(
    model: ModelConf, gpu: GpuConf, policy: PolicyConf, weights: str | None, location: str | None
) -> tuple[ModelSpec, HardwareProfile, Policy | None]:
    """The core types of three groups, for command lines that describe no cell. Raises UserError for what does not go
    together."""
    hardware = machine_profile(gpu)
    return _model(model, weights, location), hardware, to_policy(policy, hardware)


def dtype_by_rule(hardware: HardwareProfile, threads: int) -> DType:
    """What ``dtype=fastest`` is on a machine: by the rates that its profile states, else by its processor's
    instructions."""
    return fastest_dtype(hardware, usable())


def _dtype(name: str, fastest: Callable[[], DType]) -> DType:
    known = [dtype.value for dtype in DType]
    if name != FASTEST and name not in known:
        raise unknown_choice("dtype", name, [*known, FASTEST])
    return fastest() if name == FASTEST else DType(name)


def _choice(enum: Any, value: str, name: str) -> Any:
    if value not in [member.value for member in enum]:
        raise unknown_choice(name, value, [member.value for member in enum])
    return enum(value)


def _same_fields(kind: Any, conf: Any) -> dict[str, Any]:
    """What a schema has of a core type's fields, by name."""
    return {f.name: getattr(conf, f.name) for f in fields(kind)}


def shape_of(conf: ModelConf) -> ModelShape:
    """What conf/model says of a model."""
    return ModelShape(**_same_fields(ModelShape, conf))


def _model(conf: ModelConf, weights: str | None, location: str | None, shape: ModelShape | None = None) -> ModelSpec:
    """shape: of the weights themselves, where that decides."""
    if shape is None:
        shape = shape_of(conf)
    source: WeightSource = _choice(WeightSource, weights or conf.weights, "weights")
    if source is WeightSource.DUMMY:
        return ModelSpec(shape, source, "", conf.seed)
    where = location or conf.locations.get(source.value)
    if not where and source is WeightSource.PATH:
        raise UserError("location", None, "the checkpoint folder or .gguf file", "Add location=/path/to/it.")
    if not where:
        known = ", ".join(["dummy", *conf.locations, "path"])
        raise UserError(
            "weights",
            source.value,
            f"one of {known} for model {conf.name}",
            f"Or name where it is: location=<{source.value} name>.",
        )
    if source is WeightSource.PATH:
        where = str(expanded(where, "location").absolute())
        if not os.path.exists(where):
            raise UserError("location", where, "an existing checkpoint folder or .gguf file")
    return ModelSpec(shape, source, where, conf.seed)


def to_policy(conf: PolicyConf, hardware: HardwareProfile) -> Policy | None:
    """None for ``auto``. UserError for shares on a tier that the hardware does not have."""
    if conf.auto:
        return None
    chosen = _same_fields(Policy, conf) | {"lossy": to_lossy(conf.lossy)}
    for key in ("weights", "kv_cache", "activations", "experts"):
        shares = getattr(conf, key)
        if shares is None:  # experts, with their layers
            continue
        try:
            chosen[key] = Placement(shares.gpu, shares.cpu, shares.disk)
        except UserError as error:
            raise UserError(f"policy.{key}", error.value, error.allowed, error.action) from error
        if chosen[key].share(Tier.GPU) > 0 and Tier.GPU not in hardware.tiers:
            raise UserError(
                f"policy.{key}.gpu",
                shares.gpu,
                f"0 on gpu={hardware.name}, which has no accelerator",
                "Take gpu=emulated, or a policy such as policy=all-cpu.",
            )
    policy = Policy(**chosen)
    if policy.kv_moved and (Tier.GPU not in hardware.tiers or not policy.kv_cache.share(Tier.CPU)):
        raise UserError(
            "policy.kv_moved",
            policy.kv_moved,
            "0 where no cache in host memory lies below an accelerator",
            "Give the cache a share there (policy.kv_cache.cpu) on a machine with an accelerator, or leave it out.",
        )
    return policy


def to_lossy(conf: LossyConf) -> Lossy:
    """UserErrors name the key as it is written on the command line."""
    given = {}
    for key in ("weights", "kv_cache"):
        try:
            given[key] = Compression.parse(getattr(conf, key), conf.group_size)
        except UserError as error:
            raise _on_command_line(error, key, getattr(conf, key)) from error
    try:
        return Lossy(value_share=conf.value_share, activations=conf.activations, **given)
    except UserError as error:
        name = f"policy.lossy.{error.field}"
        raise UserError(name, error.value, error.allowed, error.action) from error


def _on_command_line(error: UserError, key: str, given: object) -> UserError:
    """What is wrong with a compression, under the key that was written: its own, one inside it, or the group size of
    both."""
    part = error.field.removeprefix("compression").removeprefix(".")
    inside = isinstance(given, Mapping) and part in given
    if part == "group_size" and not isinstance(given, str) and not inside:
        name = part
    else:
        name = f"{key}.{part}" if inside else key
    return UserError(f"policy.lossy.{name}", error.value, error.allowed, error.action)


def _check_system(conf: SystemConf) -> None:
    for key in ("target", "predictor"):
        value = getattr(conf, key)
        if value is not None and value.count(":") != 1:
            raise UserError(f"system.{key}", value, "written module:Class, or null")
    for name, value in conf.options.items():
        if name in conf.choices and str(value) not in conf.choices[name]:
            raise unknown_choice(f"system.options.{name}", str(value), conf.choices[name])


def cell_spec(
    conf: AppConf, fastest: Callable[[HardwareProfile, int], DType] = dtype_by_rule, shape: ModelShape | None = None
) -> CellSpec:
    """The cell that a configuration with a system describes. fastest: machine, threads -> the dtype where that is left
    to the machine. shape: of the model, where its weights say it and not the configuration.

    Raises UserError for anything that cannot be.
    """
    if conf.system is None:
        raise UserError("system", None, "given to make a cell of a configuration")
    _check_system(conf.system)
    model = _model(conf.model, conf.weights, conf.location, shape)
    kind = _choice(PromptKind, conf.workload.kind, "workload.kind")
    workload = Workload(**(_same_fields(Workload, conf.workload) | {"kind": kind}))
    positions = workload.prompt_len + workload.gen_len
    if positions > model.shape.max_positions:
        raise UserError(
            "workload.prompt_len + workload.gen_len",
            positions,
            f"at most the {model.shape.max_positions} positions of {model.shape.name}",
            "Shorten either, e.g. workload.prompt_len=128.",
        )
    threads = machine.physical_cores() if conf.threads is None else conf.threads
    if threads > machine.logical_cores():
        raise UserError("threads", threads, f"at most the {machine.logical_cores()} hardware threads here")
    budget_s = conf.measure.budget_s
    if budget_s is not None and not budget_s > 0:
        raise UserError("measure.budget_s", budget_s, "more than zero seconds, or null")

    def profile(dtype: DType) -> HardwareProfile:
        return machine_profile(conf.gpu, lambda: weight_bytes(model.shape, dtype))

    # Asked of a profile whose shares are of 16-bit weights: how much memory there is decides nothing about it.
    dtype = _dtype(conf.dtype, lambda: fastest(profile(DType.BFLOAT16), threads))
    hardware = profile(dtype)
    if hardware.count > 1:
        divided(model.shape.num_layers, hardware.count, hardware.layers_per_rank)
    return CellSpec(
        system=conf.system.name,
        target=conf.system.target or SIMULATED_ONLY,
        model=model,
        workload=workload,
        hardware=hardware,
        dtype=dtype,
        threads=threads,
        measure=MeasureSpec(**_same_fields(MeasureSpec, conf.measure)),
        policy=to_policy(conf.policy, hardware),
        lossy=to_lossy(conf.policy.lossy),
        max_latency_s=conf.policy.max_latency_s,
        system_options=conf.system.options,
    )


def system_model(conf: SystemConf) -> SystemModel:
    """What predicts a system, as its file says."""
    return SystemModel(
        predictor=conf.predictor,
        constants=conf.constants,
        printed_as=conf.printed_as or "",
        follows_policy=conf.follows_policy,
    )


def list_systems() -> list[str]:
    """The names in conf/system of what can be run."""
    return [name for name in choices("system") if load_choice(SystemConf, "system", name).target is not None]


def system_target(name: str) -> str:
    """The ``module:Class`` of a system in conf/system. Raises UserError listing the names for one that cannot be
    run."""
    if name not in list_systems():
        raise unknown_choice("system", name, list_systems())
    conf: SystemConf = load_choice(SystemConf, "system", name)
    assert conf.target is not None, "listed"
    return conf.target


def model_spec(name: str, weights: str | None = None, location: str | None = None) -> ModelSpec:
    """The model ``conf/model/<name>.yaml`` describes, for callers that do not come through the command line.

    Raises UserError listing the names for an unknown one.
    """
    return _model(load_choice(ModelConf, "model", name), weights, location)


def hardware_profile(name: str) -> HardwareProfile:
    """The machine ``conf/gpu/<name>.yaml`` describes, for callers that do not come through the command line.

    Raises UserError listing the names for an unknown one, and naming what is wrong with a file.
    """
    return machine_profile(load_choice(GpuConf, "gpu", name))
