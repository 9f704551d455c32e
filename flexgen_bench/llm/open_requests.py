"""Requests that come while others run: what servers, chats and streams of answers stand on."""

from __future__ import annotations

from types import TracebackType

from flexgen_bench.core.errors import UserError
from flexgen_bench.engine.generation import Running
from flexgen_bench.engine.open_job import OpenJob
from flexgen_bench.engine.outputs import GenerationRequest, Piece
from flexgen_bench.llm.sequences import Sequences
from flexgen_bench.schedule.sequence_groups import Capacity


class OpenRequests:
    """``add`` and ``cancel`` at any time, from any thread; one thread calls ``step``, which runs a pass and gives what
    it has added to each answer. ``LLM.open`` makes one; use as a context manager, or ``close``.

    Until it is closed its model does nothing else.
    """

    def __init__(self, job: OpenJob, sequences: Sequences) -> None:
        self._job, self._sequences = job, sequences
        self._running: dict[int, Running] = {}

    @property
    def capacity(self) -> Capacity:
        return self._job.capacity

    @property
    def kv_slots_in_use(self) -> int:
        """Between passes: how many hold a sequence."""
        return self._job.kv_slots_in_use

    @property
    def is_idle(self) -> bool:
        """Whether no request runs and none waits."""
        return self._job.is_idle

    def start(self, request: GenerationRequest, field: str = "prompt") -> Running:
        """A sequence that ``add`` takes; UserError for a prompt that cannot be used, now and not when it is added."""
        return self._sequences.start(request, field)

    def add(self, sequence: Running) -> int:
        """Queue a sequence; its number. UserError if it is beyond the capacity, or this is closed."""
        if sequence.text is None:
            raise UserError("sequence", "without text", "made by start")
        number = self._job.add(sequence)
        self._running[number] = sequence
        return number

    def cancel(self, number: int) -> None:
        """End a request before its time: nothing more comes of it, and its KV space is free with the next ``step``."""
        self._running.pop(number, None)
        self._job.cancel(number)

    def step(self) -> list[tuple[int, Piece]]:
        """Run a pass with whoever is there; for each request that got tokens, its number and what is new.

        After an error this is closed: no request of it goes on.
        """
        tokens: dict[int, list[int]] = {}
        for new in self._job.step():
            tokens.setdefault(new.number, []).append(new.token)
        pieces = []
        for number, ids in tokens.items():
            sequence = self._running.get(number)
            if sequence is not None:  # else cancelled meanwhile
                pieces.append((number, _piece(sequence, ids)))
                if sequence.finish_reason:
                    self._running.pop(number, None)
        return pieces

    def close(self) -> None:
        """Release the memory of the job; requests that have not ended stay as they are."""
        self._job.close()

    def __enter__(self) -> OpenRequests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._job.__exit__(kind, error, trace)


def _piece(sequence: Running, ids: list[int]) -> Piece:
    """What is new. Text that may yet become part of a stop string or of another character is held back until it is
    sure."""
    text = sequence.text
    assert text is not None
    text.follow(sequence.new)
    if sequence.finish_reason:
        text.finish()
    return Piece(text.take_new(), tuple(ids), sequence.finish_reason, tuple(sequence.logprobs[-len(ids) :]))
