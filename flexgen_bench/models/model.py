"""A model as it is computed: its shape, the dtype, and the layout of its packed weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from flexgen_bench.core.compression import Compression
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.models.packing import PackedModel, pack
from flexgen_bench.models.parts import Decoder
from flexgen_bench.models.registry import family


@dataclass(frozen=True)
class Model:
    """What plans and times are made from. packed: compressed as a policy's ``lossy.weights`` says."""

    shape: ModelShape
    dtype: DType
    packed: PackedModel

    @cached_property
    def decoder(self) -> Decoder:
        """The parts it is made of. Kept: a search makes hundreds of plans of one model."""
        return family(self.shape.family).decoder(self.shape)

    @staticmethod
    def of(shape: ModelShape, dtype: DType, compression: Compression | None = None) -> Model:
        """With its weights packed in this way."""
        return Model(shape, dtype, pack(shape, family(shape.family).inventory(shape), dtype, compression))

    def shallow(self, layers: int) -> Model:
        """Its first decoder layers alone (or as it is, if it has no more): what is the same for every layer is found
        out on few."""
        if layers >= self.shape.num_layers:
            return self
        head = replace(self.packed.head, index=layers + 1)
        units = (*self.packed.units[: layers + 1], head)
        return Model(replace(self.shape, num_layers=layers), self.dtype, replace(self.packed, units=units))
