"""The tokenizer inside a GGUF file, as transformers makes it, with the text splitting that the file asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import StoreError


def gguf_tokenizer(file: Path) -> Any:
    """A tokenizer that can be saved beside a checkpoint. Raises StoreError for one that is not understood."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
    except (ValueError, KeyError, OSError) as error:
        raise StoreError(f"the tokenizer in {file} cannot be read ({error})") from error
    if _splitting(file) == "smollm":
        _split_digits(tokenizer)
    return tokenizer


def _splitting(file: Path) -> str:
    from gguf import GGUFReader

    field = GGUFReader(str(file)).fields.get("tokenizer.ggml.pre")
    return "" if field is None else str(field.contents())


def _split_digits(tokenizer: Any) -> None:
    """Cut every digit off before words are split, as the model was trained with.

    transformers converts all byte-level GGUF tokenizers alike and leaves this out; it shows where several
    spaces stand before a number.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )  # fmt: skip
