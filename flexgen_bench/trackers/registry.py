"""Trackers by name. A tracker is one entry here, its file and one YAML in ``conf/tracker``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flexgen_bench.core.codec import from_json
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.trackers.base import Tracker

# Records are files, and that is all.
NONE = "none"


def _make_wandb(options: Mapping[str, Any], directory: Path) -> Tracker:
    from flexgen_bench.trackers.wandb_tracker import WandbOptions, WandbTracker

    return WandbTracker(from_json(WandbOptions, options, "tracker"), directory)


_MAKERS: dict[str, Callable[[Mapping[str, Any], Path], Tracker]] = {"wandb": _make_wandb}


def make_tracker(name: str, options: Mapping[str, Any], results_dir: Path) -> Tracker | None:
    """The tracker called ``name``, whose files go into a folder of its name beside the results. None where nothing is
    sent.

    Raises UserError for an unknown name (listing the known ones) or an option that it does not have.
    """
    if name == NONE:
        if options:
            raise UserError("tracker", dict(options), f"without options for the tracker {NONE!r}")
        return None
    if name not in _MAKERS:
        raise unknown_choice("tracker", name, (NONE, *_MAKERS))
    return _MAKERS[name](options, Path(results_dir).absolute().parent / name)
