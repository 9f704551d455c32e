"""How far something long has come, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

# What is being done, how much of it is done, of how much: steps, tokens or bytes.
Progress = Callable[[str, int, int], None]


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody wants."""
