"""Measured rates of machines, one file each in the cache: found again, or measured on first use. No torch in here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from flexgen_bench.core import instructions
from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.rates import Rates
from flexgen_bench.core.tiers import LINKS, Tier
from flexgen_bench.core.units import GIB
from flexgen_bench.machine import host as machine
from flexgen_bench.machine.environment import cpu_model

# Raised when what a constant means, or how it is measured, has changed: older files are measured again.
SCHEMA = 3
FOLDER = "calibration"
_ADVICE = "Measure again with: python -m flexgen_bench calibrate"

_log = logging.getLogger("flexgen_bench.calibrate")


@dataclass(frozen=True)
class Calibration:
    """Measured rates and how they came about.

    machine: what ``describe`` says of it. mode: quick or full. measured: when, UTC. unstable: constants whose spread
    stayed above the threshold. also: rates of other sizes and kinds that no model uses, in bytes/s. notes: what the
    measuring could not do.
    """

    rates: Rates
    machine: Mapping[str, Any]
    mode: str
    measured: str
    unstable: tuple[str, ...] = ()
    also: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def describe(threads: int) -> dict[str, Any]:
    """What rates depend on: processor and which of its instructions are used, cores, memory, GPU (where torch can use
    it), and the threads that compute. (Virtual processors of different kinds may have one and the same name.)"""
    gpus = machine.local_gpus() if machine.torch_has_cuda() else ()
    return {
        "cpu": cpu_model(),
        "instructions": instructions.describe(),
        "cores": machine.logical_cores(),
        "memory_gib": round(machine.memory_bytes() / GIB),
        "gpu": gpus[0].name if gpus else None,
        "threads": threads,
    }


def machine_id(described: Mapping[str, Any]) -> str:
    """A name for files; another machine, or the same with other threads, has another."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def path_for(cache: Path, threads: int) -> Path:
    """Where the rates of this machine are kept."""
    return cache / FOLDER / f"{machine_id(describe(threads))}.yaml"


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration, whole or not at all; an older one is replaced. StoreError if it cannot be."""
    data = {
        "schema": SCHEMA,
        "torch": _torch_version(),
        "machine": dict(calibration.machine),
        "mode": calibration.mode,
        "measured": calibration.measured,
        "unstable": list(calibration.unstable),
        "notes": list(calibration.notes),
        "also": dict(calibration.also),
        "rates": to_json(calibration.rates),
    }
    write_whole(path, to_yaml(data))


def to_yaml(data: Mapping[str, Any]) -> str:
    """As people read it: sizes as numbers, a table on a line."""
    return str(
        yaml.safe_dump(_with_sizes(data), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    )


def _with_sizes(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    return {int(k) if str(k).isdigit() else k: _with_sizes(v) for k, v in data.items()}


def write_whole(path: Path, text: str) -> None:
    """A text file, whole or not at all, replacing what was there. StoreError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot save {path}: {error.strerror or error}. Make room, or choose another folder."
        ) from error


def load(path: Path) -> Calibration:
    """The calibration in a file. StoreError naming the file and what to do for one that cannot be used."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise StoreError(f"cannot read measured rates in {path}: {reason}. {_ADVICE}") from error
    if not isinstance(data, Mapping):
        raise StoreError(f"{path} holds no measured rates. {_ADVICE}")
    for key, expected in (("schema", SCHEMA), ("torch", _torch_version())):
        if data.get(key) != expected:
            raise StoreError(
                f"the rates in {path} were measured with {key} {data.get(key)}, and this is {key} {expected}. {_ADVICE}"
            )
    try:
        return Calibration(
            rates=from_json(Rates, data["rates"], "rates"),
            machine=dict(data["machine"]),
            mode=str(data["mode"]),
            measured=str(data["measured"]),
            unstable=tuple(map(str, data["unstable"])),
            also=dict(data["also"]),
            notes=tuple(map(str, data["notes"])),
        )
    except (KeyError, TypeError, ValueError) as error:  # UserError of a constant is a ValueError
        raise StoreError(f"{path} is not usable: {error}. {_ADVICE}") from error


def calibrated_rates(cache: Path, threads: int) -> Rates | None:
    """This machine's rates if they have been measured. A file that cannot be used counts as none, with a warning."""
    path = path_for(cache, threads)
    if not path.exists():
        return None
    try:
        return load(path).rates
    except StoreError as error:
        _log.warning("%s", error)
        return None


def ensure_calibrated(cache: Path, threads: int, notify: Callable[[str], None] = lambda line: None) -> Rates:
    """This machine's rates, measured first if they are not known: quickly, and in a process of its own, so that nothing
    of it stays in memory. ``notify`` gets lines that say what goes on. StoreError if it cannot be measured."""
    known = calibrated_rates(cache, threads)
    if known is not None:
        return known
    notify("measuring this machine (once, about 20 s; python -m flexgen_bench calibrate does it thoroughly)")
    child = subprocess.Popen(
        _command(cache, threads), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    last = ""
    try:
        assert child.stderr is not None
        for line in child.stderr:
            last = line.strip() or last
            notify(line.rstrip())
        status = child.wait()
    except BaseException:
        child.kill()
        child.wait()
        raise
    finally:
        if child.stderr is not None:
            child.stderr.close()
    if status != 0:
        raise StoreError(f"this machine could not be measured (exit status {status}): {last or 'no message'}")
    return load(path_for(cache, threads)).rates


def _command(cache: Path, threads: int) -> list[str]:
    module = [sys.executable, "-m", "flexgen_bench", "calibrate"]
    return [*module, "--quick", "--threads", str(threads), "--cache-dir", str(cache)]


def with_calibration(profile: HardwareProfile, rates: Rates) -> HardwareProfile:
    """A profile of this machine with measured rates where it has none of its own; what it states stays.

    Without accelerator: the cpu and the disk. Emulated: the accelerator computes on the host's cores, so it has their
    rates; its links are the profile's, where it states none copies within host memory. CUDA: both sites and all links;
    a GPU that was not measured stays without rates. Raises UserError for an emulated or plain profile if the cpu was
    not measured.
    """
    if profile.accelerator is not Accelerator.CUDA and Tier.CPU not in rates.sites:
        raise UserError("rates.cpu", None, "measured", _ADVICE)
    measured = dict(rates.sites)
    if profile.accelerator is Accelerator.NONE:
        measured = {Tier.CPU: rates.sites[Tier.CPU]}
    elif profile.accelerator is Accelerator.EMULATED:
        measured = dict.fromkeys((Tier.GPU, Tier.CPU), rates.sites[Tier.CPU])
    own = profile.rates or Rates({})
    links = {str(lane) for lane, ends in LINKS.items() if set(ends) <= set(profile.tiers)}
    links -= set(profile.links)
    filled = Rates(
        sites={**measured, **own.sites},
        links={k: v for k, v in rates.links.items() if k in links} | dict(own.links),
        transfers={**rates.transfers, **own.transfers},
        spread={**rates.spread, **own.spread},
        price_per_hour=own.price_per_hour if own.price_per_hour is not None else rates.price_per_hour,
    )
    return replace(profile, rates=filled)


def _torch_version() -> str:
    """Without importing it."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "none"
