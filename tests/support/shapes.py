"""Small shapes of models, and what tests hand to functions that tell how far they are."""

from __future__ import annotations

from flexgen_bench.core.model import ModelShape


def opt_shape(name: str = "opt-tiny", **changes: object) -> ModelShape:
    """A small OPT; keys of ``options`` may be given like the others."""
    options = {"norm_before": True, "embed_dim": 24, "activation": "relu", "bias": True, "norm_affine": True}
    values: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": 24,
        "num_heads": 3,
        "num_kv_heads": 3,
        "head_dim": 8,
        "ffn_size": 40,
        "vocab_size": 64,
        "max_positions": 48,
        "tied_embeddings": True,
    }
    return _shape(name, "opt", values, options, changes)


def llama_shape(name: str = "llama-tiny", **changes: object) -> ModelShape:
    """A small Llama with grouped-query attention."""
    options = {
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "activation": "silu",
    }
    values: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": 24,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn_size": 40,
        "vocab_size": 64,
        "max_positions": 48,
        "tied_embeddings": False,
    }
    return _shape(name, "llama", values, options, changes)


def mixture_shape(name: str = "mixture-tiny", **changes: object) -> ModelShape:
    """A small Qwen3 mixture: a dense layer, then 8 experts of which a token goes to 2."""
    options = {
        "rope_theta": 10000.0,
        "norm_eps": 1e-6,
        "attention_bias": False,
        "experts": 8,
        "experts_per_token": 2,
        "expert_size": 40,
        "renormalised": True,
        "dense_layers": [0],
    }
    values: dict[str, object] = {
        "num_layers": 3,
        "hidden_size": 24,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn_size": 80,
        "vocab_size": 64,
        "max_positions": 48,
        "tied_embeddings": False,
    }
    return _shape(name, "qwen3_moe", values, options, changes)


def _shape(
    name: str, family: str, values: dict[str, object], options: dict[str, object], changes: dict[str, object]
) -> ModelShape:
    options |= {key: value for key, value in changes.items() if key in options}
    values |= {key: value for key, value in changes.items() if key not in options}
    return ModelShape(name=name, family=family, options=options, **values)  # type: ignore[arg-type]


def no_progress(what: str, done: int, total: int) -> None:
    """For functions that want to tell somebody."""
