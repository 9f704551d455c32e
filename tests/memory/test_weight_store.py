"""Packed weight stores: complete or refused, resumable, streamed from any form of checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.engine.store_plan import store_plan
from flexgen_bench.memory import weight_store
from tests.support.tiny_models import random_model, save


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(random_model("opt"), tmp_path / "ckpt")


def convert(checkpoint: Path, cache: Path) -> PackedWeights:
    return PackedWeights.from_checkpoint(checkpoint, DType.FLOAT32, cache)


def stored_bytes(weights: PackedWeights) -> bytes:
    return weights.store.path.read_bytes()


def place(weights: PackedWeights, tier: Tier, folder: Path) -> None:
    """Read every unit once: resident ones while loading, streamed ones in the first pass."""
    policy = Policy(weights=Placement.all_on(tier))
    device = Device.open(HardwareProfile("cpu", Accelerator.NONE), 1)
    engine = weights.engine(policy, device, folder)
    params = SamplingParams(max_tokens=2)
    try:
        engine.generate(to_full_length([[5, 6]], params))
    finally:
        engine.close()


def test_every_form_of_checkpoint_gives_the_same_store(tmp_path: Path, checkpoint: Path) -> None:
    model = random_model("opt")
    sharded = save(model, tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    pickled = tmp_path / "bin"
    pickled.mkdir()
    shutil.copy(checkpoint / "config.json", pickled)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save(state, pickled / "pytorch_model.bin")
    legacy = tmp_path / "legacy"
    shutil.copytree(pickled, legacy)
    torch.save(state, legacy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    shards = tmp_path / "bin-sharded"
    shards.mkdir()
    shutil.copy(checkpoint / "config.json", shards)
    names = sorted(state)
    where = {n: f"pytorch_model-0000{1 + i % 2}.bin" for i, n in enumerate(names)}
    for file in set(where.values()):
        torch.save({n: state[n] for n in names if where[n] == file}, shards / file)
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    expected = stored_bytes(convert(checkpoint, tmp_path / "c0"))
    for i, folder in enumerate([sharded, pickled, legacy, shards]):
        assert stored_bytes(convert(folder, tmp_path / f"c{i + 1}")) == expected, folder


def test_names_without_prefix_are_found(tmp_path: Path, checkpoint: Path) -> None:
    """OPT checkpoints on the hub name tensors decoder.*, model.decoder.* or without any prefix."""
    state = random_model("opt").model.decoder.state_dict()
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(checkpoint / "config.json", bare)
    torch.save(state, bare / "pytorch_model.bin")
    assert stored_bytes(convert(bare, tmp_path / "a")) == stored_bytes(convert(checkpoint, tmp_path / "b"))


def test_an_interrupted_conversion_goes_on_where_it_stopped(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    original = weight_store._write_group

    def failing(fd, ckpt, plan, group):  # type: ignore[no-untyped-def]
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(group[0].name)
        return original(fd, ckpt, plan, group)

    monkeypatch.setattr(weight_store, "_write_group", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    before = list(written)
    monkeypatch.setattr(weight_store, "_write_group", lambda *a: (written.append(a[3][0].name), original(*a))[1])
    resumed = convert(checkpoint, tmp_path / "cache")
    after = written[len(before) :]
    monkeypatch.undo()
    fresh = convert(checkpoint, tmp_path / "other")
    assert stored_bytes(resumed) == stored_bytes(fresh)
    groups = len(store_plan(fresh.family, fresh.shape, fresh.packed, fresh.dtype).groups)
    assert len(before) + len(after) == groups, "what was on disk is not written again"


def test_full_disk_is_named_and_leaves_nothing_valid(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="disk full"):
        convert(checkpoint, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    monkeypatch.undo()
    convert(checkpoint, tmp_path / "cache")


def test_truncated_store_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    weights = convert(checkpoint, tmp_path / "cache")
    os.truncate(weights.store.path, 4096)
    with pytest.raises(StoreError, match=r"truncated.*convert again"):
        convert(checkpoint, tmp_path / "cache")


@pytest.mark.parametrize("tier", [Tier.CPU, Tier.DISK])
def test_corrupt_block_is_found_by_its_checksum(tmp_path: Path, checkpoint: Path, tier: Tier) -> None:
    weights = convert(checkpoint, tmp_path / "cache")
    entry = weights.packed.units[2].entries[2]
    with weights.store.path.open("r+b") as file:
        file.seek(entry.offset + 5)
        byte = file.read(1)
        file.seek(entry.offset + 5)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(StoreError, match="corrupt"):
        place(weights, tier, tmp_path)


def _edit(checkpoint: Path, change) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file, save_file

    state = load_file(checkpoint / "model.safetensors")
    change(state)
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensor_is_named(tmp_path: Path, checkpoint: Path) -> None:
    _edit(checkpoint, lambda s: s.pop("model.decoder.layers.1.fc1.weight"))
    with pytest.raises(StoreError, match=r"lacks 1 of .*layers\.1\.fc1\.weight"):
        convert(checkpoint, tmp_path / "cache")


@pytest.mark.parametrize("shape", [(100, 47), (99, 48), (101, 48)])
def test_misshapen_tensor_is_named(tmp_path: Path, checkpoint: Path, shape: tuple[int, int]) -> None:
    _edit(checkpoint, lambda s: s.update({"model.decoder.layers.1.fc1.weight": torch.ones(shape)}))
    with pytest.raises(StoreError, match=r"fc1"):
        convert(checkpoint, tmp_path / "cache")


def test_nan_is_named(tmp_path: Path, checkpoint: Path) -> None:
    _edit(checkpoint, lambda s: s["model.decoder.layers.0.fc2.bias"].fill_(float("nan")))
    with pytest.raises(StoreError, match=r"layers\.0\.fc2\.bias.*NaN"):
        convert(checkpoint, tmp_path / "cache")


def test_a_changed_checkpoint_is_converted_again(tmp_path: Path, checkpoint: Path) -> None:
    first = convert(checkpoint, tmp_path / "cache").store.path
    _edit(checkpoint, lambda s: s["model.decoder.layers.0.fc2.bias"].fill_(0.5))
    assert convert(checkpoint, tmp_path / "cache").store.path != first


def test_damaged_checkpoints_are_explained(tmp_path: Path, checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 1000)
    with pytest.raises(StoreError, match="truncated"):
        convert(checkpoint, tmp_path / "cache")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(StoreError, match="neither"):
        convert(checkpoint, tmp_path / "cache")
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(StoreError, match="JSON"):
        convert(checkpoint, tmp_path / "cache")


def test_pickles_never_run_code(tmp_path: Path, checkpoint: Path) -> None:
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.system, (f"touch {tmp_path / 'owned'}",)

    (checkpoint / "model.safetensors").unlink()
    torch.save({"model.decoder.embed_tokens.weight": Evil()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(StoreError, match="more than tensors"):
        convert(checkpoint, tmp_path / "cache")
    assert not (tmp_path / "owned").exists()


def test_unknown_architecture_lists_the_known(tmp_path: Path, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"architectures": ["T5Model"]}))
    with pytest.raises(UserError, match=r"BloomForCausalLM, .*LlamaForCausalLM, .*OPTForCausalLM"):
        convert(checkpoint, tmp_path / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_cache_is_named(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cache_dir"):
        convert(checkpoint, tmp_path / "locked")


def test_cache_that_is_a_file_is_named(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache_dir"):
        convert(checkpoint, tmp_path / "file")


def test_two_crashes_do_not_make_an_empty_store_look_complete(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last rename and the manifest, a conversion left its journal behind. The next one started a new
    file, was killed too, and the third took the new, empty file for complete because of the old journal."""

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weight_store, "_write_durably", crash)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, tmp_path / "cache")
    monkeypatch.undo()
    monkeypatch.setattr(weight_store, "_write_group", crash)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, tmp_path / "cache")
    monkeypatch.undo()
    expected = stored_bytes(convert(checkpoint, tmp_path / "other"))
    assert stored_bytes(convert(checkpoint, tmp_path / "cache")) == expected


@pytest.mark.parametrize("tier", [Tier.CPU, Tier.DISK])
def test_corrupt_embedding_table_is_found(tmp_path: Path, tier: Tier) -> None:
    """An untied table on disk is only ever read by row: it used to escape the checksum."""
    weights = convert(save(random_model("llama-multi-query"), tmp_path / "llama"), tmp_path / "cache")
    with weights.store.path.open("r+b") as file:
        file.seek(weights.packed.tables[-1].offset + 777)
        file.write(b"\x55\xaa")
    with pytest.raises(StoreError, match=r"embed_tokens.*corrupt"):
        place(weights, tier, tmp_path)


def test_swapped_query_and_key_matrices_are_refused(tmp_path: Path) -> None:
    """They are packed as one tensor, and the sum of their rows is right either way."""
    folder = save(random_model("llama-tied-grouped"), tmp_path / "llama")
    q, k = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk")

    def swap(state: dict[str, torch.Tensor]) -> None:
        state[q], state[k] = state[k], state[q]

    _edit(folder, swap)
    with pytest.raises(StoreError, match=r"layers\.1\.self_attn\.q_proj"):
        convert(folder, tmp_path / "cache")
