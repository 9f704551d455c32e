"""Group-wise quantization: error bound, layout, odd groups, shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_bench.core.compression import BITS, Compression
from flexgen_bench.kernels.native.build import library
from flexgen_bench.kernels.quantization import (
    QuantizedWeight,
    dequantize,
    dequantize_with_torch,
    fake_quantize,
    quantize,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def allowed_error(x: torch.Tensor, params: torch.Tensor, compression: Compression) -> torch.Tensor:
    """Half a step, plus what float16 loses on both ends of a group and on its scale, plus the result's rounding."""
    size, n = compression.group_size, x.shape[-1]
    scale, smallest = (p.float().repeat_interleave(size, -1)[..., :n] for p in params.unbind(-1))
    steps = compression.levels - 1
    ends = torch.maximum(smallest.abs(), (smallest + steps * scale).abs())
    half_precision = ends * 2.0**-10 + steps * (scale * 2.0**-10 + 2.0**-24)
    return scale / 2 + half_precision + (ends + scale) * EPSILON[x.dtype]


@given(
    st.sampled_from(BITS),
    st.sampled_from([8, 24, 64]),
    st.integers(1, 150),
    st.integers(0, 3),
    st.sampled_from(FLOATS),
    st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    st.floats(-20, 20),
    st.integers(0, 999),
)
@settings(max_examples=150, deadline=None)
def test_error_is_half_a_step(
    bits: int, size: int, n: int, rows: int, dtype: torch.dtype, spread: float, offset: float, seed: int
) -> None:
    compression = Compression(bits, size)
    generator = torch.Generator().manual_seed(seed)
    x = ((torch.randn(rows, n, generator=generator) + offset) * spread).to(dtype)
    codes, params = quantize(x, compression)
    assert codes.shape == (rows, compression.code_bytes(n))
    assert params.shape == (rows, compression.groups(n), 2)
    back = dequantize(codes, params, n, compression, dtype)
    assert back.dtype == dtype
    error = (back.double() - x.double()).abs()
    assert bool((error <= allowed_error(x, params, compression)).all())
    assert torch.equal(back, fake_quantize(x, compression))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 7, 8, 63, 64, 65, 80, 200])
def test_layout_and_value_of_every_code(bits: int, n: int) -> None:
    """Decodes bytes by the description in the module, one value at a time, in exact arithmetic."""
    compression = Compression(bits, 64)
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 256, (3, compression.code_bytes(n)), dtype=torch.uint8, generator=generator)
    params = torch.rand(3, compression.groups(n), 2, generator=generator).half()
    values = dequantize(codes, params, n, compression, torch.float32)
    for row in range(3):
        start = 0
        for group in range(compression.groups(n)):
            count = min(64, n - group * 64)
            m = -(-count // 8) * 8
            data = codes[row, start : start + m * bits // 8].tolist()
            start += len(data)
            scale, smallest = params[row, group].double().tolist()
            for j in range(count):
                expected = torch.tensor(smallest + code_at(data, j, m, bits) * scale).float()
                assert values[row, group * 64 + j] == expected
        assert start == codes.shape[1]


def code_at(data: list[int], j: int, m: int, bits: int) -> int:
    if bits == 8:
        return data[j]
    if bits == 4:
        return data[j] & 15 if j < m // 2 else data[j - m // 2] >> 4
    e = m // 8
    k, i = divmod(j, e)
    if k < 6:
        return data[k // 2 * e + i] >> (3 * (k % 2)) & 7
    middle = data[e + i] >> k & 1
    return data[(0 if k == 6 else 2 * e) + i] >> 6 | middle << 2


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
def test_odd_groups(bits: int, dtype: torch.dtype) -> None:
    compression = Compression(bits, 8)
    zero, constant = torch.zeros(8), torch.full((8,), 0.37)
    outlier = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 5000.0])
    single = torch.tensor([-3.25])
    x = torch.cat((zero, constant, outlier, single)).to(dtype)
    codes, params = quantize(x, compression)
    back = dequantize(codes, params, len(x), compression, dtype)
    assert params[:2, 0].tolist() == [0, 0]
    assert bool((back[:8] == 0).all())
    assert bool((back[8:16] == x[8:16].half().to(dtype)).all())
    assert bool((back[16:23] == 0).all()), "zeros stay zero beside an outlier"
    assert abs(float(back[23]) - 5000) <= 5000 * 2**-8
    assert back[24] == -3.25


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
def test_values_beyond_float16_saturate(bits: int, dtype: torch.dtype) -> None:
    """-65504..65504 at 4 bits once gave infinity: the rounded scale put the largest code at 65536."""
    largest = 65504.0 if dtype is torch.float16 else 1e30
    x = torch.tensor([-largest, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, largest], dtype=dtype)
    back = fake_quantize(x, Compression(bits, 8)).float()
    assert bool(back.isfinite().all())
    assert abs(float(back[0]) + 65504) <= 256  # bfloat16 holds 65536, not 65504
    assert abs(float(back[-1]) - 65504) <= 512
    constant = fake_quantize(torch.full((9,), largest, dtype=dtype), Compression(bits, 8))
    assert bool((constant == torch.tensor(65504.0).to(dtype)).all())


@pytest.mark.parametrize("bits", BITS)
def test_not_a_number_does_not_crash(bits: int) -> None:
    x = torch.randn(4, 32)
    x[1, 3], x[2, 5], x[3, 1] = torch.nan, torch.inf, -torch.inf
    back = fake_quantize(x, Compression(bits, 8))
    untouched = torch.ones(4, 4, dtype=torch.bool)
    untouched[1:, 0] = False
    expected = fake_quantize(x.nan_to_num(0, 0, 0), Compression(bits, 8)).view(4, 4, 8)
    assert torch.equal(back.view(4, 4, 8)[untouched], expected[untouched])


@pytest.mark.parametrize("bits", BITS)
def test_shapes_and_strides(bits: int) -> None:
    compression = Compression(bits, 16)
    base = torch.randn(6, 5, 40)
    strided = base.transpose(0, 1)[1:, ::2]
    codes, params = quantize(strided, compression)
    expected = fake_quantize(strided.contiguous(), compression)
    assert torch.equal(dequantize(codes, params, 40, compression, torch.float32), expected)
    # strided codes and parameters, and a strided place to write to
    wide = torch.zeros(4, 3, 2, codes.shape[-1], dtype=torch.uint8)
    wide[:, :, 0] = codes
    out = torch.full((4, 40, 3), 7.0).transpose(1, 2)
    same = dequantize(wide[:, :, 0], params, 40, compression, torch.float32, out)
    assert same is out
    assert torch.equal(out, expected)
    flat = quantize(base[0, 0], compression)
    assert torch.equal(dequantize(*flat, 40, compression, torch.float32), fake_quantize(base, compression)[0, 0])
    for empty in ((0, 40), (3, 0, 40), (0,), (2, 0)):
        x = torch.empty(empty)
        assert fake_quantize(x, compression).shape == empty


def test_quantized_weight() -> None:
    weight = torch.randn(7, 100, dtype=torch.bfloat16)
    compression = Compression(4)
    packed = QuantizedWeight.of(weight, compression)
    assert packed.shape == (7, 100)
    assert torch.equal(packed.dequantize(), fake_quantize(weight, compression))
    assert torch.equal(packed.rows(2, 5), packed.dequantize()[2:5])
    exact = packed.rows(2, 5, torch.float32)
    assert torch.equal(exact.bfloat16(), packed.rows(2, 5))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [8, 24, 64, 256])
def test_native_gives_the_bits_of_torch(bits: int, size: int, dtype: torch.dtype) -> None:
    if library("quantization") is None:
        pytest.skip("no native kernels here")
    compression = Compression(bits, size)
    for n in (1, 8, 31, 64, 100, 1000):
        x = torch.randn(5, n) * torch.tensor([1e-7, 1e-3, 1.0, 300.0, 60000.0])[:, None]
        codes, params = quantize(x, compression)
        expected = torch.empty(5, n, dtype=dtype)
        dequantize_with_torch(codes, params, expected, compression)
        assert torch.equal(dequantize(codes, params, n, compression, dtype), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [8, 24, 64, 256])
def test_native_codes_are_those_of_torch(
    bits: int, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small and huge numbers, integers (ties), constant groups, columns that do not lie together."""
    if library("quantization") is None:
        pytest.skip("no native kernels here")
    compression = Compression(bits, size)
    scales = torch.tensor([1e-7, 1e-3, 1.0, 300.0, 60000.0, 1e7])[:, None]
    for n in (1, 8, 31, 64, 100, 1000):
        noise = torch.randn(6, n)
        kinds = (noise * scales, (noise * 9).round(), noise + 1000, noise.relu(), 0 * noise - 2.5)
        for x in (kind.to(dtype).nan_to_num() for kind in kinds):
            for lies in (x, x.t().contiguous().t()):
                monkeypatch.delenv("FLEXGEN_NATIVE", raising=False)
                codes, params = quantize(lies, compression)
                monkeypatch.setenv("FLEXGEN_NATIVE", "0")
                expected, line = quantize(x, compression)
                assert torch.equal(codes, expected)
                assert torch.equal(params.float(), line.float())  # 0 and -0 are the same line


@pytest.mark.parametrize("switch", ["0", "1"])
def test_large_matrix_takes_many_tiles_and_threads(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXGEN_NATIVE", switch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x = torch.randn(1100, 1000)
    whole = fake_quantize(x, Compression(4))
    for row in (0, 65, 66, 527, 528, 1099):
        assert torch.equal(whole[row], fake_quantize(x[row], Compression(4)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [8, 24, 64])
def test_cuda_gives_the_bits_of_the_processor(bits: int, size: int, dtype: torch.dtype) -> None:
    """Through Triton where the device is new enough, through torch where it is not."""
    compression = Compression(bits, size)
    for n in (1, 8, 31, 64, 100, 3000):
        codes, params = quantize(torch.randn(5, n), compression)
        expected = dequantize(codes, params, n, compression, dtype)
        found = dequantize(codes.cuda(), params.cuda(), n, compression, dtype)
        assert torch.equal(found.cpu(), expected)
    x = torch.randn(7, 200, dtype=dtype)
    on_device = quantize(x.cuda(), compression)
    for ours, theirs in zip(on_device, quantize(x, compression), strict=True):
        assert torch.equal(ours.cpu(), theirs)
