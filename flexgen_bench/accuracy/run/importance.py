"""Measure how large the inputs of every weight matrix are on a text: what ``scales: calibrated`` needs.

The text must be none that the model is judged on. The King James Bible is far from what tasks are made of, so what
calibration wins does not come from knowing them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.engine.added_tokens import AddedTokens
from flexgen_bench.memory.importance import IMPORTANCE

if TYPE_CHECKING:
    from torch import Tensor

TOKENS, WINDOW = 16384, 512


def measure(model: Any, windows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The mean square of each input of each linear layer, over all tokens of all windows: parameter name -> (inputs,)
    float32.

    model: a causal model of transformers. Its head, and what it does not reach, are left out. UserError for a mixture
    of experts, each of which meets tokens of its own.
    """
    import torch

    if any(parameter.dim() > 2 for parameter in model.parameters()):  # of all experts together
        allowed = "a model without experts: how large the inputs of each are is not measured"
        raise UserError("model", type(model).__name__, allowed, "Compress its weights with scales: mse.")
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...], _output: Any) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + x.square().sum(dim=0)
            seen[name] = seen.get(name, 0) + len(x)

        return hook

    head = model.get_output_embeddings()
    hooks = [
        module.register_forward_hook(note(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    try:
        with torch.no_grad():
            for window in windows:
                model.base_model(torch.tensor([list(window)]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / seen[name] for name, total in sums.items()}


def write_importance(folder: Path, importance: dict[str, Tensor]) -> Path:
    """Beside a checkpoint's weights, as a whole or not at all."""
    from safetensors.torch import save_file

    path = folder / IMPORTANCE
    partial = path.with_suffix(".partial")
    save_file(importance, partial)
    os.replace(partial, path)
    return path


def windows_of(folder: Path, text: str, tokens: int, longest: int) -> list[list[int]]:
    """``tokens`` tokens from places spread evenly over the text, in windows that begin as the tokenizer has sequences
    begin."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text[: tokens * 64], add_special_tokens=False, verbose=False).input_ids
    first = AddedTokens.of(tokenizer).before
    length = min(WINDOW, longest) - len(first)
    count = min(max(1, tokens // length), max(1, len(ids) // length))
    return [[*first, *ids[i * len(ids) // count :][:length]] for i in range(count)]
