"""The text that the small OPT has learned by heart: the beginning of the King James Bible, without the brackets around
words that the translators added."""

from __future__ import annotations

import re
from pathlib import Path

from flexgen_bench.accuracy.data.rows import Rows, ordered

CHARACTERS = 80_000


def learned_text(source: str) -> str:
    """The first 80,000 characters (whole paragraphs) of the package's file."""
    start = source.index("In the beginning God created")
    text = re.sub(r"[\[\]]", "", source[start : start + CHARACTERS + 5000])
    return text[: text.rindex("\n", 0, CHARACTERS)]


def read(folder: Path, *, longest: int) -> Rows:
    """Whole sentences or parts of them (up to a colon or semicolon), together at most ``longest`` characters unless one
    is longer."""
    (path,) = folder.rglob("plain_text_readers_bible.py")
    pieces: list[str] = []
    for sentence in re.split(r"(?<=[.?!:;])\s+", learned_text(path.read_text(encoding="utf-8"))):
        if pieces and len(pieces[-1]) + 1 + len(sentence) <= longest:
            pieces[-1] += f" {sentence}"
        else:
            pieces.append(sentence)
    return {"test": ordered([{"text": piece} for piece in pieces])}
