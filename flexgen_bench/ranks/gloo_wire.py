"""The wire between processes, of one machine or several: torch.distributed's gloo, point to point.

gloo matches what is sent and received by the pair of ranks and a tag, in order. A send completes when it has been
received, so a thread of its own waits for that and lets the tensors go.
"""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import AllreduceOptions, PrefixStore, ProcessGroupGloo, Store  # type: ignore[attr-defined]

from flexgen_bench.core.errors import RankLost
from flexgen_bench.engine.wire import has_room

CONNECT_S = 60
# gloo wants a limit of every wait. Who ends one is whoever watches the ranks.
_EVER = timedelta(days=365)
# How long a connection that is gone waits for the news of why.
_NEWS_S = 10.0
_LENGTH = 8  # bytes of an int64
_HIDDEN, _TOKENS, _OF_ABORT = 0, 1, 2**31 - 1


class _Sent(NamedTuple):
    """hidden_bytes: of hidden states, whose room this takes."""

    work: Any
    content: Tensor
    hidden_bytes: int


class GlooWire:
    """``Wire`` of one rank. Making it connects every pair of ranks, and needs all of them."""

    def __init__(self, store: Store, name: str, rank: int, ranks: int, interface: str | None = None) -> None:
        """store: where the ranks find each other; name: of this group in it. interface: the address to listen at; None:
        gloo's choice (GLOO_SOCKET_IFNAME, else what the host's name stands for)."""
        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=interface) if interface else gloo.create_default_device()]
        options._timeout = timedelta(seconds=CONNECT_S)
        self._group = gloo(PrefixStore(name, store), rank, ranks, options)
        self._rank, self._ranks = rank, ranks
        self._error: BaseException | None = None
        self._told = threading.Event()
        self._under_way: queue.SimpleQueue[_Sent | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._room: int | None = None
        self._hidden_bytes = 0  # under way
        threading.Thread(target=self._let_go, name="sent", daemon=True).start()

    def begin(self, room_bytes: int) -> None:
        with self._changed:
            self._room = room_bytes

    def send_hidden(self, number: int, rows: Tensor) -> None:
        # ``_let_go`` sees what is received in the order in which it was sent. That is soon enough: all of a pass have
        # room together, and whoever receives takes passes in order.
        with self._changed:
            self._changed.wait_for(lambda: self._error or has_room(self._hidden_bytes, rows.nbytes, self._room))
            if self._error is not None:
                raise self._error
            self._hidden_bytes += rows.nbytes
        self._send(_bytes_of(rows.contiguous()), self._rank + 1, number, _HIDDEN, rows.nbytes)

    def recv_hidden(self, number: int, into: Tensor) -> None:
        whole = into if into.is_contiguous() else torch.empty_like(into, memory_format=torch.contiguous_format)
        self._recv(_bytes_of(whole), self._rank - 1, number, _HIDDEN)
        if whole is not into:
            into.copy_(whole)

    def send_tokens(self, number: int, payload: bytes) -> None:
        length = torch.tensor([len(payload)], dtype=torch.int64)
        content = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        for rank in range(self._ranks):
            if rank != self._rank:
                self._send(_bytes_of(length), rank, number, _TOKENS)
                self._send(content, rank, number, _TOKENS)

    def recv_tokens(self, number: int) -> bytes:
        length = torch.empty(_LENGTH, dtype=torch.uint8)
        self._recv(length, self._ranks - 1, number, _TOKENS)
        content = torch.empty(int(length.view(torch.int64)), dtype=torch.uint8)
        self._recv(content, self._ranks - 1, number, _TOKENS)
        return content.numpy().tobytes()

    def all_reduce(self, number: int, rows: Tensor) -> None:
        """gloo adds up every element on one rank, and sends all others what it is: a sum has the same bits everywhere.
        The order of the ranks in it is gloo's."""
        options = AllreduceOptions()
        options.timeout = _EVER
        try:
            if self._error is None:
                self._group.allreduce([rows], options).wait(_EVER)
                return
        except RuntimeError as error:
            raise self._why(error, (self._rank + 1) % self._ranks) from error
        raise self._error

    def abort(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        self._told.set()
        # A wait that is too long for its limit closes every pair of a group, which ends all others' waits. gloo has no
        # other way to end them (``abort`` does not).
        other = (self._rank + 1) % self._ranks
        with suppress(RuntimeError):
            self._group.recv([torch.empty(1, dtype=torch.uint8)], other, _OF_ABORT).wait(timedelta(milliseconds=1))
        self._under_way.put(None)

    def _send(self, content: Tensor, to: int, number: int, kind: int, hidden_bytes: int = 0) -> None:
        try:
            work = self._group.send([content], to, 2 * number + kind)
        except RuntimeError as error:
            raise self._why(error, to) from error
        self._under_way.put(_Sent(work, content, hidden_bytes))

    def _recv(self, into: Tensor, source: int, number: int, kind: int) -> None:
        try:
            if self._error is None:
                self._group.recv([into], source, 2 * number + kind).wait(_EVER)
                return
        except RuntimeError as error:
            raise self._why(error, source) from error
        raise self._error

    def _why(self, error: RuntimeError, other: int) -> BaseException:
        """A connection has ended, and somebody knows why or is about to."""
        self._told.wait(_NEWS_S)
        return self._error or RankLost(other, f"its connection has ended ({str(error).splitlines()[0]})")

    def _let_go(self) -> None:
        while (sent := self._under_way.get()) is not None:
            with suppress(RuntimeError):  # a receiver that is gone: who waits for it tells
                sent.work.wait(_EVER)
            hidden_bytes = sent.hidden_bytes
            del sent  # before there is room for more
            with self._changed:
                self._hidden_bytes -= hidden_bytes
                self._changed.notify_all()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
