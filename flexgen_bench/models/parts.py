"""What decoders are made of. A family says which parts its models have (``ModelFamily.decoder``); everything else
follows from them: tensors (``inventory.py``), formulas (``formulas.py``), FLOP and workspace (here).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from flexgen_bench.core.microscaling import Microscaling
from flexgen_bench.core.score_mod import NO_MOD, ScoreMod


class NormKind(StrEnum):
    LAYER = "layer_norm"  # Ba et al. 2016
    RMS = "rms_norm"  # Zhang & Sennrich 2019
    RMS_AROUND_ONE = "rms_norm_around_one"  # its weights are stored less one (Gemma)


@dataclass(frozen=True)
class Norm:
    """affine: whether it has weights; a layer norm then also has a bias."""

    kind: NormKind
    eps: float
    affine: bool = True


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021) of the first ``dim`` values of a head, in pairs of halves or of neighbours
    (interleaved).

    scaling: None, or ``rope_type`` and its numbers (``models/rope.py``)."""

    dim: int
    theta: float
    scaling: Mapping[str, Any] | None = None
    interleaved: bool = False


@dataclass(frozen=True)
class Attention:
    """blocks, order: rows of the fused projection are so many blocks, each with its share of the query, key and value
    heads in this order.

    scale: what scores are multiplied with (Vaswani et al. 2017, section 3.2.1). qk_norm: over each head's values,
    before the rotation.
    rotary: the number of one in ``Decoder.rotaries``; None: positions are elsewhere. sinks: whether each query head has
    one (``kernels/score_mod.py``).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    bias: bool
    out_bias: bool
    blocks: int = 1
    order: str = "qkv"
    qk_norm: Norm | None = None
    rotary: int | None = None
    mod: ScoreMod = NO_MOD
    sinks: bool = False

    @property
    def rows(self) -> Mapping[str, int]:
        """Rows of the projections to queries, keys and values."""
        kv = self.kv_heads * self.head_dim
        return {"q": self.heads * self.head_dim, "k": kv, "v": kv}

    @property
    def qkv(self) -> int:
        return sum(self.rows.values())

    @property
    def rotates_together(self) -> bool:
        """Whether queries and keys lie side by side when they are rotated."""
        return self.blocks == 1 and self.order == "qkv" and self.qk_norm is None

    @cached_property
    def heads_per_block(self) -> tuple[int, ...]:
        """How many heads follow each other in a block of the projection, in ``order``."""
        counts = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        return tuple(counts[name] // self.blocks for name in self.order)

    @cached_property
    def places(self) -> tuple[int, int, int]:
        """Where queries, keys and values stand in ``order``."""
        q, k, v = (self.order.index(name) for name in "qkv")
        return q, k, v


@dataclass(frozen=True)
class Clamp:
    """gpt-oss' gated MLP: gate * sigmoid(alpha * gate) * (up + 1), of gates of at most ``limit`` and of what is up
    within plus and minus ``limit``. Rows of the gate and of what is up take turns."""

    limit: float
    alpha: float


@dataclass(frozen=True)
class MLP:
    """down(activation(up x)), or gated: down(activation(gate x) * up x) (Shazeer 2020); with a clamp: see there."""

    width: int
    activation: str
    gated: bool
    bias: bool
    clamp: Clamp | None = None

    def num_values(self, hidden: int) -> int:
        """Weights, of a model of this hidden size."""
        inner = (2 if self.gated else 1) * self.width
        return (inner + self.width) * hidden + self.bias * (inner + hidden)


class Scoring(StrEnum):
    SOFTMAX = "softmax"  # over all experts (Shazeer et al. 2017)
    SIGMOID = "sigmoid"  # of each expert for itself (DeepSeek-V3, section 2.1.2)


@dataclass(frozen=True)
class Router:
    """Which experts a token goes to, and what each weighs: the ``top_k`` with the highest scores, weighed with them.

    renormalised: weights are divided by their sum; with a softmax that is the softmax of the chosen logits alone.
    scale: what weights are multiplied with last. bias: of the logits. correction: a vector that is added to scores to
    choose by, but not to weigh with. groups, top_groups: experts are chosen from the ``top_groups`` of so many groups
    of neighbours whose best two add up to most.
    """

    scoring: Scoring
    top_k: int
    renormalised: bool
    scale: float = 1.0
    bias: bool = False
    correction: bool = False
    groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True)
class Experts:
    """A mixture of ``count`` experts, each an MLP of its own: every token goes through those that the router chooses.

    shared: an MLP that all tokens go through, too; shared_gate: what it adds is multiplied with the sigmoid of a
    product with a vector. packing: of experts' matrices in the checkpoint, which they keep.
    """

    count: int
    expert: MLP
    router: Router
    shared: MLP | None = None
    shared_gate: bool = False
    packing: Microscaling | None = None

    def idle_values(self, hidden: int) -> int:
        """Weights of the experts that a token does not go through."""
        return (self.count - self.router.top_k) * self.expert.num_values(hidden)


class NormPlace(StrEnum):
    BEFORE = "before"  # what attention and MLP read is normalised
    AFTER = "after"  # the residual stream is, once each has been added


@dataclass(frozen=True)
class Layer:
    """attention_norm, mlp_norm: at ``place``. attention_out_norm, mlp_out_norm: of what is added to the residual
    stream.

    parallel: the MLP reads what the attention reads, and both are added at once; without a norm of its own, through the
    attention's.
    """

    hidden: int
    attention: Attention
    mlp: MLP | Experts
    attention_norm: Norm
    mlp_norm: Norm | None
    place: NormPlace = NormPlace.BEFORE
    attention_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None
    parallel: bool = False

    def flops(self, num_values: int) -> tuple[int, int]:
        """Of one token through the products before and after the attention, of a layer of so many weights: 2 a weight
        that the token meets."""
        before = 2 * self.hidden * self.attention.qkv
        return before, 2 * (num_values - self.idle_values) - before

    @property
    def sums(self) -> int:
        """How often ranks that share it add up what each has made: behind the attention and behind the MLP; once where
        both are added to the same as they are."""
        normalised = self.attention_out_norm is not None or self.mlp_out_norm is not None
        return 1 if self.parallel and self.place is NormPlace.BEFORE and not normalised else 2

    @property
    def idle_values(self) -> int:
        """Weights that a token does not meet."""
        return self.mlp.idle_values(self.hidden) if isinstance(self.mlp, Experts) else 0

    @property
    def temporaries(self) -> int:
        """Values that one token holds at once outside the attention: a projection x, its norm, and q, k, v twice (fused
        and split, or normalised); an MLP x, its norm and up to three of the inner width, and what else is added to
        x. Of a mixture, whose tokens may all choose the same expert: the sum of what experts make, and a token's row on
        its way to one and back; scores in float32 and what is made of them. Five of the inner width with a clamp."""
        added = sum((self.parallel, self.attention_out_norm is not None))
        project = 2 * self.hidden + 2 * self.attention.qkv
        if isinstance(self.mlp, Experts):
            width = max(self.mlp.expert.width, self.mlp.shared.width if self.mlp.shared else 0)
            routing = 8 * self.mlp.count + 16 * self.mlp.router.top_k + 2 * self.hidden
            inner = 5 if self.mlp.expert.clamp else 3
            return max(project, (6 + added) * self.hidden + inner * width + routing)
        return max(project, (3 + added) * self.hidden + 3 * self.mlp.width)


@dataclass(frozen=True)
class Embedding:
    """width: of a token's row, which is projected where it is not the model's. positions: rows of a table of learned
    positions (0: none), of which position p uses row p + offset. scale: what rows are multiplied with, rounded to their
    type."""

    width: int
    positions: int = 0
    offset: int = 0
    scale: float = 1.0
    norm: Norm | None = None


@dataclass(frozen=True)
class Head:
    """soft_cap: c * tanh(logit / c)."""

    norm: Norm | None
    bias: bool = False
    soft_cap: float | None = None


@dataclass(frozen=True)
class Decoder:
    """A whole model. Tied: the head is the token table."""

    hidden: int
    vocab: int
    tied: bool
    embedding: Embedding
    layers: tuple[Layer, ...]
    head: Head
    rotaries: tuple[Rotary, ...] = field(default=())

    @cached_property
    def kinds(self) -> tuple[Layer, ...]:
        """Its layers without those that are made of the same parts as one before."""
        return tuple(dict.fromkeys(self.layers))
