"""What the FlexGen paper prints for a job, to stand beside predictions of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.units import GB, GIB
from flexgen_bench.published.policy_text import parse_policy
from flexgen_bench.published.quoted import OOM, Quoted, read_quoted

# The main table, and the one that tells decoding, too.
_GENERATION = {"table": "T2", "metric": "generation throughput"}
_DECODING = {"table": "T3", "metric": "decoding throughput"}
_MACHINE_TABLE, _DEVICE = "T1", "T4"
_MACHINE = {"gpu_memory_bytes": "GPU memory", "cpu_memory_bytes": "CPU DRAM"}  # both in GB
# Of a T4's 16 GiB, what error correction leaves.
_WITHOUT_ECC = 15 / 16


@dataclass(frozen=True)
class Published:
    """The rows that print tok/s of generation and, where there is one, of decoding; "OOM" is a printed value, too.
    lossy: what the paper's policy compresses."""

    generation: Quoted
    decoding: Quoted | None = None
    lossy: Lossy = EXACT

    @property
    def tok_per_s(self) -> float | None:
        """None if it is printed as a word."""
        return self.generation.number

    @property
    def decode_tok_per_s(self) -> float | None:
        return None if self.decoding is None else self.decoding.number

    @property
    def out_of_memory(self) -> bool:
        return self.generation.value == OOM

    @property
    def is_coarse(self) -> bool:
        """Whether it is rounded to one digit ("0.01" may be anything from 0.005 to 0.015): too coarse for a ratio."""
        digits = self.generation.value.replace(".", "").lstrip("0")
        return self.tok_per_s is not None and len(digits) < 2

    @property
    def policy(self) -> str:
        """How the paper ran it."""
        return self.generation.policy

    @property
    def block_size(self) -> int | None:
        """Prompts that it ran at once; None if it does not say."""
        shape = parse_policy(self.policy)
        if shape.gpu_batch_size is None or shape.num_gpu_batches is None:
            return None
        return shape.gpu_batch_size * shape.num_gpu_batches


def published_values(
    tables: Path, system: str, compressed: bool, model: str, prompt_len: int, gen_len: int
) -> Published | None:
    """The paper's values for one GPU; None if it prints none.

    system: as ``SystemConf.printed_as``; compressed: its row with that name and ``(c)``.
    """
    name = f"{system}(c)" if system and compressed else system
    where = {
        "system": name,
        "model": model.upper(),
        "prompt_len": str(prompt_len),
        "gen_len": str(gen_len),
        "gpus": "1",
    }
    rows = [row for row in _rows(tables) if row.matches(where)] if name else []
    generation, decoding = _first(rows, _GENERATION), _first(rows, _DECODING)
    if generation is None:
        return None
    lossy = parse_policy(generation.policy).lossy or EXACT if compressed else EXACT
    return Published(generation, decoding, lossy)


def is_published_machine(tables: Path, hardware: HardwareProfile) -> bool:
    """Whether a profile is the machine of the paper's single-GPU tables, so that a ratio says something about the
    prediction. Memory modules hold powers of two, so its GB may be GiB; of a card's, error correction takes a
    sixteenth."""
    sizes = {row.metric: row.number for row in _rows(tables) if row.table == _MACHINE_TABLE}

    def may_be(name: str) -> tuple[float, ...]:
        stated = sizes.get(name) or 0.0
        return stated * GB, stated * GIB, stated * GIB * _WITHOUT_ECC

    one = hardware.device_match == _DEVICE and hardware.ranks == 1
    return one and all(getattr(hardware, key) in may_be(name) for key, name in _MACHINE.items())


@cache
def _rows(tables: Path) -> Sequence[Quoted]:
    return read_quoted(tables)


def _first(rows: Sequence[Quoted], fields: Mapping[str, str]) -> Quoted | None:
    return next((row for row in rows if row.matches(fields)), None)
