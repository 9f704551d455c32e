"""How far a search for a policy has come, for whoever waits for it.

The search reports a share of its work; who wants to know listens. Nothing is reported where nobody listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[float], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While this is entered, ``listener`` gets the share of the search that is done, 0 to 1: never less than before,
    whatever part of the search reports."""
    furthest = 0.0

    def told(share: float) -> None:
        nonlocal furthest
        furthest = max(furthest, min(1.0, share))
        listener(furthest)

    with _heard_by(told):
        yield


@contextmanager
def part(begin: float, end: float) -> Iterator[None]:
    """What is reported while this is entered is a share of the work between these two shares of what is around it."""
    outer = _listener.get()
    if outer is None:
        yield
        return

    def told(share: float) -> None:
        outer(begin + (end - begin) * min(1.0, max(0.0, share)))

    with _heard_by(told):
        yield


@contextmanager
def _heard_by(listener: Listener) -> Iterator[None]:
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report(share: float) -> None:
    """Tell the listener, if there is one."""
    listener = _listener.get()
    if listener is not None:
        listener(share)
