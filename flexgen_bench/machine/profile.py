"""A calibration as a machine of ``conf/gpu``, for use with ``--config-dir`` here or elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.hardware import Accelerator
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.units import GB
from flexgen_bench.machine import host as machine
from flexgen_bench.machine.measured_rates import Calibration, to_yaml, write_whole

_DISK_LINKS = (str(Lane.DISK_READ), str(Lane.DISK_WRITE))


def write_profile(calibration: Calibration, path: Path, disk_dir: Path) -> None:
    """Write ``path``, whole or not at all. StoreError if it cannot be written."""
    header = "# Measured by python -m flexgen_bench.calibrate. Rates: core/rates.py says what they mean.\n"
    write_whole(path, header + to_yaml(profile_of(calibration, path.stem, disk_dir)))


def profile_of(calibration: Calibration, name: str, disk_dir: Path) -> dict[str, Any]:
    """The keys of a file in conf/gpu. Memories are what is there, the disk what is free."""
    rates = to_json(calibration.rates)
    has_gpu = Tier.GPU in calibration.rates.sites
    links = {k: v for k, v in rates.pop("links").items() if has_gpu or k in _DISK_LINKS}
    gpus = machine.local_gpus() if has_gpu else ()
    return {
        "name": name,
        "accelerator": str(Accelerator.CUDA if has_gpu else Accelerator.NONE),
        "gpu_memory": gpus[0].memory_bytes if gpus else None,
        "cpu_memory": machine.memory_bytes(),
        "disk": f"{machine.free_disk_bytes(disk_dir) // GB}GB",
        "device_match": gpus[0].name if gpus else "",
        "links": links,
        "rates": rates,
        "sources": _sources(calibration, links),
    }


def _sources(calibration: Calibration, links: dict[str, float]) -> dict[str, str]:
    about, spread = calibration.machine, calibration.rates.spread
    here = f"measured here on {calibration.measured[:10]} ({calibration.mode})"
    sources = {"cpu_memory": "the operating system", "disk": "what was free"}
    if Tier.GPU in calibration.rates.sites:
        sources["gpu_memory"] = "the driver"
    for lane in links:
        sources[lane] = f"{here}, spread {spread[f'links.{lane}']:.1%}"
    worst = max(spread, key=lambda name: spread[name])
    unstable = f", {len(calibration.unstable)} unstable" if calibration.unstable else ""
    sources["rates"] = (
        f"{here} with {about['threads']} threads of {about['cpu']}; the spread of each is in rates.spread, "
        f"at most {spread[worst]:.1%} ({worst}){unstable}"
    )
    return sources
