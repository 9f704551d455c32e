"""What goes between ranks: hidden states to the next one, tokens from the last one to all others.

Each lane of a rank's network is a thread of its own, so a wire is used by several threads at once. Two ranks name the
same micro-batch by its number in the pass; of those with the same number the first that was sent is the first that is
received, since passes follow each other in the same order on every rank.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Wire(Protocol):
    """One rank's connection to all others. What is sent does not wait for who receives it while there is room on the
    way: two ranks may take the micro-batches of a pass in different orders."""

    def begin(self, room_bytes: int) -> None:
        """A job begins, of which so many bytes of hidden states may be under way from this rank: sent, and not yet
        received. Until then there is no limit."""

    def send_hidden(self, number: int, rows: Tensor) -> None:
        """To the next rank, the hidden states (R, hidden) of a micro-batch, in host memory. Waits until there is room
        for them beside what is under way (larger ones: until nothing is), and returns before they have been received.
        The wire may keep ``rows`` for as long as it takes: whoever hands them over does not touch them any more."""

    def recv_hidden(self, number: int, into: Tensor) -> None:
        """From the rank before: fill ``into`` (R, hidden), in host memory. Waits for them."""

    def send_tokens(self, number: int, payload: bytes) -> None:
        """To all other ranks: what was chosen for a micro-batch. Returns before they have received it."""

    def recv_tokens(self, number: int) -> bytes:
        """From the last rank. Waits for them."""

    def all_reduce(self, number: int, rows: Tensor) -> None:
        """Of ranks that share every layer: make ``rows`` (R, hidden), in host memory, the sum of those that all ranks
        have for a micro-batch, the same bits on every rank. Waits for the others; all ranks ask for the same sums in
        the same order."""

    def abort(self, error: BaseException) -> None:
        """Whoever waits on this rank, and whoever comes later, raises ``error``; of several the first. Returns at once,
        from any thread. The wire is of no more use."""


def has_room(under_way: int, more: int, room: int | None) -> bool:
    """Whether so many more bytes of hidden states may go beside those under way. room: None, no limit."""
    return room is None or under_way == 0 or under_way + more <= room
