"""A dashboard as objects of the package wandb-workspaces. Making them needs no login; saving them does."""

from __future__ import annotations

from typing import Any

from flexgen_bench.trackers.dashboard import Dashboard, FieldRef, Panel, PanelKind, Scope, Section

_HALF, _HEIGHT = 12, 8  # of a grid that is 24 wide


def workspace(dashboard: Dashboard, entity: str, project: str) -> Any:
    """The saved view. Raises ImportError without the package."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name=dashboard.title,
        sections=[
            ws.Section(
                name=section.name,
                panels=[_panel(wr, panel, number) for number, panel in enumerate(section.panels)],
                is_open=True,
            )
            for section in dashboard.sections
        ],
        runset_settings=ws.RunsetSettings(groupby=[_run_field(ws, one) for one in dashboard.group_by]),
    )


def report(dashboard: Dashboard, entity: str, project: str) -> Any:
    """The report: sections that are marked for it. Raises ImportError without the package."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = []
    for section in dashboard.sections:
        if section.report:
            blocks += [wr.H2(section.name), wr.P(section.text), _grid(wr, section)]
    return wr.Report(
        entity=entity,
        project=project,
        title=dashboard.title,
        description=dashboard.description,
        blocks=blocks,
        width="fluid",
    )


def _grid(wr: Any, section: Section) -> Any:
    # Of the report's own project: one that is named is looked up at the server as soon as it is written.
    runs = wr.Runset(name=f"{section.runs} runs", filters=f"Metric('JobType') == '{section.runs}'")
    panels = [_panel(wr, panel, number) for number, panel in enumerate(section.panels)]
    return wr.PanelGrid(runsets=[runs], panels=panels)


def _panel(wr: Any, panel: Panel, number: int) -> Any:
    layout = wr.Layout(x=_HALF * (number % 2), y=_HEIGHT * (number // 2), w=_HALF, h=_HEIGHT)
    if panel.kind is PanelKind.TABLE:
        return wr.WeavePanelSummaryTable(table_name=panel.y[0].name, layout=layout)
    if panel.kind is PanelKind.MEDIA:
        return wr.MediaBrowser(title=panel.name, media_keys=[panel.y[0].name], layout=layout)
    group = None if panel.group is None else _grouping(wr, panel.group)
    if panel.kind is PanelKind.BAR:
        return wr.BarPlot(
            title=panel.name,
            metrics=[one.name for one in panel.y],
            orientation="v",
            groupby=group,
            groupby_aggfunc="mean",
            layout=layout,
        )
    assert panel.x is not None
    if panel.kind is PanelKind.SCATTER:
        legend = None if panel.group is None else f"${{{panel.group.scope}:{panel.group.name}}} ${{run:displayName}}"
        return wr.ScatterPlot(
            title=panel.name,
            x=_value(wr, panel.x),
            y=_value(wr, panel.y[0]),
            log_x=panel.log_x,
            log_y=panel.log_y,
            legend_template=legend,
            layout=layout,
        )
    patterns = [one.regex for one in panel.y if one.is_pattern]
    return wr.LinePlot(
        title=panel.name,
        x=panel.x.name,
        y=[] if patterns else [one.name for one in panel.y],
        metric_regex="|".join(patterns) or None,
        log_y=panel.log_y,
        groupby=group,
        layout=layout,
    )


def _value(wr: Any, one: FieldRef) -> Any:
    return wr.Config(one.name) if one.scope is Scope.CONFIG else wr.SummaryMetric(one.name)


def _grouping(wr: Any, one: FieldRef) -> Any:
    return wr.Config(one.name) if one.scope is Scope.CONFIG else one.name.capitalize()


def _run_field(ws: Any, one: FieldRef) -> Any:
    return ws.Config(one.name) if one.scope is Scope.CONFIG else ws.Metric(one.name.capitalize())
