"""A model's shape in the words of transformers: its config, and the tensors a checkpoint of it holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flexgen_bench.checkpoints.quantized.packed_names import is_packed_part, packed_shapes
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.models.activations import ACTIVATIONS
from flexgen_bench.models.registry import family, shape_from_config
from flexgen_bench.models.stored_names import expected_sources, locate


def hf_config(shape: ModelShape, dtype: DType) -> Any:
    """The transformers config of a shape. Raises UserError for a family that is not known here."""
    from transformers import AutoConfig

    kind = family(shape.family)
    config = AutoConfig.for_model(kind.model_type, **kind.config_from_shape(shape))
    config.dtype = dtype.value
    config.architectures = [kind.architecture]
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int) and pad >= shape.vocab_size:  # a default of the published sizes
        config.pad_token_id = None
    return config


def expected_tensors(shape: ModelShape, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint, as transformers itself would build the model of this config.

    A tied head appears once, under the embedding's name. Experts, which transformers keeps in one tensor, have the
    names of the family's checkpoints, which it reads, too; or are in stacks, packed as the shape says.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    built: dict[str, tuple[int, ...]] = {}
    kind = family(shape.family)
    for name, tensor in model.named_parameters():
        is_packed = shape.options.get("packing") and name.endswith(kind.transposed)
        built |= packed_shapes(name, tuple(tensor.shape)) if is_packed else {name: tuple(tensor.shape)}
    own = expected_sources(kind.inventory(shape))
    stored = locate(own, kind.prefixes, built)
    if not stored.missing or kind.transposed:
        return built
    found = set(stored.found.values())
    return {n: s for n, s in built.items() if n in found} | {kind.prefixes[0] + n: own[n] for n in stored.missing}


def other_types(shape: ModelShape, expected: Iterable[str]) -> dict[str, str]:
    """Those of these tensors whose element type is the same in every checkpoint, with torch's name of it."""
    kind = family(shape.family)
    tensors = (t for layer in kind.inventory(shape).layers for t in layer if t.dtype is DType.FLOAT32)
    single = {kind.prefixes[0] + source: "float32" for tensor in tensors for source in tensor.sources}
    codes = {name: "uint8" for name in expected if shape.options.get("packing") and is_packed_part(name)}
    return single | codes


def check_same_model(shape: ModelShape, config: Mapping[str, Any], where: Path) -> None:
    """Raise StoreError naming every field in which a checkpoint's config is not this shape."""
    try:
        stored = shape_from_config(config, shape.name)
    except UserError as error:
        raise StoreError(f"{where} is not a model that is known here: {error}") from error
    check_same_shape(shape, stored, where)


def check_same_shape(shape: ModelShape, stored: ModelShape, where: Path) -> None:
    """Raise StoreError naming every field in which the shape found in a checkpoint is not the one that was asked
    for."""
    ours, theirs = to_json(shape), to_json(stored)
    options, their_options = ours.pop("options"), theirs.pop("options")
    if "activation" in options:  # a function by any of its names
        options["activation"] = ACTIVATIONS.get(options["activation"], options["activation"])
    pairs = [(key, ours[key], theirs[key]) for key in ours if key != "name"]
    pairs += [(f"options.{key}", options[key], their_options.get(key)) for key in options]
    differ = [
        f"{key} is {there!r} there and {here!r} in model {shape.name}"
        for key, here, there in pairs
        if not _same(here, there)
    ]
    if differ:
        raise StoreError(
            f"{where} is not a checkpoint of {shape.name}: {'; '.join(differ)}. Choose another model, "
            "or set these keys (model.<key>=...) as the checkpoint has them."
        )


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return math.isclose(theirs, ours, rel_tol=1e-6)
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        keys = (set(ours) | set(theirs)) - {"type"}
        return all(_same(ours.get(key), theirs.get(key)) for key in keys)
    return bool(theirs == ours)
