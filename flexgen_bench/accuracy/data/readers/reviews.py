"""Sentences of reviews with the mean of many people's ratings (``vaderSentiment``, Hutto and Gilbert 2014)."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from flexgen_bench.accuracy.data.rows import Rows, ordered, split_off


def snippets(folder: Path, *, member: str, at_least: float, shortest: int, examples: int = 0) -> Rows:
    """Sentences that people agree on. member: a file of the archive inside the package: number, mean rating in -4..4,
    text.

    at_least: how far from neutral the mean must be: doubtful ones are left out. shortest: characters of a sentence.
    label: 1 is positive.
    """
    rows = []
    for archive in sorted(folder.rglob("*.tar.gz")):
        with tarfile.open(archive) as inner:
            entry = next(m for m in inner.getmembers() if Path(m.name).name == member)
            file = inner.extractfile(entry)
            if file is None:
                raise ValueError(f"{member} in {archive} is not a file")
            for line in io.TextIOWrapper(file, encoding="utf-8", errors="replace"):
                _, mean, text = line.rstrip("\r\n").split("\t", 2)
                clean = text.replace("''", '"').strip()
                if abs(float(mean)) >= at_least and len(clean) >= shortest and "�" not in clean:
                    rows.append({"text": clean, "label": int(float(mean) > 0)})
    return split_off(ordered(rows), examples)
