"""Any system of the suite as a model of lm-eval: its tasks, its prompts, its scoring; our engine or
a baseline underneath.

Tokens are made as lm-eval's own ``hf`` model makes them (context and continuation together, spaces
at the end of a context moved to the continuation, the start token before text without context), so
results can be compared item by item. Two things are done otherwise (docs/notes/text.md): end tokens
that a tokenizer adds are left out, and a stop string that is the first word ends an answer.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm

from flexgen_bench.accuracy.run.arguments import lm_options
from flexgen_bench.accuracy.run.request_tokens import RequestTokens
from flexgen_bench.accuracy.run.sampling import sampling_of
from flexgen_bench.accuracy.run.text import TaskText
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.outputs import Score
from flexgen_bench.schedule.prefix_tree import ScoreRequest
from flexgen_bench.systems.scorer import Scorer

if TYPE_CHECKING:
    from torch import Tensor

# What is asked of ``_loglikelihood_tokens``: text of context and continuation (None: part of a longer text), and their
# tokens.
Pair = tuple[tuple[str, str] | None, list[int], list[int]]


class SystemLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """An lm-eval model over a scorer.

    truncated: by kind of request, how many items were longer than ``max_length`` and cut from the left. left_out: name
    of a request that cannot be scored -> why; the others are. (``evaluate_task`` leaves such items out beforehand;
    lm-eval's own command line cannot.) Every result is told to lm-eval's cache as soon as it is there, so a run that is
    killed goes on where it stopped.
    """

    backend = "causal"

    def __init__(self, scorer: Scorer, text: TaskText, max_length: int, name: str, close: Callable[[], None]) -> None:
        super().__init__()
        self._scorer, self._text, self._name, self._close = scorer, text, name, close
        self.max_length = max_length
        self.tokenizer = text.tokenizer
        self.truncated: Counter[str] = Counter()
        self.left_out: dict[str, str] = {}
        self._tokens = RequestTokens(text, max_length, self._encode_pair)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> SystemLM:
        """lm-eval's ``--model_args``: ``key=value`` pairs."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> SystemLM:
        """The same as a mapping. additional_config: lm-eval's own options, such as its batch size."""
        return make_lm(**lm_options(arg_dict, additional_config or {}))

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return self._text.start_id

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say how many: lm-eval's own number."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._text.encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The tokenizer's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes down about the model, when it has answered: how many items were cut, and which could not
        be scored, is part of its results."""
        return {
            "model_name": self._name,
            "max_length": self.max_length,
            "truncated": dict(self.truncated),
            "left_out": dict(self.left_out),
        }

    def why_not(self, kind: str, arguments: tuple[Any, ...]) -> str:
        """Why a request cannot be scored; "" if it can. kind, arguments: of an instance of lm-eval."""
        try:
            self._prepare(kind)(*arguments)
        except UserError as error:
            return str(error)
        return ""

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of continuations after their contexts. One that cannot be scored has the probability 0, see ``left_out``."""
        prepared = self._each("loglikelihood", requests)
        arguments = [request.args for request in requests]
        return self._scored([(i, made) for i, made in enumerate(prepared) if made is not None], arguments, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        prepared = [(i, self._tokens.request(*pair)) for i, (_, *pair) in enumerate(requests)]
        return self._scored(prepared, [request[0] for request in requests], disable_tqdm)

    def _scored(
        self, prepared: Sequence[tuple[int, tuple[ScoreRequest, bool]]], arguments: Sequence[Any], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """prepared: requests with their place among ``arguments``."""
        scores: list[tuple[float, bool]] = [(-math.inf, False)] * len(arguments)
        self._count("loglikelihood", sum(cut for _, (_, cut) in prepared))
        with _bar("loglikelihood", len(prepared), disable_tqdm) as bar:

            def take(number: int, score: Score) -> None:
                index = prepared[number][0]
                scores[index] = (score.logprob, score.is_greedy)
                self._keep("loglikelihood", arguments[index], scores[index])
                bar.update()

            if prepared:
                self._scorer.score([request for _, (request, _) in prepared], take)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts: each token is predicted once, from as much as the model can see."""
        windows: list[ScoreRequest] = []
        owner: list[int] = []
        total = [0.0] * len(requests)
        for number, made in enumerate(self._each("loglikelihood_rolling", requests)):
            if made is None:
                total[number] = -math.inf
            else:
                windows += made
                owner += [number] * len(made)
        left = Counter(owner)
        parts: list[dict[int, float]] = [{} for _ in requests]
        with _bar("rolling", len(windows), disable_tqdm) as bar:

            def take(index: int, score: Score) -> None:
                number = owner[index]
                parts[number][index] = score.logprob
                left[number] -= 1
                if not left[number]:  # summed in order: the same whatever came first
                    total[number] = sum(parts[number][i] for i in sorted(parts[number]))
                    self._keep("loglikelihood_rolling", requests[number].args, total[number])
                bar.update()

            if windows:
                self._scorer.score(windows, take)
        return total

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to prompts, cut before the first stop string. One that cannot be asked has an empty answer, see
        ``left_out``."""
        prepared = [(i, made) for i, made in enumerate(self._each("generate_until", requests)) if made]
        self._count("generate_until", sum(made.cut for _, made in prepared))
        texts = [""] * len(requests)
        with _bar("generate_until", len(prepared), disable_tqdm) as bar:

            def take(number: int, tokens: Sequence[int]) -> None:
                index, made = prepared[number]
                stop = list(made.sampling.stop)
                texts[index] = self._text.answer(made.tokens, tokens, stop)
                self._keep("generate_until", requests[index].args, texts[index])
                bar.update()

            if prepared:
                prompts = [made.tokens for _, made in prepared]
                self._scorer.generate(prompts, [made.sampling for _, made in prepared], take)
        return texts

    def _prompt(self, context: str, given: dict[str, Any]) -> _Prompt:
        options = normalize_gen_kwargs(given, self.max_gen_toks)
        stop = handle_stop_sequences(options.pop("until", None), eos=self._text.end_text)
        sampling = sampling_of(options, [s for s in stop if s])
        return _Prompt(*self._tokens.prompt(context, sampling.max_tokens), sampling)

    def _prepare(self, kind: str) -> Callable[..., Any]:
        """What turns one request of a kind into tokens. Raises UserError for one that cannot be scored."""
        prepare: dict[str, Callable[..., Any]] = {
            "loglikelihood": self._tokens.pair,
            "loglikelihood_rolling": self._tokens.windows,
            "generate_until": self._prompt,
        }
        return prepare[kind]

    def _each(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        """Each request prepared; None for one that cannot be scored, which is told and noted. UserError if none can."""
        prepared, reasons = [], []
        for index, request in enumerate(requests):
            try:
                prepared.append(self._prepare(kind)(*request.args))
            except UserError as error:
                prepared.append(None)
                reasons.append((_name(request, index), error))
        if reasons and len(reasons) == len(requests):
            raise reasons[0][1]
        for name, reason in reasons:
            self.left_out[name] = str(reason)
            print(f"warning: {name} cannot be scored and counts as wrong: {reason}", file=sys.stderr)
        return prepared

    def _count(self, kind: str, cut: int) -> None:
        if cut:
            self.truncated[kind] += cut

    def logprobs(self, token_ids: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Of each sequence of T tokens in turn, the log-probabilities (T-1, V) float32 after its first, second, ...
        token."""
        return self._scorer.log_probabilities(token_ids)

    def close(self) -> None:
        """Release the model."""
        self._scorer.close()
        self._close()

    def _keep(self, kind: str, arguments: Any, result: Any) -> None:
        """In lm-eval's cache, if it has one."""
        if arguments is not None:
            self.cache_hook.add_partial(kind, arguments, result)


@dataclass(frozen=True)
class _Prompt:
    """cut: whether its beginning was cut off."""

    tokens: list[int]
    cut: bool
    sampling: SamplingParams


def _name(request: Any, index: int) -> str:
    """The item as lm-eval numbers it."""
    task, number = getattr(request, "task_name", None), getattr(request, "doc_id", None)
    return f"request {index}" if task is None else f"{task}, item {number}"


def _bar(what: str, total: int, disable: bool) -> Any:
    return tqdm(total=total, desc=f"Running {what} requests", disable=disable or None)


def make_lm(
    system: str,
    model: str | Path,
    *,
    lossy: Lossy = EXACT,
    dtype: str | DType | None = None,
    gpu: str | HardwareProfile = "auto",
    policy: Policy | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    options: dict[str, Any] | None = None,
) -> SystemLM:
    """A system of conf/system, loaded, as an lm-eval model. Close it when done.

    model: a name from conf/model, a checkpoint folder, a .gguf file or a hub id. lossy: what may change of the results.
    policy: of the engine; None lets it choose. batch_size: of systems whose batches are a number of sequences; None is
    their own choice. max_length: tokens that are seen at once, if fewer than the model has positions. options: the
    system's own, as in its conf file.

    Raises UserError for what cannot be (no tokenizer, one that loses text, an unknown name), CannotRun for a system
    that cannot do this here, StoreError for damaged or missing weights.
    """
    from flexgen_bench.accuracy.run.open_scorer import open_system

    opened = open_system(
        system,
        model,
        lossy=lossy,
        dtype=dtype,
        gpu=gpu,
        policy=policy,
        threads=threads,
        cache_dir=cache_dir,
        batch_size=batch_size,
        options=options or {},
    )
    try:
        text = TaskText(opened.checkpoint, opened.shape.vocab_size)
        positions = opened.shape.max_positions
        if max_length is not None and not 2 <= max_length <= positions:
            raise UserError("max_length", max_length, f"from 2 to the model's {positions} positions")
        scorer = opened.system.scorer(batch_size)
    except BaseException:
        opened.close()
        raise
    return SystemLM(scorer, text, max_length or positions, str(model), opened.close)
