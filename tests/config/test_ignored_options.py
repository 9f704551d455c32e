"""Options that would be ignored, because another is missing or excludes them, are refused; those that mean something
are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flexgen_bench.cells.compose import Cell, command_cells
from flexgen_bench.cells.work import refuse_out_of_place
from flexgen_bench.config.build import model_spec
from flexgen_bench.config.paths import list_models
from flexgen_bench.core.errors import UserError
from flexgen_bench.runner.feasibility import explain
from tests.support.simulated_cli import Run, document, make_run

MODEL = "model=opt-125m"
T4 = ("model=opt-30b", "gpu=t4")
GIVEN = ("policy=half-disk",)

IGNORED = [
    ((MODEL, "system=accelerate", *GIVEN), "policy"),
    ((MODEL, "system=accelerate", "policy.max_latency_s=9"), "policy.max_latency_s"),
    ((MODEL, "system=deepspeed", *GIVEN, "policy.prefetch=3"), "policy"),
    ((MODEL, "+policy.prefetch=3"), "policy.prefetch"),
    ((MODEL, "system=flexgen", "+policy.weights.disk=1.0"), "policy.weights.disk"),
    ((MODEL, *GIVEN, "+policy.max_latency_s=9"), "policy.max_latency_s"),
    ((MODEL, "policy.lossy.group_size=32"), "policy.lossy.group_size"),
    ((MODEL, "location=/tmp"), "location"),
    ((MODEL, "weights=dummy", "location=/tmp"), "location"),
    ((MODEL, "system=llama_cpp", "system.environment.GOMP_SPINCOUNT=0"), "system.environment.GOMP_SPINCOUNT"),
    ((MODEL, "system=accelerate", "+system.environment.LD_PRELOAD=x"), "system.environment.LD_PRELOAD"),
    (("location=/tmp",), "location"),
    (("weights=hub", "location=facebook/opt-1.3b"), "location"),
    ((MODEL, "workload.min_prompt_len=4"), "workload.min_prompt_len"),
    ((MODEL, "measure.tuning_gen_len=3"), "measure.tuning_gen_len"),
    ((MODEL, "gpu=cpu", "gpu.gpu_memory=4GB"), "gpu.gpu_memory"),
    ((MODEL, "+tracker.project=mine"), "tracker.project"),
    ((MODEL, "cell=trained"), "cell"),
    ((MODEL, "gpu=cpu", "+gpu.links.disk_read=1e9"), "gpu.links.disk_read"),
    ((*T4, "measure.repetitions=1"), "measure.repetitions"),
    ((*T4, "threads=1"), "threads"),
    ((*T4, "rerun=true"), "rerun"),
    ((*T4, "calibrate=false"), "calibrate"),
    ((*T4, "tracker=wandb"), "tracker"),
]

HONOURED = [
    (MODEL,),
    (MODEL, "system=flexgen", *GIVEN, "policy.prefetch=3"),
    (MODEL, *GIVEN),  # of all systems, those that follow it
    (MODEL, "policy.max_latency_s=9"),
    (MODEL, "system=flexgen", "policy.max_latency_s=9"),
    (MODEL, "system=accelerate", "policy.lossy.weights=4"),  # which it refuses itself
    (MODEL, "policy.lossy.weights=4", "policy.lossy.group_size=32"),
    (MODEL, "location=null"),
    (MODEL, "weights=hub", "location=facebook/opt-125m"),
    (MODEL, "workload=mixed-text", "workload.min_prompt_len=4"),
    (MODEL, "measure.batch_sizes=[1,2]", "measure.tuning_gen_len=3"),
    (MODEL, "gpu=emulated", "gpu.gpu_memory=4GB", "gpu.links.h2d=1e9"),
    (MODEL, "tracker=wandb", "tracker.project=mine"),
    (MODEL, "gpu=cpu", "threads=1", "rerun=true", "calibrate=false", "measure.repetitions=1"),
    (*T4, "gpu.links.h2d=2.5e10", "gpu.cpu_memory=64GB", "workload.num_prompts=64"),
    (*T4, "policy.max_latency_s=300", "threads=null", "json=true", "results_dir=elsewhere"),
]


def cells(overrides: tuple[str, ...], cache: Path) -> tuple[Cell, ...]:
    """As the command line has them, this machine looked at."""
    found = command_cells(list(overrides))
    for cell in found:
        refuse_out_of_place(cell, explain(cell.spec, cache, [model_spec(m).shape for m in list_models()]))
    return found


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("overrides", "key"), IGNORED, ids=lambda x: " ".join(x) if isinstance(x, tuple) else x)
def test_what_would_be_ignored_is_refused(overrides: tuple[str, ...], key: str, tmp_path: Path) -> None:
    """It was dropped in silence, and what came out was taken for something else."""
    with pytest.raises(UserError) as refused:
        cells(overrides, tmp_path)
    error = refused.value
    assert error.field == key
    assert error.value is not None
    assert error.allowed
    assert error.action


@pytest.mark.one_in(3)
@pytest.mark.parametrize("overrides", HONOURED, ids=" ".join)
def test_what_means_something_is_taken(overrides: tuple[str, ...], tmp_path: Path) -> None:
    assert cells(overrides, tmp_path)


def write_gguf(path: Path) -> None:
    """What a planner needs of a small llama: its header, and a head of its own."""
    import gguf

    file = gguf.GGUFWriter(str(path), "llama")
    file.add_context_length(64)
    file.add_embedding_length(32)
    file.add_block_count(3)
    file.add_feed_forward_length(48)
    file.add_head_count(4)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(100)
    file.add_tensor("output.weight", np.zeros((100, 32), dtype=np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def test_the_shape_comes_from_the_file_where_no_model_is_named(tmp_path: Path) -> None:
    """``weights=path location=FILE.gguf`` planned OPT-125m, whatever was in the file."""
    folder = tmp_path / "my-opt"
    folder.mkdir()
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": 48,
        "num_hidden_layers": 5,
        "ffn_dim": 100,
        "num_attention_heads": 3,
        "word_embed_proj_dim": 48,
        "vocab_size": 131,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (cell,) = command_cells(["weights=path", f"location={folder}", "system=flexgen"])
    shape = cell.spec.model.shape
    assert (shape.name, shape.family, shape.num_layers, shape.hidden_size) == ("my-opt", "opt", 5, 48)
    write_gguf(tmp_path / "small.gguf")
    (cell,) = command_cells(["weights=path", f"location={tmp_path / 'small.gguf'}", "system=flexgen"])
    shape = cell.spec.model.shape
    assert (shape.name, shape.family, shape.num_layers, shape.hidden_size) == ("small", "llama", 3, 32)
    assert (shape.num_kv_heads, shape.vocab_size, shape.ffn_size) == (2, 100, 48)
    assert not shape.tied_embeddings
    # A model that is named must be the one that is there: OPT-30B was planned with a folder of something else.
    with pytest.raises(UserError, match="not a checkpoint of opt-125m"):
        command_cells([MODEL, "weights=path", f"location={folder}", "system=flexgen"])


@pytest.mark.parametrize("name", ["nothing", "nothing.gguf", "notes.txt", "empty", "broken.gguf"])
def test_what_is_no_model_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError) as refused:
        command_cells(["weights=path", f"location={tmp_path / name}"])
    assert refused.value.field == "location"


def test_the_line_of_json_is_for_programs(tmp_path: Path) -> None:
    run: Run = make_run(tmp_path)
    command = ("model=opt-125m", "gpu=t4", "system=transformers")
    assert document(run(*command))["simulated"]
    assert document(run(*command, "json=true"))["simulated"]
    assert '{"records"' not in run(*command, "json=false").stdout
