"""What the step generator is told about a job: units, micro-batches, and where everything lives."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from flexgen_bench.core.policy import AttentionSite
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.schedule.steps import Buffer


class UnitKind(StrEnum):
    EMBED = "embed"
    LAYER = "layer"
    HEAD = "head"


@dataclass(frozen=True)
class Unit:
    """A schedulable piece of the model. ``load_bytes`` is what one load moves (0: nothing to load).

    ``flops_per_token`` counts the matrix products before the attention and after it.
    """

    index: int
    kind: UnitKind
    tier: Tier
    load_bytes: int
    flops_before: int = 0
    flops_after: int = 0


@dataclass(frozen=True)
class Span:
    """Sequences ``start .. stop-1`` of a micro-batch, on one tier."""

    tier: Tier
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class MicroBatch:
    """Sequences computed together, in the order the engine keeps them.

    sequences: their numbers in the job; prompt_lens: tokens of each; gen_len: most new tokens of any of them;
    kv, hidden: which span of the sequences lives on which tier.
    """

    index: int
    sequences: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    gen_len: int
    kv: tuple[Span, ...]
    hidden: tuple[Span, ...]

    @property
    def size(self) -> int:
        return len(self.sequences)

    @property
    def padded_len(self) -> int:
        """Prompt slots per sequence in the KV cache: the longest prompt (P)."""
        return max(self.prompt_lens)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each sequence starts in the flattened prompt tokens; one more entry than sequences."""
        starts = [0]
        for length in self.prompt_lens:
            starts.append(starts[-1] + length)
        return tuple(starts)

    def tokens(self, token: int, span: Span | None = None) -> int:
        """Rows of hidden states in a pass: all prompt tokens in prefill (token 0), else one per sequence."""
        if span is None:
            return self.offsets[-1] if token == 0 else self.size
        return self.row(token, span.stop) - self.row(token, span.start)

    def row(self, token: int, sequence: int) -> int:
        """The first row of hidden states that belongs to ``sequence`` (a position in this micro-batch)."""
        return self.offsets[sequence] if token == 0 else sequence


@dataclass(frozen=True)
class KVLayout:
    """How one span's keys and values lie in its home, per layer: a prompt segment, then tail segments.

    Each segment is (2, sequences, kv_heads, tokens, head_dim), contiguous, so a prefix of the region is one
    transfer; the prompt segment holds P tokens per sequence, a tail segment ``segment_tokens`` generated ones.
    Segments start at multiples of ``align`` bytes, so that direct I/O can address them.
    """

    sequences: int
    prompt_tokens: int
    new_tokens: int
    segment_tokens: int
    token_bytes: int  # K and V of one token of one sequence in one layer
    align: int = 4096

    def _aligned(self, count: int) -> int:
        return -(-count // self.align) * self.align

    @property
    def prompt_bytes(self) -> int:
        return self._aligned(self.sequences * self.prompt_tokens * self.token_bytes)

    @property
    def segment_bytes(self) -> int:
        return self._aligned(self.sequences * self.segment_tokens * self.token_bytes)

    @property
    def num_segments(self) -> int:
        return -(-self.new_tokens // self.segment_tokens) if self.new_tokens else 0

    @property
    def region_bytes(self) -> int:
        return self.prompt_bytes + self.num_segments * self.segment_bytes

    def prefix_bytes(self, segments: int) -> int:
        """Bytes of the prompt segment and the first ``segments`` tail segments."""
        return self.prompt_bytes + segments * self.segment_bytes

    def full_segments(self, tokens: int) -> int:
        """Tail segments that are complete once ``tokens`` new tokens are stored."""
        return tokens // self.segment_tokens

    def used_segments(self, tokens: int) -> int:
        return -(-tokens // self.segment_tokens)


@dataclass(frozen=True)
class Work:
    """One micro-batch's part in a pass: token 0 is its prefill, token n feeds its n-th generated token.

    stage: the staging slot it uses in this pass.
    """

    batch: MicroBatch
    token: int
    stage: int

    def buffer(self, name: str, part: int = 0) -> Buffer:
        """A staging buffer of this micro-batch's stage."""
        return Buffer(name, self.stage, part=part)


@dataclass(frozen=True)
class Job:
    """A whole job for the generator: one block of micro-batches over all passes.

    weight_slots: staging slots for streamed units on the compute tier; host_slots: the same in host memory, for
    units on disk when an accelerator computes. stages: staging slots for what belongs to a micro-batch; at least two,
    since one micro-batch is attended while the next is projected. hidden_row_bytes, kv_layouts and the logits' size give steps
    their bytes. keep_kv is False for jobs that never decode (scoring): nothing is cached then.
    """

    units: tuple[Unit, ...]
    batches: tuple[MicroBatch, ...]
    compute_tier: Tier
    attention: AttentionSite
    weight_slots: int
    host_slots: int
    stages: int
    hidden_row_bytes: int
    embed_row_bytes: int
    qkv_row_bytes: int
    attention_row_bytes: int
    logits_row_bytes: int
    attention_flops_per_pair: (
        int  # score and value products of one query token against one cached token
    )
    kv_layouts: tuple[tuple[KVLayout, ...], ...]  # [micro-batch][span]
    keep_kv: bool = True

    @property
    def compute_lane(self) -> Lane:
        return Lane.CPU if self.compute_tier is Tier.CPU else Lane.GPU

    @property
    def has_accelerator(self) -> bool:
        return self.compute_tier is Tier.GPU

    @cached_property
    def streamed(self) -> tuple[Unit, ...]:
        """Units that must be brought to the compute tier in every pass, in order."""
        return tuple(u for u in self.units if u.tier is not self.compute_tier and u.load_bytes)

    def attends_on_cpu(self, span: Span) -> bool:
        """Decode attention of this span runs on the cpu although an accelerator computes the rest."""
        return (
            self.has_accelerator
            and span.tier is not Tier.GPU
            and self.attention is AttentionSite.CPU
        )
