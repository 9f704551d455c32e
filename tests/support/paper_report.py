"""What tests of the paper's tables share: systems whose answers are known, records, and a report built from them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from flexgen_bench.cli.report import main
from flexgen_bench.config.build import hardware_profile, model_spec
from flexgen_bench.config.table import ConfiguredSystem, paper_dir
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.compression import Compression
from flexgen_bench.core.record import Sample
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.published.quoted import read_papers
from flexgen_bench.store.writer import write_record
from tests.support.record_factory import make_record, make_spec

FOUR = Compression(4, 64)
PRINTED = read_papers(paper_dir())
ORIGINAL_OPTIONS = (
    "percent",
    "gpu_batch_size",
    "num_gpu_batches",
    "cpu_cache_compute",
    "pin_weight",
    "overlap",
    "sep_layer",
)


def system(name: str, printed_as: str | None, options: dict[str, Any], **more: Any) -> ConfiguredSystem:
    target = "tests.support.paper_fakes:FakePredictor"
    values = {"name": name, "predictor": target, "constants": {"slow": 1.0}, "printed_as": printed_as}
    return ConfiguredSystem(**(values | {"options": options} | more))


def run(tmp_path: Path, *arguments: str, status: int = 0) -> Path:
    """The folder of the paper's tables, built from the records in ``tmp_path/results``."""
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir(exist_ok=True, parents=True)
    assert main([str(results), str(out), "--workers", "1", *arguments]) == status
    return out / "paper"


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def only(rows: list[dict[str, str]], **where: str) -> dict[str, str]:
    matches = [r for r in rows if all(r[k] == v for k, v in where.items())]
    assert len(matches) == 1, matches
    return matches[0]


def paper_cell(name: str, machine: str = "t4", **changes: Any) -> Any:
    return make_spec(
        name,
        model=ModelSpec(model_spec("opt-30b").shape),
        workload=Workload("512-32", PromptKind.SYNTHETIC, num_prompts=64, prompt_len=512, gen_len=32),
        hardware=hardware_profile(machine),
        **changes,
    )


def put(tmp_path: Path, spec: Any, run_number: int = 0, **changes: Any) -> Path:
    """A record of ``spec``: 64 prompts of 32 tokens in 128 s."""
    samples = (Sample(28.0, 100.0, 64 * 512, 64 * 32, 64 * 31),)
    values: dict[str, Any] = {"samples": samples, "batch_size": 64, "run": run_number}
    record = make_record(spec.system, spec=spec, **(values | changes))
    return write_record(record, tmp_path / "results")


def own(tmp_path: Path, text: str, name: str = "mine") -> str:
    folder = tmp_path / "own" / "table"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(text)
    return str(tmp_path / "own")
