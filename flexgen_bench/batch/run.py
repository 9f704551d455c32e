"""A batch from its first line to its last: read a window of alike requests, compute it, write each answer as it
comes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexgen_bench.batch.inputs import Line, custom_id_of, request_of
from flexgen_bench.batch.output_file import OutputFile
from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.engine.job_run import JobResult
from flexgen_bench.engine.outputs import Output
from flexgen_bench.llm.llm import LLM
from flexgen_bench.requests.answers import PromptLogprobs, Writer
from flexgen_bench.requests.asked import ParsedRequest, Reader
from flexgen_bench.requests.errors import RequestError
from flexgen_bench.requests.prompt_logprobs import prompt_logprobs


class Watcher(Protocol):
    """Told how a batch goes."""

    def answered(self, prompt_tokens: int, answer_tokens: int) -> None: ...

    def refused(self) -> None: ...

    def job_done(self, result: JobResult) -> None: ...


@dataclass(frozen=True)
class Settings:
    """window: sequences that are read and computed together, and all of the input that is in memory. model: what lines
    without a model mean; defaults: further fields of lines that are bare prompts."""

    window: int
    model: str
    defaults: Mapping[str, Any]


@dataclass(frozen=True)
class Waiting:
    """A request that is read and not yet answered."""

    position: int
    custom_id: str | None
    parsed: ParsedRequest

    @property
    def sequences(self) -> int:
        return len(self.parsed.sequences)


class Batch:
    """Answers the lines that ``output`` does not have yet."""

    def __init__(self, llm: LLM, reader: Reader, output: OutputFile, settings: Settings, watcher: Watcher) -> None:
        self._llm, self._reader, self._writer = llm, reader, Writer(llm.tokenizer)
        self._output, self._settings, self._watcher = output, settings, watcher

    def run(self, lines: Iterator[Line]) -> None:
        """Whatever ends it before its end, the same call with the same lines goes on."""
        window: list[Waiting] = []
        for line in lines:
            if self._output.has(line.position):
                continue
            request = self._read(line)
            if request is None:
                continue
            if window and sum(r.sequences for r in window) + request.sequences > self._settings.window:
                self._compute(window)
                window = []
            window.append(request)
        if window:
            self._compute(window)

    def _read(self, line: Line) -> Waiting | None:
        """What a line asks for; None for a bad one, which is answered with what is wrong with it."""
        try:
            if line.is_repeated:
                raise RequestError("custom_id is that of an earlier line.", "custom_id", "duplicate_custom_id")
            line_request = request_of(line, self._settings.model, dict(self._settings.defaults))
            # Every request has a random stream of its own, the same in every run.
            parsed = self._reader.read(line_request.url, line_request.body, seed=line.position)
        except RequestError as error:
            self._refuse(line.position, custom_id_of(line), error)
            return None
        return Waiting(line.position, line_request.custom_id, parsed)

    def _compute(self, job: Sequence[Waiting]) -> None:
        """All of a job; halves of it where there is no room for all."""
        try:
            self._generate([r for r in job if r.parsed.generates])
            self._score([r for r in job if not r.parsed.generates])
        except DoesNotFit as error:
            left = [r for r in job if not self._output.has(r.position)]
            if len(left) == 1:
                self._refuse(left[0].position, left[0].custom_id, RequestError(str(error), None, "out_of_memory"))
                return
            for part in (left[: len(left) // 2], left[len(left) // 2 :]):
                self._compute(part)

    def _generate(self, job: Sequence[Waiting]) -> None:
        if not job:
            return
        owners = [(request, choice) for request in job for choice in range(request.sequences)]
        by_position: defaultdict[int, dict[int, Output]] = defaultdict(dict)
        to_score: list[tuple[Waiting, list[Output]]] = []

        def take(index: int, output: Output) -> None:
            request, choice = owners[index]
            own = by_position[request.position]
            own[choice] = output
            if len(own) < request.sequences:
                return
            outputs = [own[i] for i in range(request.sequences)]
            del by_position[request.position]
            if request.parsed.scores_prompt:
                to_score.append((request, outputs))
            else:
                self._answer(request, outputs)

        self._llm.generate_requests([r.parsed.sequences[choice] for r, choice in owners], take)
        if self._llm.last_job is not None:
            self._watcher.job_done(self._llm.last_job)
        scored = self._scored([request for request, _ in to_score])
        for request, outputs in to_score:
            self._answer(request, outputs, scored[request.position])

    def _score(self, job: Sequence[Waiting]) -> None:
        """Requests that want nothing but their prompts back."""
        scored = self._scored([request for request in job if request.parsed.scores_prompt])
        for request in job:
            self._answer(request, [], scored.get(request.position, []))

    def _scored(self, job: Sequence[Waiting]) -> dict[int, list[PromptLogprobs]]:
        prompts = [prompt for request in job for prompt in request.parsed.prompts]
        counts = [request.parsed.logprobs or 0 for request in job for _ in request.parsed.prompts]
        rows = iter(prompt_logprobs(self._llm, prompts, counts))
        return {request.position: [next(rows) for _ in request.parsed.prompts] for request in job}

    def _answer(self, request: Waiting, outputs: Sequence[Output], of_prompts: Sequence[PromptLogprobs] = ()) -> None:
        body = self._writer.body(request.parsed, outputs, of_prompts)
        response = {"status_code": 200, "request_id": body["id"], "body": body}
        self._output.write(request.position, request.custom_id, {"response": response, "error": None})
        self._watcher.answered(body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"])

    def _refuse(self, position: int, custom_id: str | None, error: RequestError) -> None:
        body = error.body()
        response = {"status_code": error.status, "request_id": f"req_{position:09d}", "body": body}
        said = {"code": error.code, "message": error.message}
        self._output.write(position, custom_id, {"response": response, "error": said})
        self._watcher.refused()
