"""``flexgen-bench plan ARGS``: what ``flexgen-bench ARGS`` would do, without doing it (``dry_run=true``)."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_bench.cli import run


def main(arguments: Sequence[str]) -> int:
    """The exit status of the plan: 1 if something cannot fit."""
    return run.main([*arguments, "dry_run=true"])
