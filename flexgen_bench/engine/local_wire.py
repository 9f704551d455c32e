"""Ranks that are threads of one process: what goes between them lies in memory until it is fetched."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from typing import Any

from torch import Tensor

from flexgen_bench.engine.wire import has_room

_Address = tuple[int, str, int]  # rank that receives it, kind, number of the micro-batch


class RankFailed(RuntimeError):
    """Another rank of the job has failed; its error is the cause of this one."""


class _Mail:
    """Everything that is under way between the ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._posted: defaultdict[_Address, deque[Any]] = defaultdict(deque)
        self._changed = threading.Condition()
        self._failed: tuple[int, BaseException] | None = None
        self._room: dict[int, int] = {}  # bytes, by the rank that sends
        self._under_way: defaultdict[int, int] = defaultdict(int)

    def begin(self, rank: int, room_bytes: int) -> None:
        with self._changed:
            self._room[rank] = room_bytes

    def post_hidden(self, rank: int, number: int, rows: Tensor) -> None:
        """To the next rank, once there is room."""
        with self._changed:
            room = self._room.get(rank)
            self._changed.wait_for(lambda: self._failed or has_room(self._under_way[rank], rows.nbytes, room))
            self._check(rank)
            self._under_way[rank] += rows.nbytes
        self.post(rank + 1, "hidden", number, rows)

    def fetch_hidden(self, rank: int, number: int, into: Tensor) -> None:
        rows: Tensor = self.fetch(rank, "hidden", number)
        into.copy_(rows)
        with self._changed:
            self._under_way[rank - 1] -= rows.nbytes
            self._changed.notify_all()

    def post(self, to: int, kind: str, number: int, what: Tensor | bytes) -> None:
        with self._changed:
            self._posted[to, kind, number].append(what)
            self._changed.notify_all()

    def fetch(self, rank: int, kind: str, number: int) -> Any:
        with self._changed:
            posted = self._posted[rank, kind, number]
            self._changed.wait_for(lambda: posted or self._failed)
            self._check(rank)
            return posted.popleft()

    def _check(self, rank: int) -> None:
        """Raise what has failed, as ``rank`` sees it."""
        if self._failed is None:
            return
        failed, error = self._failed
        if failed == rank:
            raise error
        raise RankFailed(f"rank {failed} has failed: {type(error).__name__}: {error}") from error

    def fail(self, rank: int, error: BaseException) -> None:
        with self._changed:
            self._failed = self._failed or (rank, error)
            self._changed.notify_all()


class LocalWire:
    """``Wire`` of one rank. A rank that fails ends all others with RankFailed."""

    def __init__(self, rank: int, mail: _Mail) -> None:
        self._rank, self._mail = rank, mail

    def begin(self, room_bytes: int) -> None:
        self._mail.begin(self._rank, room_bytes)

    def send_hidden(self, number: int, rows: Tensor) -> None:
        self._mail.post_hidden(self._rank, number, rows)

    def recv_hidden(self, number: int, into: Tensor) -> None:
        self._mail.fetch_hidden(self._rank, number, into)

    def send_tokens(self, number: int, payload: bytes) -> None:
        for rank in range(self._mail.ranks):
            if rank != self._rank:
                self._mail.post(rank, "tokens", number, payload)

    def recv_tokens(self, number: int) -> bytes:
        payload: bytes = self._mail.fetch(self._rank, "tokens", number)
        return payload

    def all_reduce(self, number: int, rows: Tensor) -> None:
        others = [rank for rank in range(self._mail.ranks) if rank != self._rank]
        for rank in others:
            self._mail.post(rank, f"part of {self._rank}", number, rows.clone())
        parts = {rank: self._mail.fetch(self._rank, f"part of {rank}", number) for rank in others}
        parts[self._rank] = rows.clone()
        rows.zero_()
        for rank in sorted(parts):  # floating-point sums depend on their order
            rows += parts[rank]

    def abort(self, error: BaseException) -> None:
        self._mail.fail(self._rank, error)


def local_wires(ranks: int) -> list[LocalWire]:
    """One for each rank, in their order, connected with each other."""
    mail = _Mail(ranks)
    return [LocalWire(rank, mail) for rank in range(ranks)]
