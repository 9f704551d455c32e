"""Names of activation functions: what configs call them, and which of these mean the same function."""

from __future__ import annotations

from flexgen_bench.core.errors import unknown_choice

# Each with its other names in transformers' ``activations.ACT2CLS``. The tanh forms of GELU (Hendrycks & Gimpel 2016)
# there differ in how they are written down, not in what they compute.
_ALIASES: dict[str, tuple[str, ...]] = {
    "relu": (),
    "silu": ("swish",),
    "gelu": ("gelu_python",),
    "gelu_new": ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
    "quick_gelu": (),
    "relu2": (),
}
ACTIVATIONS = {alias: name for name, others in _ALIASES.items() for alias in (name, *others)}


def activation_of(field: str, name: object) -> str:
    """The name under which ``kernels.ops`` has a function. UserError lists the known ones."""
    if name not in ACTIVATIONS:
        raise unknown_choice(field, str(name), ACTIVATIONS)
    return ACTIVATIONS[str(name)]
