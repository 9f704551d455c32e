"""The commands and the Python that README, CONTRIBUTING and docs show, found by reading the files."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"\s#( .*)?$")


@dataclass(frozen=True)
class Block:
    file: str
    language: str
    text: str


def blocks() -> list[Block]:
    """Every fenced block of README.md, CONTRIBUTING.md and docs/."""
    fenced = []
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for path in pages:
        for match in _FENCE.finditer(path.read_text(encoding="utf-8")):
            text = textwrap.dedent(match["text"])
            fenced.append(Block(str(path.relative_to(ROOT)), match["language"], text))
    return fenced


def commands() -> list[tuple[str, str]]:
    """File and command of each line of the ``sh`` blocks: without its comment, what continues it joined."""
    file_commands = []
    for block in blocks():
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                command = " ".join(_COMMENT.sub("", line).split())
                if command and not command.startswith("#"):
                    file_commands.append((block.file, command))
    return file_commands
