"""A compressed cache that is read as it is: the engine around the kernels, and the kernels themselves in Triton's
interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.errors import NotFinite
from flexgen_bench.core.policy import Policy, Schedule
from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine import resident_cache
from flexgen_bench.engine.device import Device
from flexgen_bench.kernels.packed_cache import PackedKernels, packed_kernels
from flexgen_bench.kernels.quantization import quantize
from flexgen_bench.kernels.segments import PackedSegment
from tests.engine.test_engine_tokens import LENGTHS, on, reference_of, run, until
from tests.support.poisoned_layers import Projected, poison
from tests.support.tiny_models import EMULATED, random_prompts

GPU = on(Tier.GPU)
INTERPRET, KERNELS = "TRITON_INTERPRET", "say_what_their_reference_says"


def append(k: Tensor, v: Tensor, codes: Tensor, params: Tensor, compression: Compression) -> None:
    """What the kernel of this name is to do."""
    for which, rows in enumerate((k, v)):
        new_codes, new_params = quantize(rows, compression)
        codes[which].copy_(new_codes)
        odd = ~rows.unflatten(-1, (new_params.shape[-2], -1)).isfinite().all(-1)
        params[which].copy_(new_params)
        params[which, ..., 1].masked_fill_(odd, torch.nan)


def attend(
    q: Tensor,
    codes: Tensor,
    params: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    compression: Compression,
) -> Tensor:
    """The same, in float32."""
    segment = PackedSegment(codes, params, compression, q.shape[-1])
    k, v = (x.float() for x in (segment.keys(q.dtype), segment.values(q.dtype)))
    folded = q.float().view(*k.shape[:2], -1, q.shape[-1])
    scores = folded @ k.transpose(2, 3) * scale
    scores = scores if mask is None else scores + mask
    kept = 1.0 if sinks is None else (scores.logsumexp(-1) - sinks.view(scores.shape[1], -1)).sigmoid()[..., None]
    return (scores.softmax(-1) @ v * kept).to(q.dtype).reshape(q.shape[0], -1)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Compression]:
    """A device with kernels; every attention of a layer notes what it was over."""
    seen: list[Compression] = []

    def noted(*arguments: object) -> Tensor:
        seen.append(arguments[-1])  # type: ignore[arg-type]
        return attend(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Device, "launches_kernels", True)
    monkeypatch.setattr(resident_cache, "packed_kernels", lambda *_: PackedKernels(append, noted))
    return seen


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("lengths", [LENGTHS, [9] * 5], ids=["ragged", "alike"])
def test_tokens_are_those_of_unpacking_the_cache(
    schedule: Schedule, lengths: list[int], tmp_path: Path, fused: list[Compression]
) -> None:
    """Sequences that end early among them, so that what is left of a region has gaps."""
    compression = Compression(4, 8)
    reference = reference_of("llama-tied-grouped", random_prompts(lengths), tmp_path)
    policy = Policy(4, 2, GPU, GPU, GPU, schedule=schedule, lossy=Lossy(kv_cache=compression))
    found = run(reference, policy, EMULATED, tmp_path)[0]
    assert set(fused) == {compression}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Device, "launches_kernels", False)
        expected = run(reference, policy, EMULATED, tmp_path)[0]
    assert found == expected
    stop = {i: ids[1 + i % 3] for i, ids in enumerate(expected) if i % 2}
    found = run(reference, policy, EMULATED, tmp_path, stop=stop)[0]
    assert found == [until(ids, stop.get(i)) for i, ids in enumerate(expected)]


def test_sparse_attention_unpacks(tmp_path: Path, fused: list[Compression]) -> None:
    """The kernels use all values."""
    reference = reference_of("opt", random_prompts([5, 5]), tmp_path)
    lossy = Lossy(kv_cache=Compression(4, 16), value_share=0.5)
    run(reference, Policy(2, 1, GPU, GPU, GPU, lossy=lossy), EMULATED, tmp_path)
    assert not fused


def test_what_is_not_finite_shows_in_the_parameters(
    tmp_path: Path, fused: list[Compression], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinite keys saturate when they are quantized: the codes alone would not tell."""
    reference = reference_of("opt", random_prompts([5, 5]), tmp_path)

    def spoil(made: Projected) -> None:
        made[1][0, 0, 0] = torch.inf

    poison(monkeypatch, lambda step: step.unit == 3 and step.token == 2, spoil)
    policy = Policy(2, 1, GPU, GPU, GPU, lossy=Lossy(kv_cache=Compression(4, 16)))
    with pytest.raises(NotFinite, match="layer 2 has produced keys"):
        run(reference, policy, EMULATED, tmp_path)


def test_processors_have_no_such_kernels() -> None:
    assert packed_kernels(torch.device("cpu"), Compression(4), torch.float16) is None


def test_kernels_in_the_interpreter() -> None:
    """In a process of its own: Triton reads from its environment, once, that it is to interpret."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton: pip install triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", KERNELS]
    ran = subprocess.run(
        command, env=os.environ | {INTERPRET: "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.skipif(os.environ.get(INTERPRET) != "1", reason="run by the test above")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities times zero
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("bits", "group", "dim"), [(4, 64, 64), (4, 64, 80), (4, 16, 20), (8, 64, 80), (8, 8, 12)])
def test_kernels_say_what_their_reference_says(bits: int, group: int, dim: int, dtype: torch.dtype) -> None:
    """Groups that are short, heads that are no power of two, more tokens than a tile, grouped heads, padding. Appended
    are the bits of
    ``quantize``, and nothing else is touched."""
    from flexgen_bench.kernels import packed_triton as interpreted

    torch.manual_seed(0)
    compression, tokens = Compression(bits, group), interpreted.BLOCK_TOKENS + 6
    kv = (torch.randn(2, 2, 2, tokens, dim) * 3).to(dtype)
    kv[0, 1, 0, 1] = 0  # a constant group
    codes, params = quantize(kv, compression)
    into = torch.full_like(codes, 77), torch.full_like(params, 5)
    for token in (1, tokens - 1):
        places = (x[:, :, :, token] for x in into)
        interpreted.append(kv[0, :, :, token], kv[1, :, :, token], *places, compression)
        assert all(
            torch.equal(a[:, :, :, token], b[:, :, :, token]) for a, b in zip(into, (codes, params), strict=True)
        )
    assert bool((into[0][:, :, :, 2:-1] == 77).all())
    q = torch.randn(2, 4, dim).to(dtype)
    padding = torch.zeros(2, 1, 1, tokens, dtype=dtype)
    padding[1, ..., 3 : tokens - 2] = -torch.inf  # a whole tile, too
    tolerance = {"rtol": 2e-3, "atol": 5e-3} if dtype is torch.float16 else {}
    sinks = torch.tensor([-2.0, 1.0, 4.0, 9.0])
    for mask, given in ((None, None), (padding, None), (padding, sinks)):
        found = interpreted.attend(q, codes, params, mask, given, dim**-0.5, compression)
        expected = attend(q, codes, params, mask, given, dim**-0.5, compression)
        torch.testing.assert_close(found, expected, **tolerance)
    kv[1, 1, 1, 1, dim - 1] = torch.nan
    interpreted.append(kv[0, :, :, 1], kv[1, :, :, 1], *(x[:, :, :, 1] for x in into), compression)
    odd = into[1][:, :, :, 1].isnan()
    assert odd.sum() == 1
    assert bool(odd[1, 1, 1, -1, 1])
