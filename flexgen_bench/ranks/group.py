"""All ranks as rank 0 sees them: asked together, watched together, ended together."""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, TypeVar

from flexgen_bench.core.closing import Closing
from flexgen_bench.core.errors import CannotRun, RankLost, StoreError
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.ranks.children import Children
from flexgen_bench.ranks.commands import Abandon, Connect, End, Failed, Pack, Reply, Setup, ended_before
from flexgen_bench.ranks.control import SILENCE_S, Control
from flexgen_bench.ranks.division import Division
from flexgen_bench.ranks.gloo_wire import GlooWire
from flexgen_bench.ranks.identity import Hello, check_alike, hello, weights_digest
from flexgen_bench.ranks.rendezvous import Door, Meeting, meet_by_torchrun, meet_here

_T = TypeVar("_T")
_POLL_S = 0.2
_END_S = 10.0
_COME_S = 1800.0
_met: list[int] = []  # generations of ranks of torchrun that this process has met


class RankGroup(Closing):
    """The ranks of one model, ready to be asked. ``wire``: this process' own.

    A rank that is lost, and a job that fails on any of them, ends them all (``error`` says of what). on_this_host:
    those that have this process' clock. Raises UserError for ranks that differ from this one, CannotRun where they do
    not come.
    """

    def __init__(self, division: Division, setup: Setup) -> None:
        self.ranks, self.error = division.ranks, None
        self._division, self._setup = division, setup
        self._controls: dict[int, Control] = {}
        self._replies: dict[int, deque[Reply | Failed]] = {}
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._in_job = self._closed = False
        self.is_packed = False
        self._children: Children | None = None
        self.wire: GlooWire | None = None
        if division.torchrun is None:
            self._meeting = meet_here()
        elif _met:
            raise ended_before()
        else:
            self._meeting = meet_by_torchrun(division.torchrun)
            _met.append(0)
        try:
            self._gather(setup)
            threading.Thread(target=self._watch, name="ranks", daemon=True).start()
            self._make_wire(self._meeting)
        except BaseException as error:
            self.end(error)
            raise
        # A program that never closes them ends well all the same: those of torchrun would take it for a failure.
        atexit.register(self.close)

    error: BaseException | None
    on_this_host: frozenset[int]

    def ask(self, command: Any, own: Callable[[], None] = lambda: None) -> list[Any]:
        """What all other ranks reply, in their order, while this one does ``own``. Raises the first error of any, when
        all have replied."""
        try:
            self._tell(command)
            try:
                own()
            except Exception:
                with suppress(Exception):
                    self._collect()
                raise
            return self._collect()
        except Exception:
            raise
        except BaseException as error:  # an interrupt does not wait, and leaves replies that nobody has taken
            self.end(error)
            raise

    def run(self, command: Any, own: Callable[[], _T]) -> tuple[_T, list[Any]]:
        """A job of all ranks, ``own`` being this one's part of it. Whatever fails ends all ranks."""
        self._in_job = True
        try:
            self._tell(command)
            mine = own()
            return mine, self._collect()
        except BaseException as error:
            self.end(error)
            assert self.error is not None
            if self.error is error:
                raise
            raise self.error from error
        finally:
            self._in_job = False

    def pack(self, weights: PackedWeights) -> None:
        """Have all ranks open their packed weights. StoreError if they are not of the same checkpoint as these."""
        own = weights_digest(weights)
        others = [rank for rank, digest in enumerate(self.ask(Pack()), start=1) if digest != own]
        if others:
            ranks = ", ".join(map(str, others))
            raise StoreError(
                f"The weights of rank {ranks} are not those of rank 0, although the model's shape is the same. "
                "Give all machines the same checkpoint."
            )
        self.is_packed = True

    def close(self) -> None:
        """Tell the others that it is over, and wait until those that were started here have ended."""
        if self._closed:
            return
        self._closed = True
        if self.error is None:
            for control in self._controls.values():
                try:
                    control.send(End())
                except OSError:
                    continue
            if self._children is not None:
                self._children.leave()
            self.end(CannotRun("the ranks have been closed"))

    def end(self, error: BaseException) -> None:
        """End all ranks, and every wait for them, with this error; the first one is the one to tell. When this returns,
        no process that was started here is left."""
        with self._changed:
            is_first = self.error is None
            if is_first:
                self.error = error
                self._changed.notify_all()
        atexit.unregister(self.close)
        if not is_first:
            self._over.wait(_END_S)
            return
        if self.wire is not None:
            self.wire.abort(error)
        if self._children is not None:
            self._children.kill()
        for control in self._controls.values():
            if self._children is None and not self._closed:
                with suppress(OSError):
                    control.send(Abandon(f"{type(error).__name__}: {error}"))
            control.close()
        self._over.set()

    def _gather(self, setup: Setup) -> None:
        """Until all have come and said who they are."""
        meeting, division = self._meeting, self._division
        door = Door(meeting, self.ranks, is_open=division.torchrun is not None)
        try:
            if division.torchrun is None:
                self._children = Children(meeting, self.ranks, setup.threads, door.way)
            deadline = time.monotonic() + _COME_S
            while len(self._controls) < self.ranks - 1:
                if time.monotonic() > deadline:
                    missing = [r for r in range(1, self.ranks) if r not in self._controls]
                    raise CannotRun(f"ranks {missing} have not come within {_COME_S:.0f} s")
                self._check_children()
                came = door.next(_POLL_S)
                if came is not None:
                    self._controls[came.rank] = came
        finally:
            door.close()
        hellos = {rank: self._hello(rank, control, setup) for rank, control in self._controls.items()}
        own = hello(0, setup.checkpoint, setup.dtype, setup.compression, setup.threads)
        check_alike(own, hellos, setup.shared)
        self.on_this_host = frozenset(rank for rank, one in hellos.items() if one.host == own.host)
        self._replies = {rank: deque() for rank in sorted(self._controls)}

    def _check_children(self) -> None:
        ended = None if self._children is None else self._children.has_ended()
        if ended is not None:
            raise self._lost(ended)

    def _hello(self, rank: int, control: Control, setup: Setup) -> Hello:
        try:
            if self._children is not None:  # others know what they are
                control.send(setup)
            said: Hello = control.recv()
        except (EOFError, OSError) as error:
            raise self._lost(rank, error) from error
        return said

    def _make_wire(self, meeting: Meeting) -> None:
        """In a thread of its own: a rank that is lost meanwhile ends the wait here."""
        made: list[GlooWire | BaseException] = []

        def make() -> None:
            try:
                one: GlooWire | BaseException = GlooWire(meeting.store, "wire", 0, self.ranks, meeting.interface)
            except BaseException as error:
                one = error
            with self._changed:
                made.append(one)
                self._changed.notify_all()

        self._tell(Connect("wire"))
        threading.Thread(target=make, name="wire", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: made or self.error)
        self._check()
        if isinstance(made[0], BaseException):
            raise CannotRun(f"the ranks cannot reach each other: {made[0]}") from made[0]
        self.wire = made[0]
        self._collect()

    def _tell(self, command: Any) -> None:
        for rank, control in self._controls.items():
            self._check()
            try:
                control.send(command)
            except OSError as error:  # its end is seen by who watches, which knows more
                with self._changed:
                    self._changed.wait_for(lambda: self.error, timeout=SILENCE_S)
                self._check()
                lost = self._lost(rank)
                self.end(lost)  # ranks before this one have been told
                raise lost from error

    def _check(self) -> None:
        """Raise what has ended the ranks."""
        if self.error is not None:
            self._over.wait(_END_S)
            raise self.error

    def _collect(self) -> list[Any]:
        with self._changed:
            self._changed.wait_for(lambda: self.error or all(self._replies.values()))
            replies = [] if self.error else [waiting.popleft() for waiting in self._replies.values()]
        self._check()
        for reply in replies:
            if isinstance(reply, Failed):
                raise reply.error()
        return [reply.value for reply in replies if isinstance(reply, Reply)]

    def _watch(self) -> None:
        """Take replies, and see who has ended."""
        controls = {control.fileno(): (rank, control) for rank, control in self._controls.items()}
        while self.error is None:
            for ready in wait(list(controls), timeout=_POLL_S):
                rank, control = controls[ready]  # type: ignore[index]
                try:
                    reply = control.recv()
                except Exception as error:
                    if not self._closed:
                        self.end(self._lost(rank, error))
                    return
                if isinstance(reply, Failed) and self._in_job:
                    self.end(reply.error())
                    return
                with self._changed:
                    self._replies[rank].append(reply)
                    self._changed.notify_all()

    def _lost(self, rank: int, error: BaseException | None = None) -> RankLost:
        why = "" if self._children is None else self._children.ending(rank)
        if not why and isinstance(error, TimeoutError):
            why = f"no sign of life for {SILENCE_S} s"
        return RankLost(rank, why or "its connection has ended")
