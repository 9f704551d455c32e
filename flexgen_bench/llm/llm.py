"""The engine as a library: ``LLM(model).generate(prompts, SamplingParams(...))``."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_bench.config.build import hardware_profile
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.cell import ModelSpec, check_latency
from flexgen_bench.core.closing import Closing
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.folders import make_writable
from flexgen_bench.core.given import as_list, token_ids
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Policy, agreed_lossy
from flexgen_bench.core.progress import Progress, quiet
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.arrivals import Arrivals
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.checks import check_score_request
from flexgen_bench.engine.generation import Running, requests_of
from flexgen_bench.engine.job_run import JobResult
from flexgen_bench.engine.outputs import (
    GenerationRequest,
    Output,
    Piece,
    Prompt,
    Score,
    pairs_of,
    per_prompt,
    prompts_of,
    requests_of_ids,
    score_of,
)
from flexgen_bench.engine.tokenization import TextTokenizer
from flexgen_bench.llm.chosen_engine import ChosenEngine
from flexgen_bench.llm.dataset_map import map_column
from flexgen_bench.llm.model_source import checkpoint_of
from flexgen_bench.llm.open_requests import OpenRequests
from flexgen_bench.llm.sequences import Sequences, output_of
from flexgen_bench.machine.host import physical_cores
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.ranks.commands import Setup
from flexgen_bench.ranks.division import divide
from flexgen_bench.ranks.engines import Engines
from flexgen_bench.ranks.ranks import Ranks, join
from flexgen_bench.ranks.torchrun import Torchrun
from flexgen_bench.requests.chat_template import Message, encode_chat
from flexgen_bench.schedule.prefix_tree import ScoreRequest
from flexgen_bench.schedule.sequence_groups import Capacity, Request

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger("flexgen_bench.stage")

# Given each result as soon as it is there: its place in what was asked, and the result.
OnOutput = Callable[[int, Output], None]
OnScore = Callable[[int, Score], None]


class LLM(Closing):
    """A model under an offloading policy.

    model: a name from conf/model, a checkpoint folder, a .gguf file, a hub id ("facebook/opt-1.3b") or a ModelSpec.
    policy: a Policy, or None to let the engine choose one for each job: by search, if this machine has been calibrated
    (``python -m
        flexgen_bench.calibrate``) or the profile states rates, else by a rule.
    lossy: what the engine's own choice may change of the results: ``Lossy(weights=Compression(4))`` quantizes weights.
    A
        given policy brings its own.
    max_latency_s: the most seconds that a block may take from its start to its last token, where the engine chooses (by
    search); None: any.
    gpu: a name from conf/gpu ("auto", "cpu", "emulated", ...) or a HardwareProfile.
    offload_dir: where KV cache and activations spill to disk. cache_dir: where weights are kept, packed.
    dtype: "float32", "bfloat16", "float16", or None for the checkpoint's own. threads: of the compute lane.
    ranks: devices that compute it together, each in a process of its own; None: what ``gpu`` says, or the processes of
    ``torchrun``, of which all but the first serve that one here and end with SystemExit.
    progress: called with (what, done, total) while weights convert ("convert") and tokens appear ("prefill", "decode").

    Raises UserError for what cannot be used, StoreError for damaged or missing weights, CannotRun for hardware that
    is not here. Use as a context manager, or call ``close``.
    """

    def __init__(
        self,
        model: str | Path | ModelSpec,
        *,
        policy: Policy | None = None,
        gpu: str | HardwareProfile = "auto",
        offload_dir: str | Path | None = None,
        cache_dir: str | Path | None = None,
        dtype: str | DType | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
        lossy: Lossy = EXACT,
        max_latency_s: float | None = None,
        ranks: int | None = None,
    ) -> None:
        check_latency(max_latency_s, policy is not None)
        self._lossy = agreed_lossy(lossy, policy)
        self._progress: Progress = progress or quiet
        self._chosen: ChosenEngine | None = None
        self._ranks: Ranks | None = None
        self._closed = False
        self.last_job: JobResult | None = None  # what the last job of generation took
        cache = make_writable(Path(cache_dir) if cache_dir else default_cache_dir(), "cache_dir")
        self._own_dir: tempfile.TemporaryDirectory[str] | None = None
        if offload_dir is None:  # beside the weights, not in a /tmp that may be memory
            self._own_dir = tempfile.TemporaryDirectory(prefix="offload-", dir=cache)
            offload_dir = self._own_dir.name
        self._offload_dir = Path(offload_dir)
        try:
            hardware = gpu if isinstance(gpu, HardwareProfile) else hardware_profile(gpu)
            if threads is not None and (not isinstance(threads, int) or threads < 1):
                raise UserError("threads", threads, "an integer of at least 1, or None for all cores")
            division = divide(hardware, threads or physical_cores(), ranks, Torchrun.of(os.environ))
            self._device = division.open_device(cache)
            checkpoint, chosen = checkpoint_of(model, dtype, cache, self._progress)
            own = (cache, self._lossy.weights, self._device.hardware, division.threads, self._offload_dir)
            self._ranks = join(division, Setup(checkpoint, chosen, *own, shared=division.shared))
            on_converted, compression = partial(self._progress, "convert"), self._lossy.weights
            self._weights = PackedWeights.from_checkpoint(
                checkpoint, chosen, cache, on_converted, compression, division.part
            )
            if self.note:
                _log.warning("%s: %s", checkpoint, self.note)
            self.tokenizer = TextTokenizer(checkpoint)
            self.sequences = Sequences(self.shape, self.tokenizer)
            engines = Engines(self._weights, self._device, self._offload_dir, self._ranks)
            self._chosen = ChosenEngine(engines, policy, self._lossy, max_latency_s)
        except BaseException:
            self.close()
            raise

    @property
    def shape(self) -> ModelShape:
        return self._weights.shape

    @property
    def hardware(self) -> HardwareProfile:
        """The machine, with its rates where they are known."""
        return self._device.hardware

    @property
    def note(self) -> str:
        """How the checkpoint's weights were read, in words (quantized ones are dequantized); empty if as they are."""
        return self._weights.note

    @property
    def policy(self) -> Policy | None:
        """The policy in force; None until a job has made the engine choose one."""
        return self._chosen.policy if self._chosen else None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_output: OnOutput = lambda index, output: None,
    ) -> list[Output]:
        """Continue every prompt: texts or lists of token ids, any number, any mixture of lengths.

        Empty text is the model's start token. Ids may be arrays of numpy or torch, one-dimensional.
        Results come in the order of the prompts and do not depend on how they are batched. ``on_output`` gets each as
        soon as it is there. Raises UserError for the first prompt that cannot be used, before any is computed.
        """
        prompt_list = prompts_of(prompts)
        params = per_prompt(sampling_params, len(prompt_list))
        requests = [GenerationRequest(p, s, i) for i, (p, s) in enumerate(zip(prompt_list, params, strict=True))]
        return self.generate_requests(requests, on_output)

    def generate_requests(
        self, requests: Sequence[GenerationRequest], on_output: OnOutput = lambda index, output: None
    ) -> list[Output]:
        """``generate`` for requests that come from different callers: each samples from the random stream that it
        names, so its tokens are those of this request alone."""
        self._check_open()
        sequences = [self.sequences.start(request, f"prompts[{i}]") for i, request in enumerate(requests)]
        engine_requests = requests_of(sequences, self._weights.family.steady_positions(self.shape))
        outputs: dict[int, Output] = {}

        def take(index: int, sequence: Running) -> None:
            outputs[index] = output_of(requests[index].prompt, sequence)
            on_output(index, outputs[index])

        arrivals = Arrivals(self._progress, take)
        for index, sequence in enumerate(sequences):
            sequence.on_end = partial(arrivals.put, index, sequence)
        engine = self._engine.for_generation(engine_requests)
        try:
            self.last_job = engine.generate(sequences, arrivals.progress)
        except BaseException:
            if self._ranks is not None:  # what had ended before is whole on all of them
                arrivals.deliver()
            raise
        arrivals.deliver()
        return [outputs[index] for index in range(len(requests))]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_output: OnOutput = lambda index, output: None,
    ) -> list[Output]:
        """Answer a conversation (a list of ``{"role": "user", "content": "text"}``), or each of several: ``generate``
        with what the checkpoint's chat template makes of them."""
        several = isinstance(messages, Sequence) and len(messages) > 0 and isinstance(messages[0], Sequence)
        conversations: Sequence[object] = messages if several else [messages]
        names = [f"messages[{i}]" if several else "messages" for i in range(len(conversations))]
        encoded = [encode_chat(self.tokenizer, c, name) for c, name in zip(conversations, names, strict=True)]
        return self.generate(encoded, sampling_params, on_output)

    def map(
        self,
        dataset: Any,
        column: str,
        sampling_params: SamplingParams | None = None,
        output: str = "answer",
        window: int = 1024,
    ) -> Any:
        """Answer every row of a column and give the dataset back with a column ``output`` of the answers' texts.

        dataset: a DataFrame of pandas, a ``datasets.Dataset``, a table of pyarrow, or a list of mappings; it is not
        changed. A row of the column is a text, a list of token ids, or a conversation (see ``chat``). window: rows that
        are computed together. Raises UserError, which names the row, for what cannot be used.
        """
        return map_column(self, dataset, column, sampling_params, output, window)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[Piece]:
        """Continue one prompt and give what is new after every pass: the pieces together are what ``generate`` gives.

        Until the last piece (or ``close`` of what this returns) the engine is taken: other calls are refused. UserError
        for a prompt that cannot be used, at once.
        """
        self._check_open()
        prompt_list = prompts_of(prompt)
        if len(prompt_list) != 1:
            raise UserError("prompt", f"{len(prompt_list)} prompts", "one prompt")
        params = per_prompt(sampling_params, 1)[0]
        return self._stream(self.sequences.start(GenerationRequest(prompt_list[0], params), "prompts[0]"))

    def _stream(self, sequence: Running) -> Iterator[Piece]:
        with self.open(Capacity(1, len(sequence.prompt), sequence.params.max_tokens)) as job:
            job.add(sequence)
            while not job.is_idle:
                for _, piece in job.step():
                    yield piece

    def check_open_jobs(self) -> None:
        """UserError if ``open`` and ``stream`` are refused whatever is asked: several ranks have no such jobs."""
        self._engine.check_open_jobs()

    def open(self, capacity: Capacity) -> OpenRequests:
        """A job that takes requests within a capacity while it runs; until it is closed this model does nothing else.

        Raises DoesNotFit if the capacity has no room.
        """
        self._check_open()
        job = self._engine.for_open_jobs([capacity.largest] * capacity.sequences).open(capacity)
        return OpenRequests(job, self.sequences)

    def plan(self, requests: Sequence[Request] | Capacity) -> MemoryPlan:
        """Every byte that a job of generation of these requests would take, or an open one of a capacity, under the
        policy that it would have. Raises DoesNotFit."""
        self._check_open()
        if isinstance(requests, Capacity):
            open_engine = self._engine.for_open_jobs([requests.largest] * requests.sequences)
            return open_engine.plan_open(requests)[1]
        return self._engine.for_generation(requests).plan(requests)

    def predicted_seconds(self, requests: Sequence[Request]) -> float:
        """How long a job of these requests takes, by simulation of its plan, if no sequence ends early. UserError where
        the machine's rates are not known."""
        self._check_open()
        return self._engine.predicted_seconds(requests)

    def score(self, contexts: Sequence[Prompt], continuations: Sequence[Prompt]) -> list[Score]:
        """Log-likelihood of each continuation after its context. An empty context is the model's start token."""
        self._check_open()
        requests = []
        for index, (context, continuation) in enumerate(pairs_of(contexts, continuations)):
            before, both = self.tokenizer.encode_pair(context, continuation, index)
            requests.append(ScoreRequest(both, before))
            name = f"contexts[{index}] + continuations[{index}]"
            check_score_request(self.shape, name, requests[-1])
        return self.score_tokens(requests)

    def score_tokens(
        self, requests: Sequence[ScoreRequest], on_score: OnScore = lambda index, score: None
    ) -> list[Score]:
        """Log-likelihoods of the tokens of each request from its ``start`` on. What requests share at their beginning
        is computed once.

        Results come in the order of the requests; ``on_score`` gets each as soon as it is there.
        """
        self._check_open()
        requests = requests_of_ids(requests)
        for index, request in enumerate(requests):
            check_score_request(self.shape, f"requests[{index}]", request)
        if not requests:
            return []
        scores: dict[int, Score] = {}

        def take(index: int, tokens: Sequence[tuple[float, bool]]) -> None:
            scores[index] = score_of(tokens)
            on_score(index, scores[index])

        arrivals = Arrivals(self._progress, take)
        self._engine.for_scoring(requests).score(requests, arrivals.put, arrivals.progress)
        arrivals.deliver()
        return [scores[index] for index in range(len(requests))]

    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Of each sequence in turn, the whole distribution of every token but the first: (T-1, V) float32. Few are in
        memory at once."""
        self._check_open()
        lists = as_list(sequences, "sequences", "a list of lists of token ids")
        requests = [ScoreRequest(token_ids(tokens, f"sequences[{index}]"), 1) for index, tokens in enumerate(lists)]
        for index, request in enumerate(requests):
            check_score_request(self.shape, f"sequences[{index}]", request)
        return self._engine.log_probabilities(requests)

    def close(self) -> None:
        """Release the weights, end other ranks, and delete the offload directory if it was made here."""
        self._closed = True
        try:
            if self._chosen is not None:
                self._chosen.close()
        finally:
            if self._ranks is not None:
                self._ranks.close()
            if self._own_dir is not None:
                self._own_dir.cleanup()

    @property
    def _engine(self) -> ChosenEngine:
        assert self._chosen is not None, "closed"
        return self._chosen

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("LLM", "closed", "open", "Make a new one.")
