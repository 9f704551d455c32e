"""How ranks find each other: a store of torch.distributed, and rank 0's address in it."""

from __future__ import annotations

import hmac
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError

from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.ranks.control import Control
from flexgen_bench.ranks.torchrun import Torchrun

LOOPBACK = "127.0.0.1"
# Ranks of other hosts may still be fetching the model.
PATIENCE_S = 1800
_CONTROL = "control"
SECRET = "FLEXGEN_BENCH_SECRET"


@dataclass(frozen=True)
class Meeting:
    """A store that all ranks know. host, port: where it is; interface: where a rank listens for others (None: at all
    addresses)."""

    store: Store
    host: str
    port: int
    interface: str | None


def meet_here() -> Meeting:
    """A store in this process, for ranks of this machine; at a port that is free."""
    store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE_S))
    return Meeting(store, LOOPBACK, store.port, LOOPBACK)


def find(host: str, port: int, interface: str | None = LOOPBACK) -> Meeting:
    """The store that another process has. Raises CannotRun if there is none."""
    try:
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE_S))
    except (DistNetworkError, RuntimeError) as error:
        raise CannotRun(f"no rank 0 answers at {host}:{port} ({str(error).splitlines()[0]})") from error
    return Meeting(store, host, port, interface)


def meet_by_torchrun(torchrun: Torchrun) -> Meeting:
    """The store that torchrun has, or that rank 0 makes at the port named. UserError if that is in use."""
    interface = LOOPBACK if torchrun.here == torchrun.ranks else None
    if torchrun.agent_store or torchrun.rank > 0:
        found = find(torchrun.host, torchrun.port, interface)
    else:
        try:
            store: Store = TCPStore(
                torchrun.host,
                torchrun.port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=PATIENCE_S),
            )
        except (DistNetworkError, RuntimeError) as error:
            if "EADDRINUSE" not in str(error) and "already in use" not in str(error):
                raise CannotRun(
                    f"rank 0 cannot listen at port {torchrun.port}: {str(error).splitlines()[0]}"
                ) from error
            raise UserError(
                "MASTER_PORT",
                torchrun.port,
                "a port that is free",
                "Another process listens there; name another port on all ranks (torchrun: --master-port), or end it.",
            ) from error
        found = Meeting(store, torchrun.host, torchrun.port, interface)
    # What an earlier start has left there is not for this one.
    store = PrefixStore(f"flexgen-bench/{torchrun.restart}", found.store)
    return Meeting(store, found.host, found.port, interface)


class Door:
    """Where rank 0 lets the others in. Use ``close`` when all are there.

    is_open: ranks of torchrun find it by the meeting's store, which everybody can read who reaches its port; the key is
    made of a secret that all ranks have in ``SECRET``, and lies in the store where there is none. Otherwise only those
    come in who are told ``way``.
    """

    def __init__(self, meeting: Meeting, ranks: int, is_open: bool) -> None:
        if meeting.interface is not None:
            self._server = socket.create_server((meeting.interface, 0))
        else:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        self._awaited = set(range(1, ranks))
        port = int(self._server.getsockname()[1])
        secret = os.environ.get(SECRET, "") if is_open else ""
        self._key = _key_of(secret, port) if secret else os.urandom(32)
        self.way = f"{port} {self._key.hex()}"
        if is_open:
            meeting.store.set(_CONTROL, str(port) if secret else self.way)

    def next(self, seconds: float) -> Control | None:
        """Who has come; None if nobody has. Whoever does not have the key, or is no rank that is still awaited, is sent
        away."""
        self._server.settimeout(seconds)
        with suppress(TimeoutError, AuthenticationError, EOFError, OSError):
            connected, _ = self._server.accept()
            connected.setblocking(True)
            control = Control(connected, self._key)
            if control.rank in self._awaited:
                self._awaited.remove(control.rank)
                return control
            control.close()
        return None

    def close(self) -> None:
        self._server.close()


def go_in(meeting: Meeting, rank: int, way: str | None = None) -> Control:
    """The connection to rank 0. way: what its ``Door`` says; None: what is in the store. Raises CannotRun if rank 0 is
    not there, UserError if only one of both has a secret."""
    try:
        port, key = _found(meeting) if way is None else _parsed(way)
        connected = socket.create_connection((meeting.host, port), timeout=60)
        connected.settimeout(None)
        return Control(connected, key, rank)
    except (RuntimeError, OSError, EOFError, AuthenticationError) as error:
        raise CannotRun(f"rank {rank} cannot reach rank 0 at {meeting.host}: {error}") from error


def _found(meeting: Meeting) -> tuple[int, bytes]:
    way, secret = meeting.store.get(_CONTROL).decode(), os.environ.get(SECRET, "")
    has_key = " " in way
    if has_key is bool(secret):
        raise UserError(
            SECRET,
            "set here, not on rank 0" if secret else "set on rank 0, not here",
            "the same on all ranks",
            "Set it to the same text on every machine, or nowhere.",
        )
    return _parsed(way) if has_key else (int(way), _key_of(secret, int(way)))


def _parsed(way: str) -> tuple[int, bytes]:
    port, key = way.split(" ")
    return int(port), bytes.fromhex(key)


def _key_of(secret: str, port: int) -> bytes:
    """Of one port: who changes the port in the store cannot stand between two ranks and pass on what they say."""
    return hmac.digest(secret.encode(), b"flexgen-bench control %d" % port, "sha256")
