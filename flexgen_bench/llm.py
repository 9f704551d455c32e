"""The engine as a library: ``LLM(model).generate(prompts, SamplingParams(...))``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from flexgen_bench.calibrate.store import calibrated_rates, with_calibration
from flexgen_bench.config import default_cache_dir, hardware_profile, list_models, model_spec
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.folders import make_writable
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Policy, agreed_lossy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import Engine, check_prompt
from flexgen_bench.engine.generation import Running, ScoreRequest, Scoring
from flexgen_bench.engine.sampling import Sampler
from flexgen_bench.engine.tokenization import TextTokenizer
from flexgen_bench.memory.checkpoint import read_config
from flexgen_bench.planner.cohorts import Request
from flexgen_bench.runner.checkpoints import prepare_checkpoint
from flexgen_bench.runner.gguf_shape import gguf_shape
from flexgen_bench.runner.hub import hub_folder
from flexgen_bench.runner.machine import physical_cores

Prompt = str | Sequence[int]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Output:
    """One prompt's result. ``finish_reason``: "stop" (a stop id or string) or "length"."""

    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Score:
    """Log-likelihood of one continuation given its context: natural logarithm, summed and per token."""

    logprob: float
    is_greedy: bool
    token_logprobs: tuple[float, ...]


class LLM:
    """A model under an offloading policy.

    model: a name from conf/model, a checkpoint folder, a .gguf file, a hub id ("facebook/opt-1.3b") or a ModelSpec.
    policy: a Policy, or None to let the engine choose one for each job: by search, if this machine has been calibrated (``python -m
        flexgen_bench.calibrate``) or the profile states rates, else by a rule.
    lossy: what the engine's own choice may change of the results: ``Lossy(weights=Compression(4))`` quantizes weights. A
        given policy brings its own.
    gpu: a name from conf/gpu ("auto", "cpu", "emulated", ...) or a HardwareProfile.
    offload_dir: where KV cache and activations spill to disk. cache_dir: where weights are kept, packed.
    dtype: "float32", "bfloat16", "float16", or None for the checkpoint's own. threads: of the compute lane.
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
    ) -> None:
        self._lossy = agreed_lossy(lossy, policy)
        self._progress: Progress = progress or (lambda what, done, total: None)
        self._policy = policy
        self._engine: Engine | None = None
        self._closed = False
        cache = make_writable(Path(cache_dir) if cache_dir else default_cache_dir(), "cache_dir")
        self._own_dir: tempfile.TemporaryDirectory[str] | None = None
        if offload_dir is None:  # beside the weights, not in a /tmp that may be memory
            self._own_dir = tempfile.TemporaryDirectory(prefix="offload-", dir=cache)
            offload_dir = self._own_dir.name
        self._offload_dir = Path(offload_dir)
        try:
            hardware = gpu if isinstance(gpu, HardwareProfile) else hardware_profile(gpu)
            if threads is not None and (not isinstance(threads, int) or threads < 1):
                raise UserError(
                    "threads", threads, "an integer of at least 1, or None for all cores"
                )
            self._device = Device.open(hardware, threads or physical_cores())
            if hardware.rates is None:
                rates = calibrated_rates(cache, self._device.threads)
                if rates is not None:
                    known = with_calibration(hardware, rates)
                    self._device = replace(self._device, hardware=known)
            checkpoint, chosen = _checkpoint(model, dtype, cache, self._progress)
            self._weights = PackedWeights.from_checkpoint(
                checkpoint,
                chosen,
                cache,
                lambda done, total: self._progress("convert", done, total),
                self._lossy.weights,
            )
            self._tokenizer = TextTokenizer(checkpoint)
            if policy is not None:  # refuse a policy that does not fit now, not at the first prompt
                self._engine = self._weights.engine(policy, self._device, self._offload_dir)
        except BaseException:
            self.close()
            raise

    @property
    def shape(self) -> ModelShape:
        return self._weights.shape

    @property
    def policy(self) -> Policy | None:
        """The policy in force; None until a job has made the engine choose one."""
        return self._engine.policy if self._engine else None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Output]:
        """Continue every prompt: texts or lists of token ids, any number, any mixture of lengths.

        Results come in the order of the prompts and do not depend on how they are batched.
        """
        self._check_open()
        asked: Sequence[Prompt] = [prompts] if _is_prompt(prompts) else prompts  # type: ignore[assignment,list-item]
        if not asked:
            raise UserError("prompts", asked, "at least one prompt")
        params = _per_prompt(sampling_params, len(asked))
        sequences = [
            self._running(i, p, s) for i, (p, s) in enumerate(zip(asked, params, strict=True))
        ]
        requests = [Request(len(s.prompt), s.params.max_tokens) for s in sequences]
        self._engine_for(requests).generate(sequences, self._progress)
        return [self._output(p, s) for p, s in zip(asked, sequences, strict=True)]

    def score(self, contexts: Sequence[Prompt], continuations: Sequence[Prompt]) -> list[Score]:
        """Log-likelihood of each continuation after its context. An empty context is the model's start token."""
        self._check_open()
        if len(contexts) != len(continuations):
            raise UserError(
                "continuations", len(continuations), f"as many as contexts ({len(contexts)})"
            )
        if not contexts:
            raise UserError("contexts", list(contexts), "at least one context")
        pairs = zip(contexts, continuations, strict=True)
        requests = [self._score_request(i, a, b) for i, (a, b) in enumerate(pairs)]
        asked = [Request(len(r.tokens), 1) for r in requests]
        engine = self._engine_for(asked, Scoring.rows_at_once)
        scoring, _ = engine.score(requests, self._progress)
        return [_score(scoring.results[i]) for i in range(len(requests))]

    def close(self) -> None:
        """Release the weights and delete the offload directory if it was made here."""
        self._closed = True
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._own_dir is not None:
            self._own_dir.cleanup()

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("LLM", "closed", "open", "Make a new one.")

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _engine_for(self, requests: Sequence[Request], scored_rows: int = 0) -> Engine:
        """The engine under the given policy, or under one chosen for these requests (kept while it still fits)."""
        if self._policy is None:
            if self._engine is not None and self._engine.fits(requests, scored_rows):
                return self._engine
            if self._engine is not None:
                self._engine.close()
                self._engine = None
            policy = self._weights.choose_policy(
                self._device,
                self._offload_dir,
                requests,
                lossy=self._lossy,
                scored_rows=scored_rows,
            )
            self._engine = self._weights.engine(policy, self._device, self._offload_dir)
        assert self._engine is not None, "closed"
        return self._engine

    def _running(self, index: int, prompt: Prompt, params: SamplingParams) -> Running:
        ids = self._tokenizer.encode(prompt, f"prompts[{index}]")
        check_prompt(self.shape, index, ids, params.max_tokens)
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self._tokenizer.end_ids
        return Running(
            prompt=ids,
            params=params,
            sampler=Sampler(params, ids, index),
            stop_ids=stop_ids,
            stop_text=self._tokenizer.stop_test(tuple(params.stop)),
        )

    def _output(self, prompt: Prompt, sequence: Running) -> Output:
        return Output(
            prompt=prompt,
            prompt_token_ids=tuple(sequence.prompt),
            token_ids=tuple(sequence.new),
            text=self._tokenizer.text(sequence.new, tuple(sequence.params.stop)),
            finish_reason=sequence.finish_reason,
        )

    def _score_request(self, index: int, context: Prompt, continuation: Prompt) -> ScoreRequest:
        before, both = self._tokenizer.encode_pair(context, continuation, index)
        check_prompt(self.shape, index, both, 1)
        return ScoreRequest(both, before)


def _checkpoint(
    model: str | Path | ModelSpec, dtype: str | DType | None, cache: Path, progress: Progress
) -> tuple[Path, DType]:
    """The checkpoint folder of a model in whatever form it was named, and the dtype to use."""
    if isinstance(model, str | Path) and (Path(model) / "config.json").exists():
        folder = Path(model)
        return folder, _dtype(dtype, read_config(folder))
    chosen = _dtype(dtype, {})
    if isinstance(model, ModelSpec):
        spec = model
    elif str(model) in list_models():
        spec = model_spec(str(model))
    elif str(model).endswith(".gguf"):
        spec = ModelSpec(gguf_shape(Path(model)), WeightSource.PATH, str(Path(model).absolute()))
    elif Path(model).exists():
        raise UserError(
            "model", str(model), "a checkpoint folder (with config.json) or a .gguf file"
        )
    elif "/" in str(model):
        folder = hub_folder(str(model))
        return folder, _dtype(dtype, read_config(folder))
    else:
        raise unknown_choice("model", str(model), list_models())
    return prepare_checkpoint(spec, chosen, cache, progress), chosen


def _dtype(asked: str | DType | None, config: dict[str, Any]) -> DType:
    """What was asked for, else what the checkpoint is stored in, else bfloat16."""
    named = asked or config.get("dtype") or config.get("torch_dtype") or DType.BFLOAT16
    if named not in [str(d) for d in DType]:
        raise unknown_choice("dtype", str(named), [str(d) for d in DType])
    return DType(named)


def _is_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    """A single text, or a single list of token ids. UserError for what is neither nor a list of them."""
    if not isinstance(prompts, str | Sequence):
        raise UserError("prompts", prompts, "a text, a list of token ids, or a list of these")
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or any(not isinstance(p, SamplingParams) for p in params):
        raise UserError("sampling_params", params, "SamplingParams, or a list of them")
    if len(params) != count:
        raise UserError("sampling_params", len(params), f"one, or as many as prompts ({count})")
    return params


def _score(tokens: Sequence[tuple[float, bool]]) -> Score:
    logprobs = tuple(logprob for logprob, _ in tokens)
    return Score(sum(logprobs), all(greedy for _, greedy in tokens), logprobs)
