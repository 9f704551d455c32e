"""What the API says of a batch."""

from __future__ import annotations

import re
import time
from typing import Any

from flexgen_bench.requests.errors import RequestError
from flexgen_bench.serve.files import Document

UNDER_WAY = ("validating", "in_progress", "finalizing", "cancelling")
_MOMENTS = (
    *("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at"),
)
_WINDOW = re.compile(r"([1-9]\d{0,4})([hd])")
_SECONDS = {"h": 3600, "d": 86400}


def new_batch(name: str, file_id: str, endpoint: str, window: str, metadata: Any) -> Document:
    """One that waits for its turn. window: hours or days (24h, 7d), after which what is not answered yet is given up.
    RequestError for another one."""
    match = _WINDOW.fullmatch(window)
    if match is None:
        message = f"completion_window = {window!r}: must be hours or days, such as '24h' or '7d'."
        raise RequestError(message, "completion_window", "invalid_value")
    now = int(time.time())
    return {
        "id": name,
        "object": "batch",
        "endpoint": endpoint,
        "errors": None,
        "input_file_id": file_id,
        "completion_window": window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": now + int(match[1]) * _SECONDS[match[2]],
        **dict.fromkeys(_MOMENTS),
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": metadata,
    }
