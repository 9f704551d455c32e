"""What goes between ranks: hidden states to the next one, tokens from the last one to all others.

Each lane of a rank's network is a thread of its own, so a wire is used by several threads at once. Two ranks name the
same micro-batch by its number in the pass; of those with the same number the first that was sent is the first that is
received, since passes follow each other in the same order on every rank.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Wire(Protocol):
    """One rank's connection to all others. Nothing that is sent waits for who receives it: two ranks may take the
    micro-batches of a pass in different orders."""

    def send_hidden(self, number: int, rows: Tensor) -> None:
        """To the next rank, the hidden states (R, hidden) of a micro-batch, in host memory. Returns before they have
        been received. The wire may keep ``rows`` for as long as it takes: whoever hands them over does not touch them
        any more."""

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
