"""What a model family must supply. One file per family implements this; ``registry.py`` finds it by name.

Tensors are given and returned as flattened tokens, so that prompts of different lengths share one matrix
product without padding: N = tokens of all sequences of a micro-batch. A weight is a tensor, or what ``ops.linear``
takes in its place (a compressed one): formulas (``formulas.py``) only hand weights to ``ops``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.inventory import Inventory, Names, inventory_of
from flexgen_bench.models.parts import Decoder
from flexgen_bench.models.rope import steady_positions


class ModelFamily(ABC):
    """One family of decoder-only transformers: how its configs are read, and which parts its models are made of."""

    name: ClassVar[str]
    # The class of transformers that this family's checkpoints name in config.json, and its model_type.
    architecture: ClassVar[str]
    model_type: ClassVar[str]
    # What its checkpoints call their tensors, and under which prefixes, tried in order.
    names: ClassVar[Names]
    prefixes: ClassVar[tuple[str, ...]] = ("", "model.")
    # Other names that the same tensors have in some checkpoints, and other model_types under which configs describe the
    # same models, with the architectures they name.
    other_names: ClassVar[tuple[Names, ...]] = ()
    other_prefixes: ClassVar[tuple[str, ...]] = ("",)
    other_types: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # Ends of the names of stacks whose matrices are stored (in, out).
    transposed: ClassVar[tuple[str, ...]] = ()
    # Entries of a config that change what other families' models compute, and which this one reads.
    reads: ClassVar[Collection[str]] = ()
    # The entry that says how many layers a checkpoint may hold behind the model's own: they guess at further tokens
    # (multi-token prediction), and the next one is the same without them.
    further_layers_key: ClassVar[str | None] = None

    @abstractmethod
    def shape_from_config(self, config: Mapping[str, Any], name: str) -> ModelShape:
        """Translate a Hugging Face ``config.json``. UserError names what this family cannot do."""

    @abstractmethod
    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        """The inverse: entries of a ``config.json`` that describe this shape."""

    @abstractmethod
    def decoder(self, shape: ModelShape) -> Decoder:
        """The parts of a model of this shape."""

    def inventory(self, shape: ModelShape, names: Names | None = None) -> Inventory:
        """Names, shapes and checkpoint sources of every weight; names: other than the family's own."""
        return inventory_of(self.decoder(shape), names or self.names)

    def parameters(self, shape: ModelShape) -> tuple[int, int]:
        """Parameters of a model of this shape, a tied table once; and those of them that a token meets, which of a
        mixture of experts are fewer. Like layers are counted once."""
        decoder = self.decoder(shape)
        kinds = decoder.kinds
        inventory = inventory_of(replace(decoder, layers=kinds), self.names)
        counts = Counter(decoder.layers)
        values = [sum(t.spec.num_values for t in layer) for layer in inventory.layers]
        total = inventory.num_values + sum((counts[k] - 1) * n for k, n in zip(kinds, values, strict=True))
        return total, total - sum(count * kind.idle_values for kind, count in counts.items())

    def is_further(self, name: str, config: Mapping[str, Any], shape: ModelShape) -> bool:
        """Whether a tensor of a checkpoint belongs to layers behind the model's own."""
        count = config.get(self.further_layers_key) if self.further_layers_key else None
        behind = range(shape.num_layers, shape.num_layers + (count if isinstance(count, int) else 0))
        return any(f".{self.names.layers}.{number}." in f".{name}" for number in behind)

    def steady_positions(self, shape: ModelShape) -> int:
        """Up to which length of its sequence the keys of a token depend on what precedes it alone. Of longer ones they
        depend on the length, too, so that sequences which begin alike cannot share them."""
        steady = [steady_positions(rotary.scaling) for rotary in self.decoder(shape).rotaries]
        return min((s for s in steady if s is not None), default=shape.max_positions)

    def rotated_anew_beyond(self, shape: ModelShape) -> int | None:
        """A sequence that grows past so many tokens has all of its keys rotated anew, which the engine cannot do; None:
        never."""
        return None


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


def config_number(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """A number above 0, or ``default`` where it is missing or null."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError(f"config.json: {key}", value, "a number above 0, or null")
    return value


def must_be(config: Mapping[str, Any], family: str, **values: tuple[Any, ...]) -> None:
    """UserError for an entry that is none of the values for which this family has formulas; missing ones are taken for
    the first."""
    for key, allowed in values.items():
        if config.get(key, allowed[0]) not in allowed:
            named = " or ".join(map(repr, allowed))
            raise UserError(f"config.json: {key}", config[key], f"{named} for a {family} model")
