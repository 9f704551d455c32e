"""Work divided among machines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from flexgen_bench.core.errors import UserError


@dataclass(frozen=True)
class Shard:
    """The ``index``-th of ``count`` parts, from 1: every ``count``-th line or cell, so that parts are alike."""

    index: int = 1
    count: int = 1

    @staticmethod
    def parse(text: str, field: str = "--shard", sign: str = " ") -> Shard:
        """``2/8``; UserError naming ``field``. sign: what stands between the field and its value."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(field, text, "written i/n, with i from 1 to n", f"For example: {field}{sign}2/8")
        return Shard(int(match[1]), int(match[2]))

    def has(self, position: Any) -> Any:
        """Whether a position, or each of an array of them, is in this part."""
        return position % self.count == self.index - 1

    @property
    def words(self) -> str:
        return "" if self.count == 1 else f" in shard {self.index}/{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"
