"""The original FlexGen behind the System contract: settings, refusals, its own process. A stand-in package answers for
it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from baselines.common import beside
from baselines.flexgen_original import driver, package
from baselines.flexgen_original.predictor import FlexGenOriginalPredictor
from baselines.flexgen_original.settings import DEFAULT, PUBLISHED, Settings, choose
from baselines.flexgen_original.system import MODELS, FlexGenOriginal
from flexgen_bench.config.build import hardware_profile, model_spec
from flexgen_bench.core.cell import CellSpec, ModelSpec, WeightSource
from flexgen_bench.core.compression import EXACT, Compression, Lossy
from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.systems.contract import ModelFiles
from tests.conftest import ROOT
from tests.support.shapes import opt_shape

CUDA = HardwareProfile("gpu16", Accelerator.CUDA, gpu_memory_bytes=16 * 10**9)
FOUR_BIT = Lossy(Compression(4), Compression(4))


def spec(**changes: Any) -> CellSpec:
    cell = CellSpec(
        system="flexgen_original",
        target="baselines.flexgen_original.system:FlexGenOriginal",
        model=model_spec("opt-125m"),
        workload=Workload("equal", PromptKind.SYNTHETIC, 5, 4, 3, min_prompt_len=4),
        hardware=CUDA,
        dtype=DType.FLOAT16,
        threads=1,
    )
    return replace(cell, **changes)


def system(tmp_path: Path, cell: CellSpec) -> FlexGenOriginal:
    return FlexGenOriginal(cell, ModelFiles(tmp_path, tmp_path, tmp_path))


def test_published_settings() -> None:
    plain = choose("opt-30b", {}, EXACT)
    assert plain.block_size == 144
    assert plain.percent == (20, 80, 0, 100, 0, 100)
    assert plain.lowest_tier == "cpu"
    compressed = choose("opt-175b", {"gpu_batch_size": 16, "num_gpu_batches": 1}, FOUR_BIT)
    assert (compressed.block_size, compressed.pin_weight) == (16, False)
    assert compressed.compress_weight
    assert compressed.compress_cache
    assert choose("opt-30b", {}, Lossy(kv_cache=Compression(4))).compress_weight is False
    assert choose("opt-13b", {}, EXACT) == DEFAULT
    assert PUBLISHED["opt-175b", False].lowest_tier == "disk"
    assert PUBLISHED["opt-6.7b", False].lowest_tier == "gpu"


def test_the_combination_with_wrong_tokens_is_known() -> None:
    """Run before: 56 % of the tokens right with two batches, attention on the cpu and overlap; all of them
    otherwise."""
    wrong = choose("opt-30b", {}, EXACT)
    assert wrong.is_known_wrong
    assert not replace(wrong, overlap=False).is_known_wrong
    assert not replace(wrong, num_gpu_batches=1).is_known_wrong


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"percent": "100 0 100"}, "six whole numbers"),
        ({"percent": [60, 60, 0, 100, 0, 100]}, "at most 100 together"),
        ({"percent": [0, 100, 0, 100, 50, 50]}, "activations on one tier"),
        ({"gpu_batch_size": 0}, "gpu_batch_size = 0"),
        ({"overlap": "yes"}, "overlap = 'yes': must be true or false"),
        ({"percents": [0] * 6}, "must be one of"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], names: str) -> None:
    with pytest.raises(UserError, match=names):
        choose("opt-30b", options, EXACT)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hardware": HardwareProfile("cpu", Accelerator.NONE)}, "needs a CUDA device"),
        ({"dtype": DType.BFLOAT16}, "float16, not in bfloat16"),
        ({"model": ModelSpec(opt_shape())}, "does not know opt-tiny"),
        ({"model": replace(model_spec("opt-125m"), weights=WeightSource.HUB)}, "weights=dummy"),
        ({"lossy": Lossy(weights=Compression(8))}, "4 bits in groups of 64 only"),
        ({"lossy": Lossy(value_share=0.1)}, "value_share"),
    ],
)
def test_refusals(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match=why):
        system(tmp_path, spec(**changes)).check()


@pytest.mark.parametrize(("prompts", "block"), [(1, 1), (5, 4), (6, 6), (100, 6)])
def test_blocks_are_whole_batches(prompts: int, block: int, tmp_path: Path) -> None:
    cell = spec(
        workload=Workload("w", PromptKind.SYNTHETIC, prompts, 4, 3, min_prompt_len=4),
        system_options={"gpu_batch_size": 2, "num_gpu_batches": 3},
    )
    made = system(tmp_path, cell)
    made.check()
    assert made.default_batch_size() == block
    with pytest.raises(CannotRun, match="no whole number of batches"):
        Settings(2, 3, DEFAULT.percent).for_block(5)


def test_the_package_goes_into_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution\n")

    monkeypatch.setattr(beside.subprocess, "run", pip)
    monkeypatch.setattr(beside.importlib.util, "find_spec", lambda name: None)
    assert not package.PACKAGE.is_installed(tmp_path)
    with pytest.raises(CannotRun, match=r"No matching distribution.*PIP_FIND_LINKS"):
        package.PACKAGE.install(tmp_path)
    assert "--no-deps" in commands[0]
    assert str(package.PACKAGE.folder(tmp_path)) in commands[0]
    assert commands[0][-3:] == ["flexgen==0.1.8", "attrs", "tqdm"]


STAND_IN = '''
"""What the driver uses of the original, on a processor: the next token is the last one plus one."""
import numpy as np
from types import SimpleNamespace
COSTS = []
def CompressionConfig(**_): return None
def get_opt_config(name):
    sizes = {"num_hidden_layers": 12, "input_dim": 768, "n_head": 12, "ffn_embed_dim": 3072, "vocab_size": 50272}
    return SimpleNamespace(name=name, **sizes)
def Policy(size, count, *percent, **other): return SimpleNamespace(block=size * count, percent=percent, **other)
def TorchDevice(name): return name
TorchDisk = TorchDevice
def TorchMixedDevice(devices): return devices
class ExecutionEnv(SimpleNamespace):
    def close_copy_threads(self): print("closed")
class OptLM:
    def __init__(self, config, env, path, policy):
        assert path == "_DUMMY_" and len(policy.percent) == 6
        self.policy = policy
    def generate(self, inputs, max_new_tokens):
        print("noise that is no answer")
        assert len(inputs) == self.policy.block
        if inputs[0][0] == 666: raise RuntimeError("CUDA error: out of memory")
        COSTS.extend([2.0] + [0.5] * (max_new_tokens - 1))
        first = np.array(inputs)
        return np.concatenate([first, first[:, -1:] + 1 + np.arange(max_new_tokens)], axis=1)
def timers(name): return SimpleNamespace(reset=COSTS.clear, costs=COSTS)
'''


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    folder = package.PACKAGE.folder(tmp_path) / "flexgen"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "stand_in.py").write_text(STAND_IN)
    for module in ("flex_opt", "compression", "pytorch_backend", "utils", "timer"):
        (folder / f"{module}.py").write_text("from flexgen.stand_in import *\n")
    return tmp_path


def loaded(folder: Path, block: int, **changes: Any) -> FlexGenOriginal:
    hardware = replace(CUDA, gpu_memory_bytes=None)
    cell = spec(hardware=hardware, system_options={"gpu_batch_size": 2}, **changes)
    made = system(folder, cell)
    made.check()
    assert made.is_prepared()
    try:
        made.load(block)
    except BaseException:
        made.close()
        raise
    return made


def test_a_job_runs_block_by_block_in_its_own_process(stand_in: Path) -> None:
    made = loaded(stand_in, 2)
    seen: list[tuple[str, int, int]] = []
    prompts = [[10 * i] * 4 for i in range(1, 6)]
    result = made.generate(prompts, 3, lambda *step: seen.append(step))
    assert result.token_ids == tuple((10 * i + 1, 10 * i + 2, 10 * i + 3) for i in range(1, 6))
    assert (result.prefill_s, result.decode_s) == (3 * 2.0, 3 * 2 * 0.5)
    assert seen[-2:] == [("prefill", 20, 20), ("decode", 10, 10)]
    report = made.report()
    assert report.realised["gpu_batch_size"] == 2
    assert report.lowest_tier == "gpu"
    made.close()
    made.close()
    assert made._process is None


def test_memory_that_runs_out_there_is_memory_that_runs_out_here(stand_in: Path) -> None:
    made = loaded(stand_in, 2)
    with pytest.raises(MemoryError, match="out of memory"):
        made.generate([[666, 1]] * 2, 3, lambda *step: None)
    made.close()


def test_a_name_with_another_shape_is_not_measured_under_it(stand_in: Path) -> None:
    other = ModelSpec(replace(model_spec("opt-125m").shape, num_layers=3))
    with pytest.raises(RuntimeError, match="num_hidden_layers=12, this cell 3"):
        loaded(stand_in, 2, model=other)


def test_a_process_that_dies_says_so(stand_in: Path) -> None:
    (package.PACKAGE.folder(stand_in) / "flexgen" / "flex_opt.py").write_text("import os; os._exit(3)")
    with pytest.raises(RuntimeError, match="ended with status 3"):
        loaded(stand_in, 2)


def test_answers_are_lines_of_json() -> None:
    class Fails(driver.Original):
        def __init__(self, build: dict[str, Any]) -> None:
            raise MemoryError("cannot pin")

    sink = io.StringIO()
    driver.serve(io.StringIO('{"model": "x"}\n'), sink, Fails)
    answer = json.loads(sink.getvalue())
    assert answer["out_of_memory"]
    assert "cannot pin" in answer["error"]


def test_every_model_it_knows_is_known_here() -> None:
    for name in MODELS:
        assert model_spec(name).shape.family == "opt"


def test_nothing_of_the_original_is_imported_by_the_system() -> None:
    code = textwrap.dedent("""
        import sys, baselines.flexgen_original.system
        sys.exit(any(name in sys.modules for name in ("flexgen", "torch", "transformers")))
    """)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_it_is_compared_at_the_largest_batch_that_fits_too() -> None:
    """Its published batch of 2 is what fits a T4; on a card that is held to the same memory by a cap, with its context
    outside, more sequences do, and they share every reading of the weights."""
    hardware = hardware_profile("h100-16gb")
    constants = yaml.safe_load((ROOT / "conf/system/flexgen_original.yaml").read_text())["constants"]
    job = Job(model_spec("opt-6.7b").shape, DType.FLOAT16, hardware, 512, 32)
    found = {
        size: FlexGenOriginalPredictor(constants, {"gpu_batch_size": size}).predict(job)
        for size in (None, 4, "largest")
    }
    published, four, largest = found.values()
    assert published.settings["gpu_batch_size"] == 2
    assert largest.settings["gpu_batch_size"] >= 4
    assert published.tok_per_s < four.tok_per_s <= largest.tok_per_s
    assert any("the largest batches that fit" in note for note in published.notes)
    assert largest.bytes["gpu"] <= hardware.gpu_memory_bytes
    assert not any("times as fast" in note for note in largest.notes)
