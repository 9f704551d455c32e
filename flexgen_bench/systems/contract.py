"""What a system under test must offer. Our engine and every baseline stand behind this one contract.

A system lives in its own process (``runner/worker.py``) and is used in this order::

    system = SystemClass(spec, files)
    system.check()          # before any work: can this cell be done here at all?
    system.is_prepared()    # if not, prepare() runs once in a process without the cell's memory cap and clock
    system.load(batch_size) # weights in place; may be called again with another batch size while tuning
    system.generate(...)    # once per repetition
    system.report()         # after the last repetition
    system.timeline()
    system.close()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.moment import JobState
from flexgen_bench.core.progress import Progress
from flexgen_bench.core.record import SystemReport
from flexgen_bench.core.timeline import Timeline
from flexgen_bench.systems.scorer import Scorer


@dataclass(frozen=True)
class Capabilities:
    """What a system can do, declared by itself. Nobody branches on a system's name."""

    mixed_lengths: bool = True  # prompts of different lengths in one job
    accelerators: tuple[str, ...] = ("none", "cuda")
    needs: tuple[str, ...] = ()  # importable modules it cannot work without
    reference: bool = False  # its tokens are what the others' are compared with
    lossy: tuple[str, ...] = ()  # fields of core.compression.Lossy that it can follow
    scores: bool = False  # it has a scorer, so that its accuracy can be judged
    ranks: bool = False  # it computes on several devices together (gpu.count)
    gpu_cap: bool = True  # torch's allocator holds what it has on a GPU, so that a cap on that holds it


@dataclass(frozen=True)
class ModelFiles:
    """Where the runner has put what a system reads.

    checkpoint: a Hugging Face style folder (config.json, model*.safetensors, tokenizer files if any) whose
    tensors have the cell's dtype; scratch: an empty folder for offload files, deleted after the cell.
    cache: a folder that is kept between cells (packed weight stores live there).
    """

    checkpoint: Path
    scratch: Path
    cache: Path


@dataclass(frozen=True)
class Generation:
    """The outcome of one repetition: new token ids per prompt (in the order asked), and phase times.

    prefill_s: seconds until every prompt of a batch has its first new token, summed over batches;
    decode_s: seconds for all later tokens, summed over batches.
    """

    token_ids: tuple[tuple[int, ...], ...]
    prefill_s: float
    decode_s: float


class System(ABC):
    """Base of every system under test."""

    capabilities: ClassVar[Capabilities]

    def __init__(self, spec: CellSpec, files: ModelFiles) -> None:
        self.spec = spec
        self.files = files

    def check(self) -> None:  # noqa: B027  (most systems can always run)
        """Raise CannotRun with a reason if this machine or this cell is impossible for the system."""

    def is_prepared(self) -> bool:
        """Whether everything is there that is made once on this machine: compiled code, converted weights."""
        return True

    def prepare(self) -> None:  # noqa: B027
        """Make it. Announce what takes long on the ``flexgen_bench.stage`` logger; with ``extra={"progress":
        (what, done, total, unit)}`` a message becomes a progress bar. ``load`` may do the same."""

    @abstractmethod
    def load(self, batch_size: int) -> None:
        """Bring the weights into place for batches of ``batch_size`` prompts."""

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], gen_len: int, progress: Progress) -> Generation:
        """Greedily generate exactly ``gen_len`` tokens for each prompt, ignoring end-of-sequence."""

    @abstractmethod
    def report(self) -> SystemReport:
        """What was done with the memory and the links, over all calls of ``generate`` since ``load``."""

    def timeline(self) -> Timeline | None:
        """What every lane did in the last call of ``generate``; None if the system does not keep that."""
        return None

    def job_state(self) -> JobState | None:
        """What the running ``generate`` is doing, asked from inside its progress; after it, how it ended. None if the
        system knows no more than its phases. Must take no longer than a fraction of a millisecond."""
        return None

    def scorer(self, batch_size: int | None) -> Scorer:
        """After ``check``, in place of ``load``: the system ready to score. batch_size: sequences at once, where it has
        batches of a fixed number; None is its own choice. Systems that ``capabilities.scores`` have one."""
        raise CannotRun(f"{self.spec.system} gives no log-likelihoods")

    def close(self) -> None:  # noqa: B027
        """Release everything, files included."""

    def default_batch_size(self) -> int:
        """The batch used when the cell names no candidates: all prompts at once, at most 32."""
        return min(self.spec.workload.num_prompts, 32)
