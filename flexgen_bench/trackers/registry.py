"""Trackers by name. A tracker is one entry here, its file and one YAML in ``conf/tracker``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flexgen_bench.core.codec import from_json
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.trackers.base import Tracker
from flexgen_bench.trackers.none import NoTracker


def _make_none(options: Mapping[str, Any], directory: Path) -> Tracker:
    del directory
    if options:
        raise UserError("tracker", dict(options), "without options for the tracker 'none'")
    return NoTracker()


def _make_wandb(options: Mapping[str, Any], directory: Path) -> Tracker:
    from flexgen_bench.trackers.wandb_tracker import WandbOptions, WandbTracker

    return WandbTracker(from_json(WandbOptions, options, "tracker"), directory)


_MAKERS: dict[str, Callable[[Mapping[str, Any], Path], Tracker]] = {"none": _make_none, "wandb": _make_wandb}


def make_tracker(name: str, options: Mapping[str, Any], directory: Path) -> Tracker:
    """The tracker called ``name``; whatever it writes on this machine goes under ``directory``.

    Raises UserError for an unknown name (listing the known ones) or an option that it does not have.
    """
    if name not in _MAKERS:
        raise unknown_choice("tracker", name, _MAKERS)
    return _MAKERS[name](options, directory)
