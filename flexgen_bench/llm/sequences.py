"""Between requests and the engine: prompts become sequences, and sequences that have ended become outputs."""

from __future__ import annotations

from flexgen_bench.core.model import ModelShape
from flexgen_bench.engine.checks import check_prompt
from flexgen_bench.engine.generation import Running
from flexgen_bench.engine.outputs import GenerationRequest, Output, Prompt
from flexgen_bench.engine.sampling import Sampler
from flexgen_bench.engine.tokenization import TextTokenizer


class Sequences:
    """Makes sequences of a model's requests."""

    def __init__(self, shape: ModelShape, tokenizer: TextTokenizer) -> None:
        self.shape, self.tokenizer = shape, tokenizer

    def start(self, request: GenerationRequest, field: str) -> Running:
        """A sequence with no token yet. UserError, which names ``field``, for a prompt that this model cannot take."""
        params = request.params
        ids = self.tokenizer.encode(request.prompt, field)
        check_prompt(self.shape, field, ids, params.max_tokens)
        stop_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_ids |= self.tokenizer.end_ids
        text = self.tokenizer.stream(ids, params.stop or ())
        return Running(
            prompt=ids,
            params=params,
            sampler=Sampler(params, ids, request.stream),
            stop_ids=stop_ids,
            stop_text=text.follow if params.stop else lambda new: False,
            text=text,
        )


def output_of(prompt: Prompt, sequence: Running) -> Output:
    """What a sequence that has ended has produced."""
    assert sequence.text is not None, "made by Sequences"
    sequence.text.follow(sequence.new)
    sequence.text.finish()
    return Output(
        prompt=prompt,
        prompt_token_ids=tuple(sequence.prompt),
        token_ids=tuple(sequence.new),
        text=sequence.text.text,
        finish_reason=sequence.finish_reason,
        logprobs=None if sequence.params.logprobs is None else tuple(sequence.logprobs),
    )
