"""Which vector instructions programs use on this processor: those it has, less what the environment forbids.

A number measured with some of them forbidden says nothing about a run with all of them, and the other way round.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path


class Level(StrEnum):
    """Of what is there for numbers; the first is the least. BASELINE: what every processor of the kind has."""

    BASELINE = "baseline"
    AVX2 = "avx2"
    AVX512 = "avx512"
    AVX512_BF16 = "avx512_bf16"
    AVX512_FP16 = "avx512_fp16"
    AMX = "amx"
    ARM_BF16 = "arm_bf16"

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether there are instructions that multiply bfloat16 numbers: without them it takes several times as long as
        float32."""
        return self in (Level.AVX512_BF16, Level.AVX512_FP16, Level.AMX, Level.ARM_BF16)


# What the kernel lists (arch/x86/include/asm/cpufeatures.h); the highest level first.
_FLAGS = (
    (Level.AMX, {"amx_bf16", "amx_tile"}),
    (Level.AVX512_FP16, {"avx512f", "avx512_fp16"}),
    (Level.AVX512_BF16, {"avx512f", "avx512_bf16"}),
    (Level.AVX512, {"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
    (Level.AVX2, {"avx2", "fma"}),
)
_ORDER = (Level.BASELINE, *(level for level, _ in reversed(_FLAGS)))
# Variables by which a library is told to do without, and what its values leave. A value that is not listed forbids
# nothing that a level here stands for (or nothing at all: an unknown one is ignored by the library).
_ONEDNN = {
    "sse41": Level.BASELINE,
    "avx": Level.BASELINE,
    "avx2": Level.AVX2,
    "avx2_vnni": Level.AVX2,
    "avx2_vnni_2": Level.AVX2,
    "avx512_core": Level.AVX512,
    "avx512_core_vnni": Level.AVX512,
    "avx512_core_bf16": Level.AVX512_BF16,
    "avx10_1_512": Level.AVX512_FP16,
    "avx512_core_fp16": Level.AVX512_FP16,
}
LIMITS: Mapping[str, Mapping[str, Mapping[str, Level]]] = {
    "torch": {"ATEN_CPU_CAPABILITY": {"default": Level.BASELINE, "avx2": Level.AVX2}},
    # https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html; the first name that is set counts.
    "onednn": {"ONEDNN_MAX_CPU_ISA": _ONEDNN, "DNNL_MAX_CPU_ISA": _ONEDNN},
    # Intel's reference of oneMKL, "Instruction Set Specific Dispatching". Up to E2 nothing is said of bfloat16.
    "mkl": {
        "MKL_ENABLE_INSTRUCTIONS": {
            "sse4_2": Level.BASELINE,
            "avx": Level.BASELINE,
            "avx2": Level.AVX2,
            "avx2_e1": Level.AVX2,
            "avx512": Level.AVX512,
            "avx512_e1": Level.AVX512,
            "avx512_e2": Level.AVX512,
            "avx512_e3": Level.AVX512_BF16,
        }
    },
}
# What this project's own kernels are compiled for: a value of the compiler's -march, and 0 for none at all.
NATIVE_ARCH, NATIVE_SWITCH = "FLEXGEN_NATIVE_ARCH", "FLEXGEN_NATIVE"
# Whether a GPU's decode passes are recorded as CUDA graphs: 0 for no. Results are the same.
GRAPHS_SWITCH = "FLEXGEN_GRAPHS"
_X86_64 = {Level.BASELINE: "x86-64-v2", Level.AVX2: "x86-64-v3"}


@functools.cache
def here() -> Level:
    """What the processor has."""
    return level_of(frozenset(_flags()), platform.machine())


def level_of(flags: frozenset[str], architecture: str) -> Level:
    """The same, from the flags that the kernel lists (Features on ARM)."""
    if architecture in ("aarch64", "arm64"):
        return Level.ARM_BF16 if "bf16" in flags else Level.BASELINE
    levels = (level for level, needed in _FLAGS if needed <= flags)
    return next(levels, Level.BASELINE)


def used_by_libraries(level: Level | None = None, environment: Mapping[str, str] = os.environ) -> dict[str, Level]:
    """Library -> what it uses. level: what the processor has (None: this one)."""
    own = here() if level is None else level
    return {library: _limited(own, named, environment) for library, named in LIMITS.items()}


def usable(level: Level | None = None, environment: Mapping[str, str] = os.environ) -> Level:
    """What all libraries use."""
    own = here() if level is None else level
    return min(used_by_libraries(own, environment).values(), key=_rank)


def limited_to(level: Level | None = None, environment: Mapping[str, str] = os.environ) -> str:
    """In words what the environment leaves of the processor; "" where that is all of it."""
    own = here() if level is None else level
    used = used_by_libraries(own, environment)
    if all(one is own for one in used.values()):
        return ""
    if len(set(used.values())) == 1:
        return str(usable(own, environment))
    return ", ".join(f"{library} {one}" for library, one in used.items() if one is not own)


def native_arch(level: Level | None = None, environment: Mapping[str, str] = os.environ) -> str:
    """What this project's kernels are compiled for (-march): as FLEXGEN_NATIVE_ARCH says, else as much as torch may use
    here."""
    said = environment.get(NATIVE_ARCH, "").strip()
    if said:
        return said
    own = here() if level is None else level
    torch = _limited(own, LIMITS["torch"], environment)
    return "native" if torch is own else _X86_64.get(torch, "native")


def describe(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the speed of computing depends on, by who computes: libraries, and this project's kernels ("off": torch does
    their work)."""
    native = "off" if environment.get(NATIVE_SWITCH) == "0" else native_arch(None, environment)
    libraries = used_by_libraries(None, environment)
    return {name: str(level) for name, level in libraries.items()} | {"native": native}


def _limited(own: Level, named: Mapping[str, Mapping[str, Level]], environment: Mapping[str, str]) -> Level:
    for variable, levels in named.items():
        if variable in environment:
            limit = levels.get(environment[variable].strip().lower(), own)
            return own if own not in _ORDER else min(own, limit, key=_rank)
    return own


def _rank(level: Level) -> int:
    """What other kinds of processors have comes last: no variable forbids it."""
    return _ORDER.index(level) if level in _ORDER else len(_ORDER)


def _flags() -> tuple[str, ...]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    names = (line.partition(":") for line in lines)
    listed = (value for name, _, value in names if name.strip() in ("flags", "Features"))
    return tuple(next(listed, "").split())
