"""Runs that may stand in one picture, and what they have in common, in words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.core.units import format_bytes
from flexgen_bench.pictures.picture import Point, Series
from flexgen_bench.pictures.run import Run, Setting
from flexgen_bench.store.writer import safe_name

Key = TypeVar("Key", bound=Hashable)
_LONGEST_REASON = 160


@dataclass(frozen=True)
class Facet:
    """Runs of one setting. caps: of the tiers that are the same for all of them, in words."""

    setting: Setting
    caps: str
    runs: tuple[Run, ...]

    @property
    def facts(self) -> dict[str, str]:
        threads = f", {self.setting.threads} threads" if self.setting.threads else ""
        return {
            "machine": self.setting.machine_words,
            "hardware": f"{self.setting.hardware}{self.caps}{threads}",
            "model": self.setting.model_words,
            "workload": self.setting.workload,
        }

    @property
    def words(self) -> str:
        return "; ".join(self.facts.values())

    def key(self, name: str, *more: str) -> str:
        """A file's name: readable, and unique by a hash of everything that the runs have in common."""
        setting = self.setting
        parts = (name, setting.model, self.runs[0].workload, self.runs[0].hardware, *more)
        return key_of(parts, (*self.facts.values(), setting.shape, *more))


def facets(runs: Iterable[Run], free: str = "") -> list[Facet]:
    """free: the tier (cpu or gpu) whose cap may differ within a facet; without one both are the same."""

    def key(run: Run) -> tuple[Setting, str]:
        caps = {"cpu": ("host memory", run.cpu_cap), "gpu": ("gpu memory", run.gpu_cap)}
        words = [f", {name} {format_bytes(cap)}" for tier, (name, cap) in caps.items() if cap and tier != free]
        return run.setting, "".join(words)

    groups = grouped(runs, key)
    return [Facet(setting, caps, tuple(members)) for (setting, caps), members in groups.items()]


def grouped(runs: Iterable[Run], key: Callable[[Run], Key]) -> dict[Key, list[Run]]:
    """In the order of the keys' texts, so that pictures come in the same order everywhere."""
    groups: dict[Key, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return dict(sorted(groups.items(), key=lambda item: str(item[0])))


def key_of(parts: Sequence[str], identity: Sequence[str]) -> str:
    """Two dashes between the parts, and at the end a hash of ``identity``."""
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:8]
    return "--".join(safe_name(part) for part in (*parts, digest))


def series_of(
    runs: Iterable[Run],
    point: Callable[[Run], Point | None],
    *,
    joined: bool = False,
    of: Callable[[Run], str] = lambda run: "",
) -> list[Series]:
    """One series for each system, compression and evidence, points by x; those without points are left out."""
    series = []
    groups = grouped(runs, lambda run: (of(run), run.system, run.lossy, run.evidence.value))
    for (whose, system, lossy, evidence), members in groups.items():
        points = [made for run in members if (made := point(run)) is not None]
        if points:
            ordered = sorted(points, key=lambda p: (p.x, p.y, p.label, p.source.run_id))
            series.append(Series(system, lossy, Evidence(evidence), tuple(ordered), joined, of=whose))
    return sorted(series, key=lambda s: (s.of, s.system, s.lossy, list(Evidence).index(s.evidence)))


def not_shown(runs: Iterable[Run], why: Callable[[Run], str]) -> list[str]:
    """A note for each run that is left out; alike ones are told once, with their number."""
    counts: dict[str, int] = {}
    for run in runs:
        reason = why(run)
        if reason:
            line = f"{run.label}: {reason}"
            counts[line] = counts.get(line, 0) + 1
    return [f"Not shown: {line}{f' ({n} records)' if n > 1 else ''}." for line, n in sorted(counts.items())]


def failure_words(run: Run) -> str:
    """How a run ended that has no figures; "" for one that has."""
    if run.status is Status.OK:
        return ""
    return f"{run.status.value}, {short(run.reason)}" if run.reason else run.status.value


def short(reason: str) -> str:
    """The first line of a reason, cut."""
    flat = " ".join(reason.strip().split("\n", 1)[0].split())
    return flat if len(flat) <= _LONGEST_REASON else flat[: _LONGEST_REASON - 3].rstrip() + "..."


def evidence_note(series: Iterable[Series]) -> list[str]:
    """What a reader must know where numbers of several kinds stand in one picture."""
    kinds = [kind for kind in Evidence if any(s.evidence is kind for s in series)]
    if kinds == [Evidence.MEASURED]:
        return []
    words: Mapping[Evidence, str] = {
        Evidence.MEASURED: "run on the named hardware",
        Evidence.EMULATED: "run with links or memory held to those of other hardware",
        Evidence.PROJECTED: "part of a run, scaled up",
        Evidence.SIMULATED: "predicted, nothing was run",
        Evidence.QUOTED: "printed in a paper",
    }
    return [f"{'; '.join(f'{kind.value} = {words[kind]}' for kind in kinds)}."]
