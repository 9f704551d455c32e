"""What a run of accuracy leaves: for each task its items, and for each mode of a model what compression did to its
numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from flexgen_bench.core.codec import OMITTED, from_json
from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.token_loss import TokenLoss

# 2: left_out.
ACCURACY_SCHEMA_VERSION = 2
# The mode everything else is compared with.
EXACT_MODE = "exact"
# Decimals kept of a log-likelihood: well below the 1e-3 that counts as a tie, and files stay small.
LOGLIK_DECIMALS = 5
# Layer of a tensor that is in none.
NO_LAYER = -1


class Role(StrEnum):
    """evaluated: a system under test. reference: one whose arithmetic others must reproduce. yardstick: plain rounding
    of the same weights."""

    EVALUATED = "evaluated"
    REFERENCE = "reference"
    YARDSTICK = "yardstick"


@dataclass(frozen=True)
class Subject:
    """What was evaluated: a model under a mode, by a system.

    fingerprint: of the checkpoint; runs of different weights are never compared. mode: a name from conf/accuracy/modes.
    lossy: its values, as JSON (``core.codec``). system: whose arithmetic. dtype: of what is not compressed;
    run_dtype: of the uncompressed run it belongs to, which differs where the mode is another dtype. role: what it is in
    a comparison. weight_format: a published format (Q4_K_M, ...) that the weights were rounded to; they are computed
    with as plain numbers of ``dtype``.
    """

    model: str
    fingerprint: str
    system: str
    mode: str
    lossy: Mapping[str, Any]
    dtype: str
    run_dtype: str
    role: Role = Role.EVALUATED
    # Left out where there is none, as in records and keys older than it.
    weight_format: str | None = field(default=None, metadata=OMITTED)

    @property
    def changes(self) -> Lossy:
        return from_json(Lossy, self.lossy, "lossy")

    @property
    def is_exact(self) -> bool:
        """Whether nothing but the dtype may differ from the uncompressed model."""
        return self.changes.is_exact and self.weight_format is None

    @property
    def what(self) -> str:
        """What differs from the uncompressed model, in a word or two."""
        if self.is_exact:
            return self.dtype
        return str(self.changes) if self.weight_format is None else f"{self.weight_format} weights"


@dataclass(frozen=True)
class Item:
    """One item of a task.

    id: number and hash of the item; items are paired by it, and no text of the data is kept. cluster: what it shares
    with others (a subject), or "". parts: its addends of the task's statistic (``accuracy.statistics``). loglik:
    natural logarithms, one for each choice or text that was scored (none where text was generated). bytes: UTF-8 bytes
    of these. gold: index of the right one in ``loglik``; None where there is none.
    """

    id: str
    cluster: str
    parts: Sequence[float]
    prediction: str
    correct: bool | None
    loglik: Sequence[float] = ()
    bytes: Sequence[int] = ()
    gold: int | None = None


@dataclass(frozen=True)
class TaskRecord:
    """One task under one subject. ``metric`` is the task's own; ``statistic`` is how it follows from the items' parts.

    truncated: items cut from the left to fit the context, by kind of request. left_out: items that could not be scored,
    by their number and hash, with the reason; neither
    ``items`` nor ``scores`` know them. scores: every metric of the task, as lm-eval gives them.
    """

    run_id: str
    key: str
    subject: Subject
    task: str
    task_version: str
    data_sha256: Mapping[str, str]
    metric: str
    statistic: str
    higher_is_better: bool
    limit: int | None
    truncated: Mapping[str, int]
    left_out: Mapping[str, str]
    scores: Mapping[str, float | None]
    items: Sequence[Item]
    started_utc: str
    ended_utc: str
    seconds: float
    rerun_command: str
    evidence: Evidence = Evidence.MEASURED
    environment: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = ACCURACY_SCHEMA_VERSION


@dataclass(frozen=True)
class LayerError:
    """Relative error (Frobenius norm of the change / of the original) of a tensor."""

    layer: int
    tensor: str
    values: int
    error: float


@dataclass(frozen=True)
class Divergence:
    """Of the next-token distributions of one text from the uncompressed ones.

    kl: mean over positions of KL(uncompressed || compressed), nats. agree: positions with the same argmax. nll:
    negative log-probability of the text, summed over its positions, nats.
    """

    text: str
    positions: int
    kl: float
    agree: int
    nll_exact: float
    nll: float

    @property
    def added_nats(self) -> float:
        """Added log-loss per token."""
        return (self.nll - self.nll_exact) / max(self.positions, 1)


@dataclass(frozen=True)
class ModeRecord:
    """What one mode does to the numbers of one model. weight_bytes: what the compressed form of the model's tensors
    occupies;
    weight_values: how many they are. grid_error: error of the same grid on the same weights by an independent
    quantizer; near 0, the weights lie on that grid already. loss: of the next-token distributions, in llama.cpp's
    words; None in records older than it, and where too little text was compared."""

    run_id: str
    key: str
    subject: Subject
    weight_bytes: int | None
    weight_values: int | None
    weights: Sequence[LayerError]
    grid_error: float | None
    kv: Sequence[LayerError]
    divergence: Sequence[Divergence]
    started_utc: str
    ended_utc: str
    rerun_command: str
    evidence: Evidence = Evidence.MEASURED
    environment: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = ACCURACY_SCHEMA_VERSION
    loss: TokenLoss | None = field(default=None, metadata=OMITTED)

    @property
    def bytes_per_weight(self) -> float | None:
        if not self.weight_bytes or not self.weight_values:
            return None
        return self.weight_bytes / self.weight_values

    @property
    def weight_error(self) -> float | None:
        """Of all quantized tensors of the layers together: root of the mean of their squared errors, each weighted by
        its size. (What has a row for each token is kept in more bits, see ``Compression.of_vocabulary``.)"""
        layers = [e for e in self.weights if e.layer != NO_LAYER]
        total = sum(e.values for e in layers)
        if not total:
            return None
        return math.sqrt(math.fsum(e.values * e.error**2 for e in layers) / total)
