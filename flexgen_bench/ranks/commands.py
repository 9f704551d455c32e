"""What rank 0 asks of the other ranks, and what they reply."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_bench.core.compression import Compression
from flexgen_bench.core.errors import CannotRun, RankLost
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.pipeline import Stage
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Lane, Site
from flexgen_bench.core.timeline import Timeline
from flexgen_bench.engine.generation import Running
from flexgen_bench.engine.lane import LaneUse
from flexgen_bench.engine.sampling import Sampler
from flexgen_bench.engine.tokenization import TextTokenizer
from flexgen_bench.schedule.sequence_groups import Request


@dataclass(frozen=True)
class Setup:
    """What a process needs to be a rank of a model. hardware, threads: its own part; gpu_cap: hold torch to the
    memory that the profile gives its device; shared: each rank has a slice of every layer."""

    checkpoint: Path
    dtype: DType
    cache: Path
    compression: Compression | None
    hardware: HardwareProfile
    threads: int
    offload_dir: Path
    gpu_cap: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Pack:
    """Open the packed weights, converting them first if need be. Reply: their digest."""


@dataclass(frozen=True)
class Connect:
    """Make the wire. name: of this group of ranks in the store."""

    name: str


@dataclass(frozen=True)
class Load:
    """Place the weights of a stage by a policy, in place of those that are there. stages: None, of ranks that share
    every layer."""

    policy: Policy
    stages: tuple[Stage | None, ...]


@dataclass(frozen=True)
class Unload:
    """Release the weights."""


@dataclass(frozen=True)
class Check:
    """Raise DoesNotFit if a job of these requests has no room."""

    requests: tuple[Request, ...]
    logits_row_bytes: int


@dataclass(frozen=True)
class SequenceOfJob:
    """What a ``Running`` is made of. sampler: with the random stream that it has."""

    prompt: tuple[int, ...]
    params: SamplingParams
    sampler: Sampler
    stop_ids: frozenset[int]

    @staticmethod
    def of(sequence: Running) -> SequenceOfJob:
        return SequenceOfJob(tuple(sequence.prompt), sequence.params, sequence.sampler, sequence.stop_ids)

    def start(self, tokenizer: TextTokenizer) -> Running:
        """The sequence on another rank, which ends it by the same tokens."""
        text = tokenizer.stream(self.prompt, self.params.stop) if self.params.stop else None
        ends = (lambda new: False) if text is None else text.follow
        return Running(self.prompt, self.params, self.sampler, self.stop_ids, ends)


@dataclass(frozen=True)
class Generate:
    """Run a job. Reply: a ``RankReport``."""

    sequences: tuple[SequenceOfJob, ...]


@dataclass(frozen=True)
class End:
    """End this process."""


@dataclass(frozen=True)
class Abandon:
    """End this process at once: something has failed. reason: what."""

    reason: str


@dataclass(frozen=True)
class RankReport:
    """What a rank's lanes did in a job, what it had planned and allocated."""

    lanes: Mapping[Lane, LaneUse]
    timeline: Timeline
    allocated: Mapping[Site, Mapping[str, int]]
    planned: Mapping[Site, Mapping[str, int]]


@dataclass(frozen=True)
class Reply:
    value: Any = None


@dataclass(frozen=True)
class Failed:
    """A command that a rank could not carry out. kind, arguments, state: of the error, where it is one of ours (these
    say all in their text); text: of any other."""

    rank: int
    pickled: bytes | None
    text: str

    @staticmethod
    def of(rank: int, error: BaseException) -> Failed:
        # Errors of ours are made from fields that they do not keep, so they are taken apart.
        is_ours = type(error).__module__.startswith("flexgen_bench.")
        try:
            pickled = pickle.dumps((type(error), error.args, vars(error))) if is_ours else None
        except Exception:  # what cannot travel is told as text
            pickled = None
        notes = getattr(error, "__notes__", ())
        return Failed(rank, pickled, "\n".join([f"{type(error).__name__}: {error}", *notes]))

    def error(self) -> BaseException:
        """What rank 0 raises: the error itself where it is one of ours, and which rank had it."""
        if self.pickled is None:
            return RankLost(self.rank, f"it failed with {self.text}")
        kind, arguments, state = pickle.loads(self.pickled)
        error: BaseException = kind.__new__(kind, *arguments)
        error.__dict__.update(state)
        error.add_note(f"on rank {self.rank}")
        return error


def ended_before() -> CannotRun:
    return CannotRun("the other ranks have ended; torchrun starts them, once for one LLM. Start the program again")
