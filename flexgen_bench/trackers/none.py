"""The tracker that sends nothing anywhere: the default."""

from __future__ import annotations

from pathlib import Path

from flexgen_bench.core.record import Record


class NoTracker:
    """Records are files, and that is all."""

    def log_record(self, record: Record, path: Path) -> None:
        """Nothing to send."""

    def finish(self) -> None:
        """Nothing to send."""
