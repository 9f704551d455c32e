"""Generation: which tokens are fed, and what becomes of the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

from torch import Tensor

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.outputs import TokenLogprobs
from flexgen_bench.engine.sampling import Sampler, likeliest
from flexgen_bench.engine.text_stream import TextStream
from flexgen_bench.schedule.micro_batch import Member, MicroBatch
from flexgen_bench.schedule.scheduler import ending, last_rows
from flexgen_bench.schedule.sequence_group import SequenceGroup
from flexgen_bench.schedule.sequence_groups import Request

# Fewer shared tokens than this (a start token, a template's first words) are computed for every prompt: attention over
# fresh keys needs no mask.
LEAST_SHARED = 8


@dataclass(frozen=True)
class KeptTokens:
    """Tokens with their keys and values: of each layer (2, G, tokens, ...), the last of them, all where the layer keeps
    all, in the form in which they are stored.

    least: so many tokens a prompt must begin with; after fewer, a window would want keys that are no longer there. 0:
    any number.
    """

    tokens: tuple[int, ...]
    layers: tuple[tuple[Tensor, ...], ...]
    least: int = 0

    def in_common(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt need not be computed; its last one always is, for it predicts the next."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.tokens, prompt, strict=False)))
        found = min(same, len(prompt) - 1)
        return found if found >= self.least else 0


class Chosen(NamedTuple):
    """A next token, and what was asked about it."""

    token: int
    logprobs: TokenLogprobs | None = None


@dataclass
class Running:
    """One prompt on its way: what it has produced, and why it ended (empty: it goes on).

    stop_text: given all new tokens with each of them, says whether their text has ended. text: what
    becomes of them, if anybody wants it. logprobs: one entry a new token, where ``params`` asks for them.
    prefix: what the prompt may begin with and need not be computed; keep: leave in ``kept`` what another one may begin
    with (both in open jobs whose capacity says so; elsewhere nothing is kept).
    """

    prompt: Sequence[int]
    params: SamplingParams
    sampler: Sampler
    stop_ids: frozenset[int]
    stop_text: Callable[[list[int]], bool]
    new: list[int] = field(default_factory=list)
    finish_reason: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    # Both are told by the thread that samples; where passes follow each other without a gap, by that which runs them.
    on_token: Callable[[int], None] = lambda token: None
    on_end: Callable[[], None] = lambda: None
    text: TextStream | None = None
    prefix: KeptTokens | None = None
    keep: bool = False
    kept: KeptTokens | None = None

    def choose(self, logits: Tensor) -> Chosen:
        """The token that is sampled from logits (V,)."""
        token, count = self.sampler.choose(logits), self.params.logprobs
        return Chosen(token, None if count is None else likeliest(logits, token, count))

    def take(self, chosen: Chosen) -> None:
        """Append one token and decide whether the sequence ends with it. What comes after an end is dropped."""
        if self.finish_reason:
            return
        token, logprobs = chosen
        self.new.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if token in self.stop_ids or self.stop_text(self.new):
            self.finish_reason = "stop"
        elif len(self.new) >= self.params.max_tokens:
            self.finish_reason = "length"
        self.on_token(token)
        if self.finish_reason:
            self.on_end()


def to_full_length(prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Running]:
    """One sequence per prompt, which nothing ends before ``max_tokens``."""
    return [
        Running(prompt, params, Sampler(params, prompt, i), frozenset(), lambda new: False)
        for i, prompt in enumerate(prompts)
    ]


def check_new(sequences: Sequence[Running]) -> None:
    """UserError for a sequence that an earlier job has had."""
    used = [i for i, s in enumerate(sequences) if s.new or s.finish_reason]
    if used:
        raise UserError(
            f"sequences[{used[0]}]",
            f"{len(sequences[used[0]].new)} tokens from an earlier job",
            "new, without tokens",
            "Make it again from its prompt.",
        )


def requests_of(sequences: Sequence[Running], steady: int | None = None) -> list[Request]:
    """What a job of these sequences asks for. Instructions and examples that all prompts begin with are computed once
    per micro-batch.

    steady: up to which length of a prompt its tokens' keys do not depend on that length; longer ones share nothing.
    None: always.
    """
    longest = max((len(s.prompt) for s in sequences), default=0)
    can_share = len(sequences) > 1 and (steady is None or longest <= steady)
    shared = _in_common([s.prompt for s in sequences]) if can_share else 0
    shared = shared if shared >= LEAST_SHARED else 0
    return [Request(len(s.prompt), s.params.max_tokens, shared) for s in sequences]


def _in_common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with: those that the first and the last of them, in order, begin with."""
    ordered = [tuple(prompt) for prompt in prompts]
    pairs = zip(min(ordered), max(ordered), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class Generation:
    """Feeds tokens to micro-batches and samples the next ones. sequences: by their numbers in the job; of an open one
    they come and go between passes."""

    def __init__(self, sequences: Mapping[int, Running]) -> None:
        self._sequences = sequences

    def tokens(self, member: Member) -> Sequence[int]:
        mine = [self._sequences[i] for i in member.group.sequences]
        if member.token:
            return [sequence.new[member.token - 1] for sequence in mine]
        return [
            token
            for sequence, (first, last) in zip(mine, member.ranges, strict=True)
            for token in sequence.prompt[first:last]
        ]

    def logit_rows(self, member: Member) -> Sequence[int]:
        """The last row of every sequence whose prompt ends here, or which decodes."""
        return last_rows(member)

    def reduce(self, micro_batch: MicroBatch, head: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Logits, or their greedy choice if every sequence of the micro-batch wants only that."""
        logits = head(x)
        greedy = are_greedy(self._getting(micro_batch))
        return logits.argmax(dim=-1) if greedy else logits.float()

    def finish(self, micro_batch: MicroBatch, reduced: Tensor) -> None:
        self.take(micro_batch, self.choose(micro_batch, reduced))

    def choose(self, micro_batch: MicroBatch, reduced: Tensor) -> list[Chosen]:
        """What every sequence goes on with, given what ``reduce`` returned, or the tokens of one that samples on the
        device."""
        sequences = self._getting(micro_batch)
        if are_greedy(sequences):
            return [Chosen(token) for token in reduced.tolist()]
        return [sequence.choose(logits) for sequence, logits in zip(sequences, reduced, strict=True)]

    def take(self, micro_batch: MicroBatch, chosen: Sequence[Chosen]) -> None:
        """Tell the sequences."""
        for sequence, one in zip(self._getting(micro_batch), chosen, strict=True):
            sequence.take(one)

    def on_device(self, member: Member) -> bool:
        """Greedy sequences need no more than the number of the largest logit. What is drawn at random stays on the
        host: an accelerator's generator draws something else."""
        return are_greedy(self._sequences[i] for i in member.group.sequences)

    def tree(self, sequence: int) -> None:
        """Prompts are plain sequences."""

    def ended(self, group: SequenceGroup) -> list[int]:
        """Sequences of a sequence group that have nothing left to do."""
        return [i for i in group.sequences if self._sequences[i].finish_reason]

    def full(self, group: SequenceGroup, count: int) -> list[int]:
        """Sequences of a sequence group that have all that they may get with ``count`` tokens."""
        return [i for i in group.sequences if self._sequences[i].params.max_tokens <= count]

    def _getting(self, micro_batch: MicroBatch) -> list[Running]:
        """The sequences that get a token from a micro-batch, in the order of its logit rows."""
        numbers = (m.group.sequences[place] for m in micro_batch.members for place in ending(m))
        return [self._sequences[i] for i in numbers]


def are_greedy(sequences: Iterable[Running]) -> bool:
    """Whether the host needs no more of these than the number of the largest logit."""
    return all(s.params.greedy and s.params.repetition_penalty == 1.0 and s.params.logprobs is None for s in sequences)
