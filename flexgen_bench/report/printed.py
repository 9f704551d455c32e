"""What the FlexGen paper prints for a job, to stand beside predictions of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.units import GB
from flexgen_bench.report.paper.policy_text import parse_policy
from flexgen_bench.report.paper.quoted import OOM, Quoted, read_quoted

# The main table, and the one that tells decoding, too.
_GENERATION = {"table": "T2", "metric": "generation throughput"}
_DECODING = {"table": "T3", "metric": "decoding throughput"}
_MACHINE_TABLE, _DEVICE = "T1", "T4"
_MACHINE = {"gpu_memory_bytes": "GPU memory", "cpu_memory_bytes": "CPU DRAM"}  # both in GB


@dataclass(frozen=True)
class Printed:
    """tok/s as printed; "OOM" is a printed value, too. policy: how the paper ran it; lossy: what that compresses."""

    tok_per_s: float | None
    out_of_memory: bool
    decode_tok_per_s: float | None
    policy: str
    lossy: Lossy = EXACT


def printed(
    tables: Path, system: str, compressed: bool, model: str, prompt_len: int, gen_len: int
) -> Printed | None:
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
    return Printed(
        tok_per_s=generation.number,
        out_of_memory=generation.value == OOM,
        decode_tok_per_s=None if decoding is None else decoding.number,
        policy=generation.policy,
        lossy=parse_policy(generation.policy).lossy if compressed else EXACT,
    )


def is_printed_machine(tables: Path, hardware: HardwareProfile) -> bool:
    """Whether a profile is the machine of the paper's single-GPU tables, so that a ratio says something about the prediction."""
    sizes = {row.metric: row.number for row in _rows(tables) if row.table == _MACHINE_TABLE}
    return hardware.device_match == _DEVICE and all(
        getattr(hardware, key) == (sizes.get(name) or 0) * GB for key, name in _MACHINE.items()
    )


@cache
def _rows(tables: Path) -> Sequence[Quoted]:
    return read_quoted(tables)


def _first(rows: Sequence[Quoted], wanted: Mapping[str, str]) -> Quoted | None:
    return next((row for row in rows if row.matches(wanted)), None)
