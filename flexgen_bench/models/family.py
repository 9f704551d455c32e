"""What a model family must supply. One file per family implements this; ``registry.py`` finds it by name.

Tensors are given and returned as flattened tokens, so that prompts of different lengths share one matrix
product without padding: N = tokens of all sequences of a micro-batch, H = query heads, G = KV heads, D = head
dim, E = embedding width. A weight is a tensor, or what ``ops.linear`` takes in its place (a compressed one): formulas
only hand weights to ``ops``. ``ops`` is ``flexgen_bench.kernels.ops`` (or another set of kernels with its names);
passing it in keeps torch out of this package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, Any]


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of a packed unit, and the checkpoint tensors it is made of, concatenated along dimension 0.

    rows: how many rows each source has; empty if all have the same number.
    """

    spec: TensorSpec
    sources: tuple[str, ...]
    rows: tuple[int, ...] = ()

    @property
    def source_rows(self) -> tuple[int, ...]:
        count = len(self.sources)
        return self.rows or (self.spec.shape[0] // count,) * count


@dataclass(frozen=True)
class Inventory:
    """Every weight of a model, by schedulable unit.

    tables: gathered by row where they lie (token and position embeddings); ``tables[-1]`` is the token table.
    embed: other weights of the input embedding. layers: one list per decoder layer. head: what turns hidden
    states into logits, without the token table; if embeddings are tied, the head also reads ``tables[-1]``.
    """

    tables: tuple[PackedTensor, ...]
    embed: tuple[PackedTensor, ...]
    layers: tuple[tuple[PackedTensor, ...], ...]
    head: tuple[PackedTensor, ...]
    tied: bool

    @property
    def vocabulary(self) -> tuple[PackedTensor, ...]:
        """Matrices with a row for each token: the token table, and the head's own where embeddings are not tied."""
        tokens = self.tables[-1]
        return tokens, *(t for t in self.head if t.spec.shape == tokens.spec.shape)

    @property
    def num_values(self) -> int:
        """Parameters of the model; a tied table counts once."""
        units = (self.tables, self.embed, *self.layers, self.head)
        return sum(t.spec.num_values for unit in units for t in unit)


class ModelFamily(ABC):
    """The formulas of one family of decoder-only transformers."""

    name: ClassVar[str]
    # The class of transformers that this family's checkpoints name in config.json, and its model_type.
    architecture: ClassVar[str]
    model_type: ClassVar[str]
    # Name prefixes under which checkpoints of this family store their tensors, tried in order.
    prefixes: ClassVar[tuple[str, ...]] = ("", "model.")

    @abstractmethod
    def shape_from_config(self, config: Mapping[str, Any], name: str) -> ModelShape:
        """Translate a Hugging Face ``config.json``. UserError names what this family cannot do."""

    @abstractmethod
    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        """The inverse: entries of a ``config.json`` that describe this shape."""

    @abstractmethod
    def inventory(self, shape: ModelShape) -> Inventory:
        """Names, shapes and checkpoint sources of every weight."""

    @abstractmethod
    def rows(self, shape: ModelShape, token_ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Which row of each table every token needs: table name -> (N,) indices."""

    @abstractmethod
    def embed(self, ops: Any, shape: ModelShape, w: Weights, rows: Weights) -> Tensor:
        """Gathered rows (table name -> (N, E)) -> hidden states (N, hidden)."""

    def steady_positions(self, shape: ModelShape) -> int:
        """Up to which length of its sequence the keys of a token depend on what precedes it alone. Of longer ones they
        depend on the length, too, so that sequences which begin alike cannot share them."""
        return shape.max_positions

    def angles(self, ops: Any, shape: ModelShape, positions: Tensor, lengths: Tensor, like: Tensor) -> Any:
        """What every layer needs to know of positions (N,): made once per pass, in the dtype of ``like``.

        lengths: (N,) of the tokens' sequences when they are computed. None for families that put positions into the
        embedding.
        """
        return None

    @abstractmethod
    def project(self, ops: Any, shape: ModelShape, w: Weights, x: Tensor, angles: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden (N, hidden) -> q (N, H, D), k (N, G, D), v (N, G, D), with ``angles`` applied."""

    def attention_scale(self, shape: ModelShape) -> float:
        """What scores are multiplied with before the softmax (Vaswani et al. 2017, section 3.2.1)."""
        return float(shape.head_dim**-0.5)

    @abstractmethod
    def output(self, ops: Any, shape: ModelShape, w: Weights, x: Tensor, attended: Tensor) -> Tensor:
        """Hidden before the layer (N, hidden) and attention output (N, H * D) -> hidden after the layer."""

    @abstractmethod
    def head(self, ops: Any, shape: ModelShape, w: Weights, x: Tensor) -> Tensor:
        """Hidden (R, hidden) of the rows that need logits -> logits (R, vocab)."""


def config_flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """An entry that is true or false; null and a missing one are ``default``. A string is neither."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"config.json: {key}", value, "true or false")
    return default if value is None else value


def config_value(config: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    """A required entry of a checkpoint's config, checked for its type."""
    value = config.get(key)
    if value is None or not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"config.json: {key}", value, "present and of the right type")
    return value
