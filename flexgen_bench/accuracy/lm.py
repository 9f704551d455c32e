"""Any system of the suite as a model of lm-eval: its tasks, its prompts, its scoring; our engine or
a baseline underneath.

Tokens are made as lm-eval's own ``hf`` model makes them (context and continuation together, spaces
at the end of a context moved to the continuation, the start token before text without context), so
results can be compared item by item. Two things are done otherwise (docs/notes/text.md): end tokens
that a tokenizer adds are left out, and a stop string that is the first word ends an answer.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from flexgen_bench.accuracy.sampling import sampling_of
from flexgen_bench.accuracy.text import TaskText
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Policy
from flexgen_bench.outputs import Score
from flexgen_bench.schedule.forest import ScoreRequest
from flexgen_bench.systems.scorer import Scorer

if TYPE_CHECKING:
    from torch import Tensor

# What is asked of ``_loglikelihood_tokens``: text of context and continuation (None: part of a longer text), and their tokens.
Pair = tuple[tuple[str, str] | None, list[int], list[int]]


class SystemLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """An lm-eval model over a scorer.

    truncated: by kind of request, how many items were longer than ``max_length`` and cut from the left.
    Every result is told to lm-eval's cache as soon as it is there, so a run that is killed goes on where it stopped.
    """

    backend = "causal"

    def __init__(
        self, scorer: Scorer, text: TaskText, max_length: int, name: str, close: Callable[[], None]
    ) -> None:
        super().__init__()
        self._scorer, self._text, self._name, self._close = scorer, text, name, close
        self.max_length = max_length
        self.tokenizer = text.tokenizer
        self.truncated: Counter[str] = Counter()

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> SystemLM:
        """lm-eval's ``--model_args``: ``key=value`` pairs."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> SystemLM:
        """The same as a mapping. additional_config: lm-eval's own options, such as its batch size."""
        from flexgen_bench.accuracy.arguments import from_arguments

        return from_arguments(arg_dict, additional_config or {})

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

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self._text.encode(string, add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The tokenizer's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes down about the model, when it has answered: how many items were cut is part of its results."""
        return {
            "model_name": self._name,
            "max_length": self.max_length,
            "truncated": dict(self.truncated),
        }

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Without lm-eval's bar of tokenizing where nobody watches."""
        found: list[tuple[float, bool]] = super().loglikelihood(
            requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty()
        )
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._request(i, before, after) for i, (_, before, after) in enumerate(requests)]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
        with tqdm(
            total=len(asked), desc="Running loglikelihood requests", disable=disable_tqdm or None
        ) as bar:

            def take(index: int, score: Score) -> None:
                found[index] = (score.logprob, score.is_greedy)
                self._keep("loglikelihood", requests[index][0], found[index])
                bar.update()

            if asked:
                self._scorer.score(asked, take)
        return found

    def _request(self, index: int, before: list[int], after: list[int]) -> ScoreRequest:
        """Cut from the left where it is too long: the last token is not computed, so one more than the model's positions fits."""
        if not 1 <= len(after) <= self.max_length:
            raise UserError(
                f"continuation of request {index}", f"{len(after)} tokens",
                f"from 1 to {self.max_length} tokens long", "It cannot be scored as a whole.",
            )  # fmt: skip
        tokens = before + after
        if len(tokens) > self.max_length + 1:
            self.truncated["loglikelihood"] += 1
            tokens = tokens[-(self.max_length + 1) :]
        return ScoreRequest(tokens, len(tokens) - len(after))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts: each token is predicted once, from as much as the model can see."""
        windows: list[ScoreRequest] = []
        owner: list[int] = []
        texts = [request.args[0] for request in requests]
        for number, text in enumerate(texts):
            for window in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append(self._request(number, *make_disjoint_window(window)))
                owner.append(number)
        left, total = Counter(owner), [0.0] * len(texts)
        parts: list[dict[int, float]] = [{} for _ in texts]
        with tqdm(
            total=len(windows), desc="Running rolling requests", disable=disable_tqdm or None
        ) as bar:

            def take(index: int, score: Score) -> None:
                number = owner[index]
                parts[number][index] = score.logprob
                left[number] -= 1
                if not left[number]:  # summed in order: the same whatever came first
                    total[number] = sum(parts[number][i] for i in sorted(parts[number]))
                    self._keep("loglikelihood_rolling", (texts[number],), total[number])
                bar.update()

            if windows:
                self._scorer.score(windows, take)
        return total

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to prompts, cut before the first stop string."""
        prompts, params, stops = [], [], []
        for request in requests:
            context, given = request.args
            options = normalize_gen_kwargs(given, self.max_gen_toks)
            stop = handle_stop_sequences(options.pop("until", None), eos=self._text.end_text)
            stop = [s for s in stop if s]
            sampling = sampling_of(options, stop)
            prompts.append(self._prompt(context, sampling.max_tokens))
            params.append(sampling)
            stops.append(stop)
        found = [""] * len(prompts)
        with tqdm(
            total=len(prompts), desc="Running generate_until requests", disable=disable_tqdm or None
        ) as bar:

            def take(index: int, tokens: Sequence[int]) -> None:
                found[index] = self._text.answer(prompts[index], tokens, stops[index])
                self._keep("generate_until", requests[index].args, found[index])
                bar.update()

            if prompts:
                self._scorer.generate(prompts, params, take)
        return found

    def _prompt(self, context: str, new_tokens: int) -> list[int]:
        most = self.max_length - new_tokens
        if most < 1:
            raise UserError(
                "max_gen_toks", new_tokens, f"below the {self.max_length} positions there are",
                "Nothing is left for the prompt.",
            )  # fmt: skip
        tokens = self._text.encode(context) or [self.prefix_token_id]
        if len(tokens) > most:
            self.truncated["generate_until"] += 1
        return tokens[-most:]

    def logprobs(self, token_ids: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Of each sequence of T tokens in turn, the log-probabilities (T-1, V) float32 after its first, second, ... token."""
        return self._scorer.log_probabilities(token_ids)

    def close(self) -> None:
        """Release the model."""
        self._scorer.close()
        self._close()

    def _keep(self, kind: str, arguments: Any, result: Any) -> None:
        """In lm-eval's cache, if it has one."""
        if arguments is not None:
            self.cache_hook.add_partial(kind, arguments, result)


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

    model: a name from conf/model, a checkpoint folder, a .gguf file or a hub id. lossy: what may change of the results. policy: of the engine; None lets it
    choose. batch_size: of systems whose batches are a number of sequences; None is their own choice. max_length: tokens that are seen at once, if
    fewer than the model has positions. options: the system's own, as in its conf file.

    Raises UserError for what cannot be (no tokenizer, one that loses text, an unknown name), CannotRun for a system that cannot do this
    here, StoreError for damaged or missing weights.
    """
    from flexgen_bench.accuracy.opening import open_system

    opened = open_system(
        system, model, lossy=lossy, dtype=dtype, gpu=gpu, policy=policy, threads=threads, cache_dir=cache_dir,
        batch_size=batch_size, options=options or {},
    )  # fmt: skip
    try:
        text = TaskText(opened.checkpoint, opened.shape.vocab_size)
        positions = opened.shape.max_positions
        if max_length is not None and not 2 <= max_length <= positions:
            raise UserError(
                "max_length", max_length, f"from 2 to the model's {positions} positions"
            )
        scorer = opened.system.scorer(batch_size)
    except BaseException:
        opened.close()
        raise
    return SystemLM(scorer, text, max_length or positions, str(model), opened.close)
