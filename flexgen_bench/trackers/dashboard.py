"""The panels of a dashboard as data (``conf/dashboard.yaml``), and whether what they query exists."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from flexgen_bench.config.paths import conf_dir
from flexgen_bench.config.schema import MISSING
from flexgen_bench.config.typed import load_typed
from flexgen_bench.core.errors import UserError, unknown_choice

FILE = "dashboard.yaml"
RUN_KINDS = ("cell", "suite", "accuracy")
# Of a run itself, not of what was sent with it.
RUN_ATTRIBUTES = ("group", "name", "jobType")


class PanelKind(StrEnum):
    LINE = "line"  # history against one of its columns
    SCATTER = "scatter"  # two values of a run
    BAR = "bar"  # one value of a run
    TABLE = "table"
    MEDIA = "media"


class Scope(StrEnum):
    HISTORY = "history"
    SUMMARY = "summary"
    CONFIG = "config"
    RUN = "run"


# Where the fields of a panel may lie: of x, and of each y.
_SCOPES: dict[PanelKind, tuple[tuple[Scope, ...], tuple[Scope, ...]]] = {
    PanelKind.LINE: ((Scope.HISTORY,), (Scope.HISTORY,)),
    PanelKind.SCATTER: ((Scope.SUMMARY, Scope.CONFIG), (Scope.SUMMARY, Scope.CONFIG)),
    PanelKind.BAR: ((), (Scope.SUMMARY,)),
    PanelKind.TABLE: ((), (Scope.SUMMARY,)),
    PanelKind.MEDIA: ((), (Scope.SUMMARY,)),
}


@dataclass(frozen=True)
class FieldRef:
    """A field that a panel queries. name: with a star for any text."""

    scope: Scope
    name: str

    @staticmethod
    def parse(text: str, at: str) -> FieldRef:
        scope, dot, name = text.partition(".")
        if scope not in list(Scope) or not dot or not name:
            raise UserError(at, text, f"a field as in summary.NAME; one of {', '.join(Scope)} before the dot")
        return FieldRef(Scope(scope), name)

    def __str__(self) -> str:
        return f"{self.scope}.{self.name}"

    @property
    def is_pattern(self) -> bool:
        return "*" in self.name

    @property
    def regex(self) -> str:
        """The names it stands for, as a regular expression."""
        return "^" + ".*".join(re.escape(part) for part in self.name.split("*")) + "$"

    def among(self, names: Iterable[str]) -> list[str]:
        """The names that it stands for."""
        return sorted(name for name in names if fnmatch.fnmatchcase(name, self.name))


@dataclass
class PanelConf:
    name: str = MISSING
    kind: str = MISSING
    x: str | None = None
    y: list[str] = field(default_factory=list)
    group: str | None = None
    log_x: bool = False
    log_y: bool = False


@dataclass
class SectionConf:
    name: str = MISSING
    runs: str = MISSING
    report: bool = False
    text: str = ""
    panels: list[PanelConf] = field(default_factory=list)


@dataclass
class DashboardConf:
    title: str = MISSING
    description: str = ""
    group_by: list[str] = field(default_factory=list)
    sections: list[SectionConf] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """One picture or table. group: the field that tells its runs apart, None: each run for itself."""

    name: str
    kind: PanelKind
    x: FieldRef | None
    y: tuple[FieldRef, ...]
    group: FieldRef | None
    log_x: bool = False
    log_y: bool = False

    @property
    def fields(self) -> tuple[FieldRef, ...]:
        """All that it queries."""
        return tuple(one for one in (self.x, *self.y, self.group) if one is not None)


@dataclass(frozen=True)
class Section:
    """Panels of runs of one kind. report: whether they are in the report, too; text: what a reader should know."""

    name: str
    runs: str
    report: bool
    text: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """The workspace and the report. group_by: what runs are grouped by."""

    title: str
    description: str
    group_by: tuple[FieldRef, ...]
    sections: tuple[Section, ...]


def load_dashboard(path: Path | None = None) -> Dashboard:
    """The definition in a file, ``conf/dashboard.yaml`` unless another is named. Raises UserError naming what is wrong
    with it."""
    conf: DashboardConf = load_typed(DashboardConf, path or conf_dir() / FILE, "dashboard.")
    groups = tuple(FieldRef.parse(text, "dashboard.group_by") for text in conf.group_by)
    return Dashboard(conf.title, conf.description, groups, tuple(_section(one) for one in conf.sections))


def missing_fields(dashboard: Dashboard, found: Mapping[str, Mapping[Scope, Iterable[str]]]) -> list[str]:
    """One line for each query of a panel that would find nothing. found: by kind of run, the names of its fields."""
    problems = []
    for section in dashboard.sections:
        of_kind = found.get(section.runs, {})
        for panel in section.panels:
            for one in panel.fields:
                known = RUN_ATTRIBUTES if one.scope is Scope.RUN else of_kind.get(one.scope, ())
                if not one.among(known):
                    problems.append(f"{section.name}: {panel.name}: no {section.runs} run has {one}")
    return problems


def _section(conf: SectionConf) -> Section:
    if conf.runs not in RUN_KINDS:
        raise unknown_choice(f"dashboard section {conf.name}: runs", conf.runs, RUN_KINDS)
    return Section(conf.name, conf.runs, conf.report, conf.text, tuple(_panel(one) for one in conf.panels))


def _panel(conf: PanelConf) -> Panel:
    at = f"dashboard panel {conf.name}"
    if conf.kind not in list(PanelKind):
        raise unknown_choice(f"{at}: kind", conf.kind, list(PanelKind))
    kind = PanelKind(conf.kind)
    of_x, of_y = _SCOPES[kind]
    x = None if conf.x is None else FieldRef.parse(conf.x, f"{at}: x")
    y = tuple(FieldRef.parse(text, f"{at}: y") for text in conf.y)
    if (x is None) is bool(of_x) or (x is not None and x.scope not in of_x):
        raise UserError(f"{at}: x", conf.x, f"a field of {' or '.join(of_x)}" if of_x else "left out")
    if not y or any(one.scope not in of_y for one in y) or (kind is not PanelKind.LINE and len(y) > 1):
        raise UserError(f"{at}: y", conf.y, f"a field of {' or '.join(of_y)}; several with kind: line")
    if kind is not PanelKind.LINE and any(one.is_pattern for one in y):
        raise UserError(f"{at}: y", conf.y, "a name without a star; kind: line takes one")
    group = None if conf.group is None else FieldRef.parse(conf.group, f"{at}: group")
    if group is not None and group.scope not in (Scope.CONFIG, Scope.RUN):
        raise UserError(f"{at}: group", conf.group, "a field of config or run")
    return Panel(conf.name, kind, x, y, group, conf.log_x, conf.log_y)
