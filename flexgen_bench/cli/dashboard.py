"""``python -m flexgen_bench dashboard``: the saved view and the report of the runs that ``tracker=wandb`` has sent."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from flexgen_bench.cli.ending import BAD_INPUT, FAILED
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.extras import how_to_install
from flexgen_bench.core.folders import path_argument
from flexgen_bench.trackers.dashboard import Dashboard, load_dashboard
from flexgen_bench.trackers.dashboard_text import instructions


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if the view is made or the steps are printed, 1 if saving it failed, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="flexgen-bench dashboard",
        description="Make the saved view and the report of the runs that tracker=wandb has sent. Without a login, "
        "print what to click, panel by panel.",
    )
    parser.add_argument("--project", default="flexgen-bench", help="as tracker.project (default: %(default)s)")
    parser.add_argument("--entity", default="", help="user or team; your own without it")
    parser.add_argument("--panels", type=path_argument, help="another definition than conf/dashboard.yaml")
    parser.add_argument(
        "--print", action="store_true", dest="only_print", help="print what to click, also with a login"
    )
    given = parser.parse_args(arguments)
    panels: Path | None = given.panels
    try:
        dashboard = load_dashboard(panels)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    why = "as asked" if given.only_print else _obstacle()
    if why:
        print(f"not saved: {why}. By hand:\n", file=sys.stderr)
        print(instructions(dashboard, given.project), end="")
        return 0
    try:
        for line in _save(dashboard, given.entity, given.project):
            print(line)
    except Exception as error:  # whatever the network, the server or the package raise
        print(f"error: it could not be saved ({type(error).__name__}: {error}). By hand:\n", file=sys.stderr)
        print(instructions(dashboard, given.project), end="")
        return FAILED
    return 0


def _obstacle() -> str:
    """Why nothing can be saved from here; "" if it can."""
    try:
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError as error:
        return how_to_install(error.name or "wandb-workspaces")
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    return "" if _has_login() else "there is no login here (wandb login)"


def _has_login() -> bool:
    """Whether wandb would find a key, in the environment or where ``wandb login`` puts it; asking wandb itself would
    prompt for one."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def _save(dashboard: Dashboard, entity: str, project: str) -> list[str]:
    """Save both; their addresses."""
    import wandb

    from flexgen_bench.trackers.wandb_dashboard import report, workspace

    owner = entity or wandb.Api().default_entity
    view = workspace(dashboard, owner, project).save()
    page = report(dashboard, owner, project)
    page.save()
    return [f"view:   {view.url}", f"report: {page.url}"]
