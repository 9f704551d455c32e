"""What a tracker must offer: somewhere to send results that are already safe on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from flexgen_bench.core.record import Record


class Tracker(Protocol):
    """A sink for finished records. The record on disk stays the truth: a tracker that cannot do its
    work says so once on standard error and never raises, so that no run is lost or held up by it.
    """

    def log_record(self, record: Record, path: Path) -> None:
        """Send one finished record; ``path`` is where it has been written."""

    def finish(self) -> None:
        """Send what concerns the whole suite, such as its table. Called once, after the last record."""
