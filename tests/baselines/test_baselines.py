"""The baselines say what transformers says, each in its own process as in real use."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.deepspeed import jit
from flexgen_bench.core.cell import CellSpec, MeasureSpec, ModelSpec, WeightSource
from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.extras import requirements
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.status import Status
from flexgen_bench.core.units import MIB
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.runner.job import CellProcessJob, CellState
from flexgen_bench.runner.launch import cell_environment
from flexgen_bench.runner.worker import load_target

ROOT = Path(__file__).parents[2]
# Very different lengths, five prompts in batches of two: left padding and a last, smaller batch.
PROMPTS = [[5, 6, 7], [9, 3, 4, 8, 7, 6, 5, 4, 30, 31, 32], [11, 12, 13, 14, 15], [20], [30, 31]]
GEN_LEN = 6
SHAPES = {
    "opt": ModelShape("opt-nano", "opt", 3, 48, 4, 4, 12, 96, 97, 64, True),
    "llama": ModelShape("llama-nano", "llama", 3, 48, 6, 2, 8, 80, 97, 64, False),
}
# (name, target, options, family)
TARGETS: dict[str, tuple[str, dict[str, str]]] = {
    "transformers": ("baselines.transformers.system:TransformersSystem", {}),
    "accelerate-cpu": ("baselines.accelerate.system:AccelerateSystem", {"offload": "cpu"}),
    "accelerate-disk": ("baselines.accelerate.system:AccelerateSystem", {"offload": "disk"}),
    "accelerate-auto": ("baselines.accelerate.system:AccelerateSystem", {"offload": "auto"}),
    "deepspeed-cpu": ("baselines.deepspeed.system:DeepSpeedSystem", {"offload": "cpu"}),
    "llama-cpp": ("baselines.llama_cpp.system:LlamaCppSystem", {"load": "mmap", "kv": "f32"}),
}
EVERY = ("transformers", "accelerate-disk", "deepspeed-cpu")
RUNS = [(name, family) for family in SHAPES for name in EVERY]
RUNS += [("accelerate-cpu", "opt"), ("accelerate-auto", "llama"), ("llama-cpp", "llama")]


def write_checkpoint(folder: Path, family: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    shape, model = SHAPES[family], Any
    common = {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied_embeddings,
        "initializer_range": 0.4,  # the greedy token must not hang on rounding
    }
    torch.manual_seed(3)
    if family == "opt":
        model = OPTForCausalLM(OPTConfig(**common, ffn_dim=shape.ffn_size, word_embed_proj_dim=shape.hidden_size))
    else:
        # An end token that would stop the generation early if it were heeded.
        model = LlamaForCausalLM(
            LlamaConfig(
                **common,
                num_key_value_heads=shape.num_kv_heads,
                intermediate_size=shape.ffn_size,
                eos_token_id=list(range(40)),
            )
        )
    model.save_pretrained(folder)


def spec_of(name: str, family: str) -> CellSpec:
    target, options = TARGETS[name]
    return CellSpec(
        system=name,
        target=target,
        model=ModelSpec(SHAPES[family], WeightSource.PATH, "unused"),
        workload=Workload("mixed", PromptKind.SYNTHETIC, len(PROMPTS), 11, GEN_LEN),
        hardware=HardwareProfile("local", Accelerator.NONE),
        dtype=DType.FLOAT32,
        threads=1,
        measure=MeasureSpec(repetitions=2, warmup=0, batch_sizes=(2,)),
        system_options=options,
    )


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], CellState]:
    """What each system made of each model; two processes at a time."""
    folder = tmp_path_factory.mktemp("baselines")
    for family in SHAPES:
        write_checkpoint(folder / family, family)

    def run(which: tuple[str, str]) -> CellState:
        name, family = which
        place = folder / f"{name}-{family}"
        (place / "scratch").mkdir(parents=True)
        job = CellProcessJob(spec_of(name, family), folder / family, place / "scratch", place, PROMPTS)
        state = work(job, place)
        if state.stage == "unprepared":
            made = work(replace(job, prepare_only=True), place)
            assert made.status is Status.OK, made.reason
            state = work(job, place)
        return state

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(run, RUNS), strict=True))


def work(job: CellProcessJob, place: Path) -> CellState:
    """One start of a cell's process."""
    job.write(place / "job.json")
    files = [str(place / "job.json"), str(place / "state.json")]
    subprocess.run(
        [sys.executable, "-m", "flexgen_bench.runner.worker", *files],
        env=cell_environment(1),
        cwd=ROOT,
        capture_output=True,
        timeout=240,
        check=True,
    )
    return CellState.read(place / "state.json")


@pytest.mark.parametrize(("name", "family"), RUNS)
def test_greedy_tokens_equal_those_of_single_prompts(
    name: str, family: str, states: dict[tuple[str, str], CellState], tmp_path: Path
) -> None:
    state = states[name, family]
    if state.status is Status.UNAVAILABLE:
        pytest.skip(state.reason)
    assert state.status is Status.OK, state.reason
    assert state.outputs["token_ids"] == expected_tokens(family, tmp_path)
    assert all(state.validity.values())
    assert state.batch_size == 2
    for sample in state.samples:
        assert sample.prefill_s > 0
        assert sample.decode_s > 0
        assert sample.generated_tokens == len(PROMPTS) * GEN_LEN


def expected_tokens(family: str, folder: Path) -> list[list[int]]:
    """Plain arg-max over the logits of one unpadded prompt at a time."""
    from transformers import AutoModelForCausalLM

    write_checkpoint(folder, family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(GEN_LEN):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


def test_reports_say_where_the_weights_lay(states: dict[tuple[str, str], CellState]) -> None:
    disk = states["accelerate-disk", "opt"].report
    assert disk.lowest_tier == "disk"
    assert disk.realised["weight_bytes"]["disk"] > disk.realised["weight_bytes"]["cpu"]
    assert any("page cache" in note for note in disk.notes)
    resident = states["transformers", "opt"].report
    assert resident.realised["weights"] == {"cpu": 1.0}
    sizes = {
        name: sum(states[name, "opt"].report.realised["weight_bytes"].values())
        for name in (*EVERY, "accelerate-cpu")
        if states[name, "opt"].status is Status.OK
    }
    assert len(set(sizes.values())) == 1, sizes


def system(name: str, tmp_path: Path, **changes: Any) -> Any:
    from flexgen_bench.systems.contract import ModelFiles

    spec = replace(spec_of(name, "opt"), **changes)
    (tmp_path / "model.safetensors").write_bytes(bytes(2 * MIB))
    return load_target(spec.target)(spec, ModelFiles(tmp_path, tmp_path, tmp_path))


@pytest.mark.parametrize("name", ["transformers", "accelerate-cpu", "deepspeed-cpu"])
def test_weights_that_must_be_resident_but_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    small = HardwareProfile("small", Accelerator.NONE, cpu_memory_bytes=MIB)
    with pytest.raises(CannotRun, match=r"2\.00 MiB.*1\.00 MiB") as refusal:
        system(name, tmp_path, hardware=small).check()
    assert refusal.value.status is Status.OOM


def test_auto_leaves_on_disk_what_the_memory_cannot_hold(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from baselines.accelerate import placement

    write_checkpoint(tmp_path, "llama")
    empty = placement.empty_model(tmp_path, torch.float32)
    assert placement.layer_names(empty) == [f"model.layers.{i}" for i in range(3)]
    placed = placement.layers_on(empty, "disk", "cpu")
    tiers = {name: placement.tier_of(name, placed) for name, _ in empty.named_parameters()}
    assert tiers["model.layers.2.mlp.up_proj.weight"] == "disk"
    assert tiers["model.embed_tokens.weight"] == tiers["lm_head.weight"] == "cpu"
    spec = spec_of("accelerate-auto", "llama")
    assert placement.cpu_budget_bytes(spec, 2, empty) > 0
    tight = replace(spec, hardware=HardwareProfile("tight", Accelerator.NONE, cpu_memory_bytes=MIB))
    assert placement.cpu_budget_bytes(tight, 2, empty) == 0


def test_float16_on_a_cpu_is_refused_by_deepspeed(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match="float16"):
        system("deepspeed-cpu", tmp_path, dtype=DType.FLOAT16).check()


def test_missing_header_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr("baselines.deepspeed.jit.shutil.which", lambda name: name)
    with pytest.raises(CannotRun, match="libaio-dev"):
        jit.check_async_io_buildable()


def test_only_locks_that_nobody_holds_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that was killed leaves its lock; every later build waits on it without a word."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("dead", "alive"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    with (tmp_path / "alive/lock").open():
        assert jit.delete_stale_locks() == [tmp_path / "dead/lock"]
    assert not (tmp_path / "dead/lock").exists()
    assert (tmp_path / "alive/lock").exists()


def test_what_a_baseline_needs_is_part_of_this_package() -> None:
    """So that a record of a missing module can name the extra that brings it."""
    for target, _ in TARGETS.values():
        for module in load_target(target).capabilities.needs:
            assert module in requirements()
