"""A model as it is computed: its shape, the dtype, and the layout of its packed weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import Compression
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.slices import Slice
from flexgen_bench.models.expert_units import with_experts_apart
from flexgen_bench.models.packing import PackedModel, pack
from flexgen_bench.models.parts import Decoder, Experts, Layer, NormPlace
from flexgen_bench.models.registry import family
from flexgen_bench.models.sliced import check_groups, sliced_inventory, sliced_layers, sliced_shape


@dataclass(frozen=True)
class Model:
    """What plans and times are made from. packed: compressed as a policy's ``lossy.weights`` says. part: of a model
    whose layers several ranks share, the slice that this is; None: it is whole."""

    shape: ModelShape
    dtype: DType
    packed: PackedModel
    layers: tuple[Layer, ...] = field(default=(), repr=False)  # of a shallow one, or of a slice
    part: Slice | None = None

    @cached_property
    def decoder(self) -> Decoder:
        """The parts it is made of. Kept: a search makes hundreds of plans of one model."""
        decoder = family(self.shape.family).decoder(self.shape)
        return replace(decoder, layers=self.layers) if self.layers else decoder

    def packed_for(self, policy: Policy) -> PackedModel:
        """As a policy places it: with experts as units of their own, if they have a placement of their own. UserError
        if that cannot be."""
        if policy.experts is None:
            return self.packed
        if self.part is not None:
            raise UserError(
                "policy.experts",
                to_json(policy.experts),
                f"left out (null): {self.part.ranks} ranks share every layer (gpu.tensor_parallel)",
                "Place its layers with policy.weights.",
            )
        mixtures = [layer for layer in self.decoder.kinds if isinstance(layer.mlp, Experts)]
        normalised = any(layer.mlp_out_norm is not None or layer.place is NormPlace.AFTER for layer in mixtures)
        if normalised or not mixtures:
            why = "layers that normalise what their experts make" if normalised else "no experts"
            allowed = f"left out (null): {self.shape.name} has {why}"
            raise UserError("policy.experts", to_json(policy.experts), allowed, "Place its layers with policy.weights.")
        return self._with_experts_apart

    @cached_property
    def _with_experts_apart(self) -> PackedModel:
        return with_experts_apart(self.packed, self.dtype)

    @property
    def experts_for_one(self) -> float:
        """How many experts there are for each that a token goes to; 1 for a model without."""
        mixtures = [layer.mlp for layer in self.decoder.kinds if isinstance(layer.mlp, Experts)]
        return max((part.count / part.router.top_k for part in mixtures), default=1.0)

    @staticmethod
    def of(shape: ModelShape, dtype: DType, compression: Compression | None = None) -> Model:
        """With its weights packed in this way."""
        return Model(shape, dtype, pack(shape, family(shape.family).inventory(shape), dtype, compression))

    def sliced(self, part: Slice) -> Model:
        """What one of several ranks has that share every layer. UserError if heads, widths or groups of compressed
        weights cannot be divided so."""
        if part.ranks == 1:
            return self
        assert not self.layers, "what is shallow, or a slice, cannot be sliced"
        shape, layers = sliced_shape(self.shape, part), sliced_layers(self.decoder, part)
        inventory = sliced_inventory(family(self.shape.family).inventory(self.shape), self.decoder, part)
        packed = pack(shape, inventory, self.dtype, self.packed.compression)
        check_groups(packed)
        return Model(shape, self.dtype, packed, layers, part)

    def shallow(self, layers: int) -> Model:
        """So many of its decoder layers alone (or as it is, if it has no more): what is the same for every layer is
        found out on few. Its first ones; of a mixture from its first layer with experts on, since before that one
        there are but a few."""
        if layers >= self.shape.num_layers:
            return self
        mixed = (number for number, layer in enumerate(self.decoder.layers) if isinstance(layer.mlp, Experts))
        first = min(next(mixed, 0), self.shape.num_layers - layers)
        stop, units = first + layers, self.packed.units
        kept = (units[0], *units[first + 1 : stop + 1], self.packed.head)
        packed = replace(self.packed, units=tuple(replace(unit, index=place) for place, unit in enumerate(kept)))
        shape = replace(self.shape, num_layers=layers)
        return Model(shape, self.dtype, packed, self.decoder.layers[first:stop], self.part)
