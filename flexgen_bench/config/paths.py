"""Where the configuration, its shipped answers and the cache are."""

from __future__ import annotations

import os
from pathlib import Path

from flexgen_bench.core.errors import unknown_choice
from flexgen_bench.core.folders import expanded


def conf_dir() -> Path:
    """The folder of the conf groups: inside an installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"flexgen-bench is installed without its conf folder (looked beside {package})")


def shipped_predictions() -> Path:
    """The file of predictions that comes with the project: inside an installed package, or among the results of a
    checkout. It may not be there."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "results" / "predictions.json"
    return inside if inside.is_file() else package.parent / "results" / "predictions.json"


def default_cache_dir() -> Path:
    """$FLEXGEN_BENCH_CACHE, or ~/.cache/flexgen-bench."""
    named = os.environ.get("FLEXGEN_BENCH_CACHE")
    return expanded(named, "FLEXGEN_BENCH_CACHE") if named else Path.home() / ".cache" / "flexgen-bench"


def choices(group: str) -> list[str]:
    """The names in conf/``group``."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def list_models() -> list[str]:
    """The names in conf/model."""
    return choices("model")


def choice_file(group: str, name: str, field: str | None = None) -> Path:
    """``conf/<group>/<name>.yaml``. Raises UserError listing the names for an unknown one; field: what it calls the
    group."""
    known = choices(group)
    if name not in known:
        raise unknown_choice(field or group, name, known)
    return conf_dir() / group / f"{name}.yaml"
