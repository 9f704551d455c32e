"""What a system is predicted to do with a job. Nothing here was run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexgen_bench.core.codec import from_json
from flexgen_bench.core.compression import Lossy


@dataclass(frozen=True)
class Prediction:
    """The predicted outcome of one job.

    prefill_s: until every sequence of a block has its first token, summed over blocks; decode_s: the rest. batch_size:
    sequences that share one load of the weights. bytes: memory needed per tier, by name. lane_busy_s: seconds each lane
    works.
    bottleneck: the resource that bounds the run, in words. settings: what was chosen or asked for, as the system names
    it.
    disk_written_bytes: by the job, in all. overlapped: some prompts are computed while others decode, so only the sum
    of prefill_s and decode_s means something, and what a phase alone would tell is None.
    """

    prefill_s: float
    decode_s: float
    num_prompts: int
    prompt_len: int
    gen_len: int
    batch_size: int
    bytes: Mapping[str, int] = field(default_factory=dict)
    lane_busy_s: Mapping[str, float] = field(default_factory=dict)
    bottleneck: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    disk_written_bytes: int = 0
    notes: tuple[str, ...] = ()
    overlapped: bool = False

    @property
    def blocks(self) -> int:
        """How many the prompts make."""
        return max(1, -(-self.num_prompts // self.batch_size))

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def tok_per_s(self) -> float:
        """Generation throughput: the paper's metric."""
        return self.num_prompts * self.gen_len / self.total_s

    @property
    def decode_tok_per_s(self) -> float | None:
        """Of the tokens after each sequence's first; None if there are none."""
        tokens = self.num_prompts * (self.gen_len - 1)
        return tokens / self.decode_s if tokens and self.decode_s and not self.overlapped else None

    @property
    def prefill_tok_per_s(self) -> float | None:
        return None if self.overlapped else self.num_prompts * self.prompt_len / self.prefill_s

    @property
    def phases_s(self) -> tuple[float, float] | tuple[None, None]:
        """Seconds of prefill and of decode, each by itself."""
        return (None, None) if self.overlapped else (self.prefill_s, self.decode_s)

    @property
    def block_latency_s(self) -> float:
        """Seconds from the start of a block to its last token; where blocks overlap, what a sequence takes on average
        (a block's worth of sequences starts and ends in that time), the job's start and end shared out."""
        return self.total_s / self.blocks

    def changes(self, permitted: Lossy) -> Lossy:
        """What the results would differ by: as chosen, where a system was free to compress less than it was permitted
        to."""
        policy = self.settings.get("policy") or {}
        chosen = policy.get("lossy")
        return permitted if chosen is None else from_json(Lossy, chosen, "lossy")
