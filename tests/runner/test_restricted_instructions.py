"""A whole cell as on a processor with AVX2 and nothing above: libraries are told so, and kernels are compiled for
it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.core.instructions import Level, here, limited_to

AVX2_ALONE = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def run(
    folder: Path, cache: Path, systems: str, variables: dict[str, str]
) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, Any]]]:
    """The tiny cell; its records by system."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "flexgen_bench",
            "-m",
            "suite=tiny",
            f"system={systems}",
            "dtype=fastest",
            "measure.repetitions=1",
            "calibrate=false",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"FLEXGEN_BENCH_CACHE": str(cache)} | variables,
    )
    records = [json.loads(p.read_text()) for p in (folder / "results").rglob("*.json")]
    return done, {record["spec"]["system"]: record for record in records}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is of x86-64")
@pytest.mark.slow
def test_a_cell_under_avx2_alone(tmp_path: Path, shared_cache: Path) -> None:
    """On such a processor ``make bench`` ended with an error. It computes in float32 there, and as everywhere."""
    if here() is Level.BASELINE:
        pytest.skip("this processor has no AVX2")
    restricted, free = tmp_path / "restricted", tmp_path / "free"
    for folder in (restricted, free):
        folder.mkdir()
    builds = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "builds")}
    done, records = run(restricted, shared_cache, "flexgen,transformers", AVX2_ALONE | builds)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {record["status"] for record in records.values()} == {"ok"}
    for record in records.values():
        assert record["spec"]["dtype"] == "float32"
        cpu = record["environment"]["cpu"]
        assert cpu["instructions"]["torch"] == "avx2"
        assert cpu["limited_to"] == limited_to(None, AVX2_ALONE)
        assert record["environment"]["variables"].items() >= AVX2_ALONE.items()
    assert list((tmp_path / "builds").rglob("*.so")), "kernels of its own"
    tokens = records["flexgen"]["outputs"]["token_ids"]
    assert tokens == records["transformers"]["outputs"]["token_ids"]

    # With all instructions the same job has the same tokens, and is measured: the record of the restricted one is
    # another machine's.
    os.rename(restricted / "results", free / "results")
    before = {record["run_id"] for record in records.values()}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "flexgen_bench",
            "suite=tiny",
            "system=flexgen",
            "dtype=float32",
            "measure.repetitions=1",
            "calibrate=false",
        ],
        cwd=free,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=os.environ | {"FLEXGEN_BENCH_CACHE": str(shared_cache)},
    )
    [path] = json.loads(done.stdout.strip().splitlines()[-1])["records"]
    again = json.loads((free / path).read_text())
    assert again["outputs"]["token_ids"] == tokens
    assert (again["run_id"] in before) == (limited_to(None, AVX2_ALONE) == "")
