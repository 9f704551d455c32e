"""Folders whose tokenizer cannot be loaded: the message says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_bench.core.errors import StoreError
from flexgen_bench.engine import tokenization
from flexgen_bench.engine.tokenization import load_tokenizer


def test_a_sentencepiece_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package transformers asked for tiktoken, which cannot read the file either."""
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr(tokenization, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match="pip install sentencepiece protobuf"):
        load_tokenizer(tmp_path)
