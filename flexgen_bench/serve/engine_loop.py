"""The thread that computes: requests join its open job between passes, and what passes add goes back to who asked."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.engine.generation import Running
from flexgen_bench.engine.outputs import Output, Piece
from flexgen_bench.llm.llm import LLM
from flexgen_bench.llm.open_requests import OpenRequests
from flexgen_bench.llm.sequences import output_of
from flexgen_bench.requests.answers import PromptLogprobs
from flexgen_bench.requests.asked import ParsedRequest
from flexgen_bench.requests.errors import SERVER_ERROR, UNAVAILABLE, RequestError, of_user_error
from flexgen_bench.requests.prompt_logprobs import prompt_logprobs
from flexgen_bench.schedule.sequence_groups import Capacity
from flexgen_bench.serve.kept_store import KeptStore

_log = logging.getLogger("flexgen_bench.serve")


@dataclass(frozen=True)
class Answered:
    """All of a request is there. kept_tokens: of its prompts, those that were not computed again."""

    outputs: list[Output]
    of_prompts: list[PromptLogprobs]
    kept_tokens: int = 0


# A part of one of a request's choices, all of the request, or why there is nothing (more).
Event = tuple[int, Piece] | Answered | RequestError


@dataclass(eq=False)
class Ticket:
    """A request under way. tell: given its events by the computing thread; must not block."""

    parsed: ParsedRequest
    tell: Callable[[Event], object]
    outputs: dict[int, Output] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    kept_tokens: int = 0
    gone: bool = False

    @property
    def sequences(self) -> int:
        return len(self.parsed.sequences)


class EngineLoop:
    """``submit`` and ``cancel`` from any thread. Use as a context manager: leaving it ends what runs.

    Log-probabilities of prompts need a job of their own: while a request waits for them nobody else starts, and when
    those that run have ended, all that wait are computed together.
    """

    def __init__(self, llm: LLM, capacity: Capacity, on_pass: Callable[[], object] = lambda: None) -> None:
        self._llm, self._capacity, self._on_pass = llm, capacity, on_pass
        self._change = threading.Condition()
        self._arrived: deque[Ticket] = deque()
        self._cancelled: list[Ticket] = []
        self._stopping = False
        # Of the computing thread alone.
        self._job: OpenRequests | None = None
        self._running: dict[int, tuple[Ticket, int]] = {}  # by number in the job: whose, and which choice
        self._sequences: dict[int, Running] = {}
        self._kept = KeptStore(capacity.kept_tokens)
        self._to_score: list[Ticket] = []
        self.in_system = 0  # sequences that run or wait
        self._thread = threading.Thread(target=self._run, name="engine loop", daemon=True)

    @property
    def kv_slots_in_use(self) -> int:
        job = self._job
        return 0 if job is None else job.kv_slots_in_use

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, parsed: ParsedRequest, tell: Callable[[Event], object]) -> Ticket:
        """Queue a request whose prompts and answers are within the capacity."""
        ticket = Ticket(parsed, tell)
        with self._change:
            if self._stopping:
                raise RequestError("The server is going down.", None, "shutting_down", UNAVAILABLE)
            self._arrived.append(ticket)
            self.in_system += ticket.sequences
            self._change.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: its KV space is free with the next pass. Of one that has ended, nothing."""
        with self._change:
            self._cancelled.append(ticket)
            self._change.notify()

    def __enter__(self) -> EngineLoop:
        self._open()  # what does not fit is refused now
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._change:
            self._stopping = True
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                try:
                    self._take_changes()
                    self._start()
                    self._step()
                    self._score()
                except Exception as error:
                    _log.exception("a pass failed")
                    self._fail(error)
        finally:
            if self._job is not None:
                self._job.close()

    def _wait(self) -> bool:
        """Until there is something to do; False if nothing is to be done any more."""
        with self._change:
            while not (self._stopping or self._arrived or self._cancelled or self._running or self._to_score):
                self._change.wait()
            return not self._stopping

    def _take_changes(self) -> None:
        with self._change:
            cancelled, self._cancelled = self._cancelled, []
        for ticket in cancelled:
            if not ticket.gone:
                self._leave(ticket)

    def _start(self) -> None:
        """What has arrived joins the job as places become free."""
        while self._arrived and not self._to_score and len(self._running) < self._capacity.sequences:
            with self._change:
                ticket = self._arrived.popleft()
            if ticket.gone:
                continue
            if not ticket.parsed.generates:
                if ticket.parsed.scores_prompt:
                    self._to_score.append(ticket)
                else:
                    self._finish(ticket, [], [])
                continue
            try:
                job = self._open()
                started = [job.start(request) for request in ticket.parsed.sequences]
                for choice, sequence in enumerate(started):
                    number = job.add(sequence)
                    ticket.numbers.append(number)
                    self._running[number] = (ticket, choice)
                    self._sequences[number] = sequence
                    self._go_on(ticket, choice, sequence, job)
            except Exception as error:
                self._leave(ticket)
                if isinstance(error, UserError) and not isinstance(error, DoesNotFit):
                    ticket.tell(of_user_error(error))
                else:
                    _log.exception("a request could not start")
                    ticket.tell(_failed("This could not be started", error))

    def _step(self) -> None:
        if not self._running or self._job is None:
            return
        pieces = self._job.step()
        self._on_pass()
        for number, piece in pieces:
            ticket, choice = self._running[number]
            ticket.tell((choice, piece))
            sequence = self._sequences[number]
            self._has_begun(sequence)
            if not piece.finish_reason:
                continue
            del self._running[number], self._sequences[number]
            self._release(sequence)
            ticket.outputs[choice] = output_of(ticket.parsed.sequences[choice].prompt, sequence)
            if len(ticket.outputs) == ticket.sequences:
                outputs = [ticket.outputs[i] for i in range(ticket.sequences)]
                if ticket.parsed.scores_prompt:
                    self._to_score.append(ticket)
                else:
                    self._finish(ticket, outputs, [])

    def _go_on(self, ticket: Ticket, choice: int, sequence: Running, job: OpenRequests) -> None:
        """From what an earlier request has computed, as far as that goes; and leave the same to later ones."""
        if not job.capacity.keeps:
            return
        is_first = choice % (ticket.sequences // ticket.parsed.num_prompts) == 0
        sequence.prefix = self._kept.find(sequence.prompt)
        if is_first and sequence.prefix is not None:
            ticket.kept_tokens += sequence.prefix.in_common(sequence.prompt)
        # Of several answers to one prompt the first one's is enough.
        sequence.keep = is_first and self._kept.reserve(_most_tokens(sequence))

    def _has_begun(self, sequence: Running) -> None:
        """Its prompt is computed: what was kept of it has been copied."""
        if sequence.prefix is not None:
            self._kept.copied(sequence.prefix)
            sequence.prefix = None

    def _release(self, sequence: Running) -> None:
        """A sequence leaves."""
        self._has_begun(sequence)
        if sequence.keep:
            self._kept.release(_most_tokens(sequence), sequence.kept)
        sequence.keep, sequence.kept = False, None

    def _score(self) -> None:
        if not self._to_score or self._running:
            return
        if self._job is not None:
            self._job.close()
            self._job = None
            self._kept.clear()  # their memory was planned with the job
        # Others that wait only for this are computed with them.
        with self._change:
            more = [t for t in self._arrived if t.parsed.scores_prompt and not t.parsed.generates and not t.gone]
            for ticket in more:
                self._arrived.remove(ticket)
        together = self._to_score = self._to_score + more
        prompts = [prompt for ticket in together for prompt in ticket.parsed.prompts]
        counts = [ticket.parsed.logprobs or 0 for ticket in together for _ in ticket.parsed.prompts]
        rows = iter(prompt_logprobs(self._llm, prompts, counts))
        self._to_score = []
        for ticket in together:
            own: list[PromptLogprobs] = [next(rows) for _ in ticket.parsed.prompts]
            outputs = [ticket.outputs[i] for i in sorted(ticket.outputs)]
            self._finish(ticket, outputs, own)

    def _finish(self, ticket: Ticket, outputs: list[Output], of_prompts: list[PromptLogprobs]) -> None:
        self._leave(ticket)
        ticket.tell(Answered(outputs, of_prompts, ticket.kept_tokens))

    def _leave(self, ticket: Ticket) -> None:
        """Forget a request, ended or not."""
        if ticket.gone:
            return
        ticket.gone = True
        for number in ticket.numbers:
            if self._running.pop(number, None) is not None and self._job is not None:
                self._job.cancel(number)
            sequence = self._sequences.pop(number, None)
            if sequence is not None:
                self._release(sequence)
        if ticket in self._to_score:
            self._to_score.remove(ticket)
        with self._change:
            self.in_system -= ticket.sequences
            if ticket in self._arrived:
                self._arrived.remove(ticket)
        self._settle()

    def _settle(self) -> None:
        """With nobody running, what is cancelled leaves the job now: no pass would come to let it go."""
        if not self._running and self._job is not None and not self._job.is_idle:
            self._job.step()

    def _fail(self, error: Exception) -> None:
        """A job that has failed takes its requests with it; those that wait go on with the next one."""
        if self._job is not None:
            self._job.close()
            self._job = None
        lost = {ticket for ticket, _ in self._running.values()} | set(self._to_score)
        self._running.clear()
        for sequence in self._sequences.values():
            self._release(sequence)
        self._sequences.clear()
        self._kept.clear()
        self._to_score = []
        for ticket in lost:
            self._leave(ticket)
            ticket.tell(_failed("The pass that computed this failed", error))

    def _open(self) -> OpenRequests:
        if self._job is None:
            self._job = self._llm.open(self._capacity)
        return self._job


def _failed(what: str, error: Exception) -> RequestError:
    return RequestError(f"{what}: {type(error).__name__}: {error}", None, "engine_error", SERVER_ERROR)


def _most_tokens(sequence: Running) -> int:
    """That a sequence may leave."""
    return len(sequence.prompt) + sequence.params.max_tokens
