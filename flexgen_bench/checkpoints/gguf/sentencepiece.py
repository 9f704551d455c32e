"""Sentencepiece BPE vocabularies ("llama" in GGUF files): tokens with scores, from which the merges follow."""

from __future__ import annotations

from typing import Any

from flexgen_bench.checkpoints.gguf.header import GGUFHeader
from flexgen_bench.checkpoints.gguf.vocabulary import PREFIX, TokenKind, Vocabulary
from flexgen_bench.core.errors import StoreError

_SPACE = "▁"


def sentencepiece_tokenizer(header: GGUFHeader, vocabulary: Vocabulary, space_prefix: bool) -> Any:
    """A tokenizer that merges the two neighbours whose union has the best score, as long as there are such.

    space_prefix: a space is put before every text, and after every special token. Characters without a token become
    bytes. Raises StoreError for a vocabulary of which llama.cpp's order of merging cannot be had: without scores, or
    without tokens for bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {text: number for number, text in enumerate(vocabulary.tokens)}
    bytes_missing = [f"<0x{n:02X}>" for n in range(256) if f"<0x{n:02X}>" not in ids]
    if bytes_missing:
        raise StoreError(
            f"{header.path}: {len(bytes_missing)} tokens for bytes are missing ({bytes_missing[0]}, ...), so not "
            "every text "
            "can be read."
        )
    backend = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(header, vocabulary, ids),
            unk_token=None if vocabulary.unknown is None else vocabulary.tokens[vocabulary.unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    ends: list[Any] = [decoders.Strip(content=" ", left=1)] if space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    return backend


def _merges(header: GGUFHeader, vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of tokens whose union is a token, best score first."""
    merges: list[tuple[float, int, str, str]] = []
    best: dict[float, str] = {}
    for text, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        alone = [letter for letter in text if letter not in ids]
        if kind is TokenKind.NORMAL and len(text) > 1 and alone:
            raise StoreError(
                f"{header.path}: token {text!r} holds {alone[0]!r}, which is no token, so what is merged into it is "
                "not "
                "known. Use the checkpoint that the file was converted from."
            )
    for text, score in zip(vocabulary.tokens, vocabulary.scores, strict=True):
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text)) if text[:cut] in ids and text[cut:] in ids]
        if not pairs:
            continue
        if best.setdefault(score, text) != text:
            raise StoreError(
                f"{header.path}: tokens {best[score]!r} and {text!r} have the same score in {PREFIX}scores, so the "
                "order of "
                "merging is not known. Use the checkpoint that the file was converted from."
            )
        # Of one token's pairs, those of older tokens first, as transformers converts them.
        merges += [(-score, ids[left] * len(ids) + ids[right], left, right) for left, right in pairs]
    return [(left, right) for _, _, left, right in sorted(merges)]
