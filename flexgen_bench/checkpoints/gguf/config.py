"""What a GGUF file says about its model, as the config of transformers.

Keys: llama.cpp's (gguf-py/gguf/constants.py, src/llama-model.cpp). Whatever a file states in the namespace of its
architecture and the model here would not compute is refused, so every key must be known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.checkpoints.gguf.families import READERS
from flexgen_bench.checkpoints.gguf.header import GGUFHeader
from flexgen_bench.checkpoints.gguf.metadata import Metadata
from flexgen_bench.checkpoints.gguf.names import Architecture, architecture_of
from flexgen_bench.core.errors import StoreError

# Understood by the readers of all architectures, or told by the others.
_KNOWN = frozenset(
    (
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.scale",
        "attention.sliding_window",
        "attention.causal",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "tensor_data_layout",
    )
)
# Harmless with these values, and not computed with others by an architecture that does not read them.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_gating_func": (1,),  # a softmax
    "expert_weights_scale": (0.0, 1.0),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
}
_WITHOUT_ROTATION = ("bloom",)


def config_from_gguf(header: GGUFHeader) -> dict[str, Any]:
    """The ``config.json`` of the model in a GGUF file, without tokens' ids.

    Raises StoreError naming the key and its value for another architecture, for what is missing, and for what would
    change the results and is not computed here.
    """
    architecture = architecture_of(header)
    _check_keys(header, architecture)
    config = READERS[architecture.name](Metadata(header))
    return config | {"tie_word_embeddings": "output.weight" not in header.tensors}


def _check_keys(header: GGUFHeader, architecture: Architecture) -> None:
    for key, value in header.metadata.items():
        prefix, _, rest = key.partition(".")
        if prefix != architecture.name or rest in architecture.reads:
            continue
        if rest in _NEUTRAL:
            if value not in _NEUTRAL[rest]:
                kind = (
                    f"a mixture of such experts is not known as {architecture.name}"
                    if rest.startswith("expert")
                    else ("the model here would be computed without it")
                )
                allowed = " or ".join(repr(v) for v in _NEUTRAL[rest])
                raise StoreError(f"{header.path}: {key} is {value!r}; {allowed} can be read: {kind}.")
        elif rest not in _KNOWN or (rest.startswith("rope.") and architecture.name in _WITHOUT_ROTATION):
            raise StoreError(
                f"{header.path}: {key} is {value!r}. What it does to the model is not known here, so it is refused."
            )
