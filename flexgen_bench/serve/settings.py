"""What a server may be told."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from flexgen_bench.core.errors import UserError

_MAY_BE_NONE = ("queue", "stop_s", "kept_tokens")


@dataclass(frozen=True)
class ServeSettings:
    """sequences: answered at once; the others wait, at most ``queue`` of them, and more are told to come back. Most
    tokens of a prompt and of an answer: memory for all sequences of that size is taken at the start. kept_tokens: whose
    keys and values stay when their request has ended, for others that begin alike. body_bytes, file_bytes: most of a
    request, of a file for batches. request_s: most of an answer, from its arrival. stop_s: most that answers under way
    may take after Ctrl-C. keys: who may ask; none: everybody. state_dir: files and batches."""

    sequences: int = 16
    queue: int = 256
    prompt_tokens: int = 2048
    answer_tokens: int = 512
    kept_tokens: int = 8192
    body_bytes: int = 2 * 2**20
    file_bytes: int = 2**30
    request_s: int = 600
    stop_s: int = 10
    keys: tuple[str, ...] = ()
    state_dir: Path = Path("flexgen-bench-server")

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in _MAY_BE_NONE else 1
            if isinstance(value, int) and value < least:
                raise UserError(field.name, value, f"an integer of at least {least}")


NUMBERS = tuple(f.name for f in fields(ServeSettings) if f.name not in ("keys", "state_dir"))


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line; lines that begin with # are comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--keys", str(path), "a file with a key in every line") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise UserError("--keys", str(path), "a file with a key in every line", "It has none.")
    return keys
