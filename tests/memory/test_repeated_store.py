"""A model whose layers repeat each other is packed once, and read as if it were whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from flexgen_bench.checkpoints import dummy_weights
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.compression import Compression
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import PAGE
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.memory.host import allocate
from flexgen_bench.memory.repeated_file import Repeat, RepeatedFile
from tests.support.shapes import no_progress, opt_shape

SHAPE = opt_shape(num_layers=12, hidden_size=96, head_dim=32, embed_dim=96, ffn_size=384)


def test_reads_cross_the_borders_of_what_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([page]) * PAGE for page in range(8)))
    file = RepeatedFile(path, [Repeat(5 * PAGE, 7 * PAGE, PAGE), Repeat(3 * PAGE, 5 * PAGE, PAGE)])
    pages = [0, 1, 2, 1, 2, 1, 2, 7]
    for start in range(8):
        for stop in range(start + 1, 9):
            into = allocate((stop - start) * PAGE)
            file.read(start * PAGE, into)
            assert into[::PAGE].tolist() == pages[start:stop]
    file.close()


@pytest.mark.parametrize("compression", [None, Compression(4)], ids=["plain", "4-bit"])
def test_the_store_is_small_and_the_tokens_are_those_of_the_whole_model(
    compression: Compression | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dummy_weights, "REPEATED_FROM_BYTES", 0)
    repeated = prepare_checkpoint(ModelSpec(SHAPE), DType.FLOAT32, tmp_path / "a", no_progress)
    whole = tmp_path / "whole"
    whole.mkdir()
    tensors = torch.load(repeated / "pytorch_model.bin")
    torch.save({name: tensor.clone() for name, tensor in tensors.items()}, whole / "pytorch_model.bin")
    (whole / "config.json").write_bytes((repeated / "config.json").read_bytes())
    answers, sizes, contents = [], [], []
    for folder in (repeated, whole):
        weights = PackedWeights.from_checkpoint(folder, DType.FLOAT32, tmp_path / folder.name, compression=compression)
        sizes.append(os.stat(weights.store.path).st_blocks)
        file, into = weights.store.open(), allocate(weights.packed.file_bytes)
        file.read(0, into)
        file.close()
        contents.append(into)
        if compression is None:
            answers.append(tokens(weights, tmp_path))
    assert torch.equal(*contents)
    assert compression or answers[0] == answers[1]
    assert sizes[0] < sizes[1] / 2
    manifest = json.loads((weights.store.path.parent / "manifest.json").read_text())
    assert manifest["repeats"] == []


def tokens(weights: PackedWeights, folder: Path) -> list[list[int]]:
    mixed, cpu = Placement(cpu=0.5, disk=0.5), Placement.all_on(Tier.CPU)
    policy = Policy(2, 1, mixed, cpu, cpu)
    device = Device.open(HardwareProfile("cpu", Accelerator.NONE), 1)
    engine = weights.engine(policy, device, folder)
    params = SamplingParams(max_tokens=6)
    prompts = [[5, 9, 13], [7, 8]]
    running = to_full_length(prompts, params)
    try:
        engine.generate(running)
    finally:
        engine.close()
    return [r.new for r in running]
