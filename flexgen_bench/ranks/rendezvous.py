"""How ranks find each other: a store of torch.distributed, and rank 0's address in it."""

from __future__ import annotations

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
    """Where rank 0 lets the others in. Use ``close`` when all are there."""

    def __init__(self, meeting: Meeting) -> None:
        self._key = os.urandom(32)
        if meeting.interface is not None:
            self._server = socket.create_server((meeting.interface, 0))
        else:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        meeting.store.set(_CONTROL, f"{self._server.getsockname()[1]} {self._key.hex()}")

    def next(self, seconds: float) -> tuple[int, Control] | None:
        """Who has come, with its rank; None if nobody has. Whoever does not have the key is sent away."""
        self._server.settimeout(seconds)
        with suppress(TimeoutError, AuthenticationError, EOFError, OSError):
            connected, _ = self._server.accept()
            connected.setblocking(True)
            control = Control(connected, self._key, asks=True)
            return int(control.recv()), control
        return None

    def close(self) -> None:
        self._server.close()


def go_in(meeting: Meeting, rank: int) -> Control:
    """The connection to rank 0. Raises CannotRun if that is not there."""
    try:
        port, key = meeting.store.get(_CONTROL).decode().split(" ")
        connected = socket.create_connection((meeting.host, int(port)), timeout=60)
        connected.settimeout(None)
        control = Control(connected, bytes.fromhex(key), asks=False)
        control.send(rank)
    except (RuntimeError, OSError, EOFError, AuthenticationError) as error:
        raise CannotRun(f"rank {rank} cannot reach rank 0 at {meeting.host}: {error}") from error
    return control
