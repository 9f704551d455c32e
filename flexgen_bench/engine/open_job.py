"""A job that takes requests while it runs: for servers, chats and files that are read as they go."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from threading import Lock
from types import TracebackType

from flexgen_bench.core.errors import UserError
from flexgen_bench.engine.generation import Running
from flexgen_bench.engine.job_run import JobResult, JobRun
from flexgen_bench.schedule.admission import OpenAdmission
from flexgen_bench.schedule.sequence_group import SequenceGroup
from flexgen_bench.schedule.sequence_groups import Capacity, Request

CANCELLED = "cancelled"


@dataclass(frozen=True)
class NewToken:
    """A token that a pass has produced. number: of its sequence, as ``add`` gave it; finish_reason: empty if the
    sequence goes on."""

    number: int
    token: int
    finish_reason: str


class OpenJob:
    """``add`` requests and ``cancel`` them at any time, from any thread; one thread calls ``step``, which runs a pass,
    as long as it wants.

    A request starts with the next pass if a place is free, else as soon as one is; first come, first served. Its tokens
    are those of a run of its own. result: its plan and the seconds of its passes so far; when it is closed, also what
    its lanes did. A sequence that ends gives its KV space back at once. ``Engine.open`` makes one; use as a context
    manager, or ``close``.
    """

    def __init__(
        self,
        capacity: Capacity,
        admission: OpenAdmission,
        sequences: dict[int, Running],
        run: JobRun,
        held: ExitStack,
        on_close: Callable[[], None],
        result: JobResult,
    ) -> None:
        self.capacity, self.result = capacity, result
        self._admission, self._sequences, self._run = admission, sequences, run
        self._held, self._on_close = held, on_close
        self._lock = Lock()  # of what other threads may touch: the two lists, and the numbers
        self._added: list[tuple[int, Running]] = []
        self._cancelled: set[int] = set()
        self._live: set[int] = set()  # sequences that have not ended; some that have, a pass may still be reading
        self._count = 0
        self._tokens: deque[NewToken] = deque()
        self._closed = False

    def add(self, sequence: Running) -> int:
        """Queue a sequence; its number. UserError if it is larger than the capacity, or the job is closed."""
        self._check_open()
        request = self._request(sequence)
        if not self.capacity.holds(request):
            raise UserError(
                "request",
                f"{request.prompt_len} prompt tokens, {request.gen_len} new ones",
                f"at most {self.capacity.prompt_len} and {self.capacity.gen_len}, for which this job was planned",
                "Shorten the prompt, lower max_tokens, or open the job with a larger capacity.",
            )
        with self._lock:
            number = self._count
            self._count += 1
            sequence.on_token = partial(self._note, number, sequence)
            self._added.append((number, sequence))
        return number

    def cancel(self, number: int) -> None:
        """End a sequence before its time, with the next ``step``; of one that has ended, nothing happens."""
        with self._lock:
            self._cancelled.add(number)

    @property
    def kv_slots_in_use(self) -> int:
        """Between passes: how many hold a sequence."""
        return self._run.kv_slots_in_use

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do: no sequence runs and none waits."""
        with self._lock:
            return not self._added and not self._live

    def step(self) -> list[NewToken]:
        """Run one pass with whoever is there; the tokens it has produced, none if there was nothing to do. Where passes
        follow each other without a gap (``JobRun``), the next one has begun when this returns.

        After an error the job is closed: no sequence of it goes on.
        """
        self._check_open()
        try:
            self._take_requests()
            if self._live:
                self._run.step()
        except BaseException:
            self._end(*sys.exc_info())
            raise
        self._forget_ended()
        tokens = list(self._tokens)
        self._tokens.clear()
        return tokens

    def close(self) -> None:
        """Release the job's memory; sequences that have not ended stay as they are. A second time does nothing."""
        self._end(None, None, None)

    def __enter__(self) -> OpenJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(kind, error, trace)

    def _take_requests(self) -> None:
        """What other threads have asked for since the last pass."""
        with self._lock:
            added, self._added = self._added, []
            self._live.update(number for number, _ in added)
            cancelled, self._cancelled = self._cancelled, set()
        for number, sequence in added:
            self._sequences[number] = sequence
            self._admission.add(number, self._request(sequence))
        gone = cancelled & self._live
        running = {number for number in gone if not self._admission.cancel(number)}
        if running:
            self._run.remove(lambda group: _of(group, running))
        for number in gone:
            self._sequences[number].finish_reason = CANCELLED
        self._forget_ended()

    def _request(self, sequence: Running) -> Request:
        prefix = sequence.prefix if self.capacity.keeps else None
        kept = prefix.in_common(sequence.prompt) if prefix is not None else 0
        return Request(len(sequence.prompt), sequence.params.max_tokens, kept=kept)

    def _forget_ended(self) -> None:
        ended = [number for number, sequence in self._sequences.items() if sequence.finish_reason]
        with self._lock:
            self._live.difference_update(ended)
        used = self._run.in_use()
        for number in ended:
            if number not in used:
                del self._sequences[number]

    def _note(self, number: int, sequence: Running, token: int) -> None:
        """Told by the thread that samples, or by the one that takes steps."""
        self._tokens.append(NewToken(number, token, sequence.finish_reason))

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("job", "closed", "open", "Open a new one.")

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._closed:
            self._closed = True
            self._on_close()
            self._held.__exit__(kind, error, trace)


def _of(group: SequenceGroup, numbers: set[int]) -> list[int]:
    return [i for i in group.sequences if i in numbers]
