"""A dashboard in words: what to click where there is no login, or no package that does it."""

from __future__ import annotations

from collections.abc import Iterator

from flexgen_bench.trackers.dashboard import Dashboard, FieldRef, Panel, PanelKind, Scope, Section

_KINDS = {
    PanelKind.LINE: "Line plot",
    PanelKind.SCATTER: "Scatter plot",
    PanelKind.BAR: "Bar chart",
    PanelKind.TABLE: "Query panel",
    PanelKind.MEDIA: "Media",
}


def instructions(dashboard: Dashboard, project: str) -> str:
    """Every step of making the saved view and the report by hand, with the query of each panel."""
    return "\n".join(_lines(dashboard, project)) + "\n"


def _lines(dashboard: Dashboard, project: str) -> Iterator[str]:
    yield f"Saved view {dashboard.title!r} of the project {project!r}"
    yield f"  1. Open the project's Workspace. Group the runs table by {_names(dashboard.group_by)}."
    yield "  2. For each section below: Add section, name it, and add its panels (Add panel)."
    yield f"  3. Save as a new view, named {dashboard.title!r}."
    for section in dashboard.sections:
        yield from _section(section)
    yield ""
    yield f"Report {dashboard.title!r}"
    yield "  1. Reports, Create report, from a blank page."
    yield "  2. For each of these sections: a heading, its text, a panel grid with its run set and its panels:"
    yield from (f"     - {section.name}" for section in dashboard.sections if section.report)


def _section(section: Section) -> Iterator[str]:
    yield ""
    yield f"Section: {section.name}"
    yield f"  runs: Job Type = {section.runs}"
    if section.text:
        yield f"  text: {section.text}"
    for panel in section.panels:
        yield f"  {_KINDS[panel.kind]}: {panel.name}"
        yield from (f"      {line}" for line in _panel(panel))


def _panel(panel: Panel) -> Iterator[str]:
    if panel.kind is PanelKind.TABLE:
        yield f'query: runs.summary["{panel.y[0].name}"]'
        return
    if panel.kind is PanelKind.MEDIA:
        yield f"media key: {panel.y[0].name}"
        return
    if panel.x is not None:
        yield f"X: {_field(panel.x)}" + (", log scale" if panel.log_x else "")
    scale = ", log scale" if panel.log_y else ""
    patterns = [one.regex for one in panel.y if one.is_pattern]
    if patterns:
        yield f"Y: regular expression {'|'.join(patterns)}{scale}"
    else:
        yield f"Y: {_names(panel.y)}{scale}"
    if panel.group is not None:
        yield f"{'Color' if panel.kind is PanelKind.SCATTER else 'Group'} by: {_field(panel.group)}"


def _field(one: FieldRef) -> str:
    return one.name if one.scope is Scope.HISTORY else f"{one.name} ({one.scope})"


def _names(fields: tuple[FieldRef, ...]) -> str:
    return ", ".join(map(_field, fields)) or "nothing"
