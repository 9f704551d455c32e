"""A JSON document as one line, for whoever splits lines."""

from __future__ import annotations

import json
from typing import Any

# Ends of lines in Unicode, which JSON takes as they are: Python's ``splitlines`` and clients built on it would cut an
# answer in two.
_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


def json_line(value: Any) -> bytes:
    """In UTF-8, without the end of the line. Half of a character (a surrogate) is escaped, so that it can be
    written."""
    return json.dumps(value, ensure_ascii=False).translate(_ENDS).encode(errors="backslashreplace")
