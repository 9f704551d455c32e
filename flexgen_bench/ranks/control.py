"""The connection between rank 0 and each other rank: commands one way, replies the other, and the news of an end.

A process that ends closes it, which the other side sees at once. A host or a network that is gone says nothing: the
kernel asks it every second, and gives the connection up after ``SILENCE_S``. A process that is only slow is not lost.
"""

from __future__ import annotations

import copyreg
import pickle
import socket
import struct
import threading
from io import BytesIO
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from types import MappingProxyType
from typing import Any

SILENCE_S = 5
_GREETING_S = 10
_LONGEST_NUMBER = 8


def _frozen(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(mapping)


def _reduced(mapping: Any) -> tuple[Any, ...]:
    return _frozen, (dict(mapping),)


def _written(message: Any) -> memoryview:
    """Tensors travel as what they hold (multiprocessing's own pickler hands over memory, which other hosts have not),
    and configuration that cannot be changed does, too."""
    written = BytesIO()
    pickler = pickle.Pickler(written, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = {**copyreg.dispatch_table, MappingProxyType: _reduced}
    pickler.dump(message)
    return written.getbuffer()


class Control:
    """One end. Messages are pickled: whoever has the key is trusted. rank: of the side that is not rank 0."""

    def __init__(self, connected: socket.socket, key: bytes, rank: int | None = None) -> None:
        """rank: of this side, which shows the key and says its number; None: this is rank 0, which asks for both first.
        Raises AuthenticationError, EOFError or OSError for whoever does not have the key, or says nothing."""
        _keep_alive(connected)
        _limit_silence(connected, _GREETING_S)
        self._connection = Connection(connected.detach())
        self._sending = threading.Lock()
        try:
            steps = (deliver_challenge, answer_challenge) if rank is None else (answer_challenge, deliver_challenge)
            for step in steps:
                step(self._connection, key)
            if rank is None:
                self.rank = _number(self._connection.recv_bytes(_LONGEST_NUMBER))
            else:
                self.rank = rank
                self._connection.send_bytes(b"%d" % rank)
            with socket.fromfd(self.fileno(), socket.AF_INET, socket.SOCK_STREAM) as same:
                _limit_silence(same, 0)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """For ``multiprocessing.connection.wait``."""
        return self._connection.fileno()

    def send(self, message: Any) -> None:
        """Raises OSError if the other side is gone."""
        written = _written(message)
        with self._sending:
            self._connection.send_bytes(written)

    def recv(self) -> Any:
        """Waits. Raises EOFError or OSError if the other side is gone."""
        return pickle.loads(self._connection.recv_bytes())

    def close(self) -> None:
        self._connection.close()


def _number(said: bytes) -> int:
    if not said.isdigit():
        raise AuthenticationError(f"{said!r} is no rank")
    return int(said)


def _limit_silence(connected: socket.socket, seconds: int) -> None:
    """How long a read waits; 0: for ever."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))


def _keep_alive(connected: socket.socket) -> None:
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENCE_S - 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)
