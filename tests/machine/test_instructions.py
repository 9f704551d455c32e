"""Which instructions count as usable, and that nothing measured or compiled with some of them is used with others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen_bench.core import instructions
from flexgen_bench.core.instructions import Level, level_of, limited_to, native_arch, usable
from flexgen_bench.core.machine_name import machine_of
from flexgen_bench.machine import measured_rates as store

AVX2_ALONE = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
ZEN3 = "fpu sse2 avx avx2 fma f16c"
SKYLAKE = f"{ZEN3} avx512f avx512bw avx512vl avx512dq avx512cd"
ZEN4 = f"{SKYLAKE} avx512_vnni avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN4} avx512_fp16 amx_bf16 amx_tile amx_int8"


@pytest.mark.parametrize(
    ("flags", "architecture", "level", "has_bfloat16"),
    [
        ("fpu sse2", "x86_64", Level.BASELINE, False),
        (ZEN3, "x86_64", Level.AVX2, False),
        (SKYLAKE, "x86_64", Level.AVX512, False),
        (ZEN4, "x86_64", Level.AVX512_BF16, True),
        (SAPPHIRE_RAPIDS, "x86_64", Level.AMX, True),
        ("fp asimd", "aarch64", Level.BASELINE, False),
        ("fp asimd bf16 i8mm", "aarch64", Level.ARM_BF16, True),
    ],
)
def test_levels(flags: str, architecture: str, level: Level, has_bfloat16: bool) -> None:
    found = level_of(frozenset(flags.split()), architecture)
    assert found is level
    assert found.multiplies_bfloat16 is has_bfloat16


@pytest.mark.parametrize("level", [Level.AVX512, Level.AVX512_BF16, Level.AMX])
def test_the_three_variables_leave_avx2(level: Level) -> None:
    assert usable(level, AVX2_ALONE) is Level.AVX2
    assert limited_to(level, AVX2_ALONE) == "avx2"
    assert native_arch(level, AVX2_ALONE) == "x86-64-v3"


def test_without_limits_a_processor_uses_what_it_has() -> None:
    for level in Level:
        assert usable(level, {}) is level
        assert limited_to(level, {}) == ""
        assert native_arch(level, {}) == "native"
    # A limit above what is there, or one that no library knows, forbids nothing.
    assert limited_to(Level.AVX2, AVX2_ALONE) == ""
    assert native_arch(Level.AVX2, AVX2_ALONE) == "native"
    assert usable(Level.AMX, {"ONEDNN_MAX_CPU_ISA": "ALL", "ATEN_CPU_CAPABILITY": "magic"}) is Level.AMX
    assert usable(Level.ARM_BF16, AVX2_ALONE) is Level.ARM_BF16


def test_one_limited_library_is_enough() -> None:
    one = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    assert usable(Level.AMX, one) is Level.AVX512
    assert limited_to(Level.AMX, one) == "onednn avx512"
    assert native_arch(Level.AMX, one) == "native"
    assert native_arch(Level.AMX, {"FLEXGEN_NATIVE_ARCH": "x86-64-v2"}) == "x86-64-v2"


def test_a_calibration_is_of_the_instructions_it_was_made_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the three variables rates of bfloat16 are a tenth: used without them they would choose float32, and the
    other way round."""
    monkeypatch.setattr(instructions, "here", lambda: Level.AMX)
    paths = {store.path_for(tmp_path, 1)}
    for variables in (
        AVX2_ALONE,
        {"ATEN_CPU_CAPABILITY": "avx2"},
        {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        {"FLEXGEN_NATIVE_ARCH": "x86-64-v3"},
        {"FLEXGEN_NATIVE": "0"},
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            paths.add(store.path_for(tmp_path, 1))
    assert len(paths) == 6
    # Virtual machines on AVX2 and AVX-512 processors may both be called "AMD EPYC".
    monkeypatch.setattr(instructions, "here", lambda: Level.AVX2)
    assert store.path_for(tmp_path, 1) not in paths


def test_a_limited_machine_is_another_machine_in_tables() -> None:
    cpu = {"model": "AMD EPYC", "usable_cores": 2}
    assert machine_of({"cpu": cpu | {"limited_to": "avx2"}}) != machine_of({"cpu": cpu})
    assert machine_of({"cpu": cpu | {"limited_to": ""}}) == machine_of({"cpu": cpu})


COMPILES = """
from flexgen_bench.kernels.native import build
assert build.library("bandwidth") is not None
import os, pathlib
print(*sorted(p.name for p in (pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "flexgen_bench").glob("*.so")))
"""


def test_kernels_are_compiled_for_what_may_be_used(tmp_path: Path) -> None:
    """One folder of builds, a file for each of what they are compiled for."""
    if os.uname().machine != "x86_64":
        pytest.skip("x86-64-v3 is another processor's")
    seen: list[str] = []
    for arch in ("x86-64-v2", "x86-64-v3", "x86-64-v2"):
        variables = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "FLEXGEN_NATIVE_ARCH": arch}
        done = subprocess.run(
            [sys.executable, "-c", COMPILES],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        seen.append(done.stdout.strip())
    first, second, third = (names.split() for names in seen)
    assert len(first) == 1
    assert len(second) == 2
    assert set(first) < set(second) == set(third)
