"""What each token of a tokenizer stands for, as bytes of UTF-8.

Bytes, since a token may hold a part of a character. Where the vocabulary states them (byte-level
BPE, the byte fallback of sentencepiece) they are read from it; all else is text, and is what the
tokenizer's own decoder adds for the token after another one: sentencepiece drops the space of the
very first token, WordPiece puts one before every other.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

REPLACEMENT = "\ufffd"
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_EACH_BYTE = "flexgen_bench.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """A mark for each byte that is part of no character, as decoders with byte fallback do."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class TokenPieces:
    """The pieces of text behind the ids of a tokenizer of ``transformers``.

    special: the ids that are hidden from text, each with the text that stands for it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {i: str(t.content) for i, t in tokenizer.added_tokens_decoder.items()}
        hidden = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.special = {
            int(i): str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(hidden | set(tokenizer.all_special_ids))
        }
        self._is_byte_level = _is_byte_level(tokenizer)
        self._stated: dict[int, bytes | None] = {}

    def is_known(self, token: int) -> bool:
        """Whether it stands for anything: models often have more rows than their tokenizer has
        tokens."""
        return bool(self._tokenizer.convert_ids_to_tokens(token))

    def after(self, previous: int | None, token: int) -> bytes:
        """What a known ``token`` adds to text that ends with the token ``previous`` (None: that is
        empty)."""
        if previous is None:
            text = self._decoded([token])
            if REPLACEMENT not in text:
                return text.encode()
        if token not in self._stated:
            self._stated[token] = self._bytes_in_vocabulary(token)
        stated = self._stated[token]
        return self._added_text(previous, token).encode() if stated is None else stated

    def utf8(self) -> codecs.IncrementalDecoder:
        """From bytes to text. Bytes that are part of no character are marked as the tokenizer's own
        decoder marks them."""
        errors = "replace" if self._is_byte_level else _EACH_BYTE
        return codecs.getincrementaldecoder("utf-8")(errors)

    def marks(self, incomplete: bytes) -> int:
        """With how many U+FFFD an incomplete character is marked."""
        return len(self.utf8().decode(incomplete, True))

    def _bytes_in_vocabulary(self, token: int) -> bytes | None:
        """None where the vocabulary states text."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if self._is_byte_level:
            if token not in self._added and all(letter in _BYTES for letter in name):
                return bytes(_BYTES[letter] for letter in name)
            return name.encode()
        stated = _FALLBACK.fullmatch(name)
        if stated and self._decoded([token]) != name:  # this decoder knows of byte fallback
            return bytes([int(stated[1], 16)])
        return None

    def _added_text(self, previous: int | None, token: int) -> str:
        if previous is not None:
            before, both = self._decoded([previous]), self._decoded([previous, token])
            if both.startswith(before):
                return both[len(before) :]
        return self._decoded([token])

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether the letters of its tokens stand for bytes, as in GPT-2."""
    from tokenizers import decoders

    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if isinstance(decoder, decoders.Sequence):
        return any(d["type"] == "ByteLevel" for d in json.loads(decoder.__getstate__())["decoders"])
    return isinstance(decoder, decoders.ByteLevel)


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet (Radford et al. 2019, ``bytes_to_unicode``): a byte that prints stands for
    itself, the others for the letters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()
