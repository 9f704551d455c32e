"""From the ``module:Class`` of a system's conf file to the class, and whether it can do what a cell asks."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.errors import CannotRun, UserError, unknown_choice
from flexgen_bench.core.extras import how_to_install
from flexgen_bench.systems.contract import Capabilities, System


def load_target(target: str) -> type[System]:
    """The System class that ``module:Class`` names. Raises UserError or ModuleNotFoundError."""
    module_name, _, class_name = target.partition(":")
    if not class_name:
        raise UserError("system.target", target, "of the form 'module:Class'")
    module = importlib.import_module(module_name)
    kind = getattr(module, class_name, None)
    if kind is None:
        raise unknown_choice(f"class in {module_name}", class_name, _systems_in(module))
    if not (isinstance(kind, type) and issubclass(kind, System)):
        raise UserError("system.target", target, "a subclass of flexgen_bench.systems.contract.System")
    return kind


def _systems_in(module: Any) -> list[str]:
    return [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, System)]


def check_capable(kind: type[System], spec: CellSpec) -> None:
    """Raise CannotRun if something is not installed, or if the system does not say that it can do what the cell
    asks."""
    able = kind.capabilities
    missing = [name for name in able.needs if find_spec(name) is None]
    if missing:
        raise CannotRun(how_to_install(*missing))
    accelerator = spec.hardware.accelerator.value
    if accelerator not in able.accelerators:
        known = ", ".join(able.accelerators)
        raise CannotRun(f"{spec.system} runs on {known}, not on {accelerator}")
    check_devices(able, spec)
    refused = [name for name in spec.lossy.changed if name not in able.lossy]
    if refused:
        keys = ", ".join(f"policy.lossy.{name}" for name in refused)
        raise CannotRun(
            f"{spec.system} cannot follow {keys} ({spec.lossy}): it computes with what the checkpoint holds"
        )


def check_devices(able: Capabilities, spec: CellSpec) -> None:
    """Raise CannotRun if the cell is for several devices, and the system knows of one."""
    for name in ("count", "tensor_parallel"):
        ranks = getattr(spec.hardware, name)
        if ranks > 1 and not able.ranks:
            raise CannotRun(f"{spec.system} computes on one device here, not on gpu.{name}={ranks}")
