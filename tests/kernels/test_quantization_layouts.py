"""Groups along outputs and searched scales, against a quantizer that shares no code with the engine's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexgen_bench.accuracy.run.importance import measure, write_importance
from flexgen_bench.accuracy.run.rtn_baseline import apply_rtn, matrices, round_to_nearest
from flexgen_bench.core.compression import Along, Compression, Scales
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.model import DType
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.weight_views import view
from flexgen_bench.kernels.ops import linear
from flexgen_bench.kernels.output_groups import OutputQuantizedWeight
from flexgen_bench.kernels.quantization import QuantizedWeight, dequantize, fake_quantize, quantize
from flexgen_bench.memory.importance import FLOOR
from tests.support.tiny_models import random_model, random_prompts, save

SHAPES = [(1, 1), (7, 100), (64, 64), (65, 8), (130, 33), (200, 576)]


def weight_of(shape: tuple[int, int], kind: str = "normal") -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    x = torch.randn(shape, generator=generator)
    if kind == "outliers":
        x[torch.rand(shape, generator=generator) < 0.01] *= 50
    if kind == "constant":
        x[:, ::2], x[::3] = 0.37, 0.0
    return x


def quantized(weight: torch.Tensor, compression: Compression) -> torch.Tensor:
    """What the engine computes with."""
    kind = OutputQuantizedWeight if compression.along is Along.OUTPUTS else QuantizedWeight
    return kind.of(weight, compression).dequantize()


@pytest.mark.one_in(5)
@pytest.mark.parametrize("kind", ["normal", "outliers", "constant"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("along", Along)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_values_are_the_yardsticks(bits: int, along: Along, shape: tuple[int, int], kind: str) -> None:
    for size in (16, 64):
        compression, weight = Compression(bits, size, along), weight_of(shape, kind)
        found, expected = quantized(weight, compression), round_to_nearest(weight, compression)
        step = (weight.max() - weight.min()) / (2**bits - 1)
        # A value that lies between two codes may go either way.
        assert bool(((found - expected).abs() <= step * 1.01).all())
        assert float((found != expected).float().mean()) < 0.001
        constant = torch.full(shape, -0.37)
        assert bool((quantized(constant, compression) == constant.half()).all())


@pytest.mark.parametrize("blocks", [(64, 16, 16), (20, 4, 4), (576, 192, 192), (7,)])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_groups_end_with_the_tensors_a_matrix_is_made_of(bits: int, blocks: tuple[int, ...]) -> None:
    """Queries, keys and values are one matrix here and three in a checkpoint: quantizing either is the same."""
    compression = Compression(bits, 64, Along.OUTPUTS)
    weight = weight_of((sum(blocks), 40))
    packed = OutputQuantizedWeight.of(weight, compression, blocks)
    expected = torch.cat([round_to_nearest(b, compression) for b in weight.split(blocks)])
    whole = packed.dequantize()
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6)
    codes, params = compression.matrix_bytes(blocks, 40)
    assert (packed.codes.numel(), packed.params.numel() * 2) == (codes, params)
    for start, stop in ((0, 1), (3, 7), (1, sum(blocks)), (sum(blocks) - 2, sum(blocks))):
        assert torch.equal(packed.rows(start, stop), whole[start:stop])
    out = torch.zeros(sum(blocks) + 2, 50)[1:-1, 5:45]
    assert packed.rows(0, sum(blocks), out=out) is out
    assert torch.equal(out, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 5, 70, 200])
def test_products_are_those_with_the_unpacked_matrix(rows: int, dtype: torch.dtype) -> None:
    blocks, compression = (130, 64, 9), Compression(4, 64, Along.OUTPUTS)
    weight = weight_of((203, 96)).to(dtype)
    packed = OutputQuantizedWeight.of(weight, compression, blocks)
    x, bias = torch.randn(rows, 96).to(dtype), torch.randn(203).to(dtype)
    for b in (None, bias):
        exact = x.double() @ packed.dequantize().double().t() + (0 if b is None else b.double())
        found = linear(x, packed, b)
        assert found.dtype == dtype
        assert found.shape == (rows, 203)
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.04}[dtype]
        assert bool(((found.double() - exact).abs() <= tolerance).all())


def test_a_large_matrix_is_unpacked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    compression, weight = Compression(4, 16, Along.OUTPUTS), weight_of((203, 96))
    packed = OutputQuantizedWeight.of(weight, compression, (130, 73))
    whole, product = packed.dequantize(), linear(weight, packed)
    monkeypatch.setattr("flexgen_bench.kernels.output_groups.CPU_BYTES", 3 * 16 * 96 * 4)
    monkeypatch.setattr("flexgen_bench.kernels.ops.CPU_TILE_BYTES", 2 * 16 * 96 * 4)
    assert torch.equal(packed.dequantize(), whole)
    torch.testing.assert_close(linear(weight, packed), product)


# Searched scales


@pytest.mark.one_in(5)
@pytest.mark.parametrize("along", Along)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "outliers", "constant"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_searched_scales_are_never_worse(shape: tuple[int, int], kind: str, bits: int, along: Along) -> None:
    """Group by group, and by a fifth where groups are normally distributed: that is what the search is for."""
    weight = weight_of(shape, kind)
    plain, searched = (Compression(bits, 64, along, scales) for scales in (Scales.MINMAX, Scales.MSE))
    before, after = ((quantized(weight, c) - weight).square() for c in (plain, searched))
    if along is Along.OUTPUTS:
        before, after = before.t(), after.t()
    groups = [(b.sum(1), a.sum(1)) for b, a in zip(before.split(64, 1), after.split(64, 1), strict=True)]
    assert all(bool((a <= b * (1 + 1e-4) + 1e-12).all()) for b, a in groups)
    if kind == "normal" and bits < 8 and min(shape) >= 64:
        assert float(after.sum()) < 0.88 * float(before.sum())


def test_a_searched_row_depends_on_itself_alone() -> None:
    """Stores are written piece by piece, and tables looked up row by row."""
    weight, compression = weight_of((1100, 100)), Compression(4, 64, scales=Scales.MSE)
    whole = fake_quantize(weight, compression)
    for row in (0, 65, 1099):
        assert torch.equal(fake_quantize(weight[row], compression), whole[row])
    assert torch.equal(fake_quantize(weight[3:400], compression), whole[3:400])


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_searched_scales_of_odd_groups(bits: int) -> None:
    compression = Compression(bits, 8, scales=Scales.MSE)
    largest = torch.tensor([-1e30, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 1e30])
    assert bool(fake_quantize(largest, compression).isfinite().all())
    tiny = torch.tensor([0.0, 1e-30, 2e-30, 0, 0, 0, 0, 0, 5.0])
    assert bool((fake_quantize(tiny, compression)[:8] == 0).all())
    broken = torch.randn(4, 16)
    broken[1, 3], broken[2, 5] = torch.nan, torch.inf
    back = fake_quantize(broken, compression)
    assert torch.equal(back[[0, 3]], fake_quantize(broken[[0, 3]], compression))


# Calibrated scales


def test_importance_decides_where_errors_go() -> None:
    weight, compression = weight_of((40, 100)), Compression(4, 64, scales=Scales.CALIBRATED)
    importance = torch.rand(100, generator=torch.Generator().manual_seed(1)).pow(8) + 0.01

    def cost(*given: torch.Tensor) -> float:
        codes, params = quantize(weight, compression, *given)
        back = dequantize(codes, params, 100, compression, torch.float32)
        return float(((back - weight).square() * importance).sum())

    assert cost(importance) < 0.8 * cost()
    assert cost(torch.ones(100)) == pytest.approx(cost(), rel=1e-3)


def test_a_store_with_calibrated_scales(tmp_path: Path) -> None:
    """Each matrix by its own inputs, as the hooks of the model have seen them; q, k and v have theirs in common."""
    compression = Compression(4, 16, scales=Scales.CALIBRATED)
    model = random_model("opt-350m-like")
    folder = save(model, tmp_path / "ckpt")

    def packed() -> PackedWeights:
        return PackedWeights.from_checkpoint(folder, DType.FLOAT32, tmp_path / "cache", compression=compression)

    with pytest.raises(StoreError, match=r"importance\.safetensors.*flexgen_bench importance"):
        packed()
    assert not PackedWeights.is_packed(folder, DType.FLOAT32, tmp_path / "cache", compression)
    found = measure(model, random_prompts([30, 25]))
    write_importance(folder, found)
    store = packed()
    assert PackedWeights.is_packed(folder, DType.FLOAT32, tmp_path / "cache", compression)
    content = torch.frombuffer(bytearray(store.store.path.read_bytes()), dtype=torch.uint8)
    state = model.state_dict()
    for entry in store.packed.entries:
        weight = view(content, entry, 0, torch.float32)
        if isinstance(weight, torch.Tensor) or entry.compression != compression:
            continue
        parts = []
        for source in entry.tensor.sources:
            name = next(n for n in state if n == source or n.endswith(f".{source}"))
            squares = found[name]
            importance = squares / squares.mean() + FLOOR
            codes = quantize(state[name], compression, importance)
            parts.append(dequantize(*codes, state[name].shape[1], compression, torch.float32))
        assert torch.equal(weight.dequantize(), torch.cat(parts)), entry.tensor.spec.name
    # Another text, another store.
    write_importance(folder, {name: squares.flip(0) for name, squares in found.items()})
    assert packed().store.path != store.store.path
    write_importance(folder, {})
    with pytest.raises(StoreError, match=r"does not fit .*Make it again"):
        packed()


def test_calibration_is_of_groups_along_inputs() -> None:
    with pytest.raises(UserError, match="same input"):
        Compression(4, 64, Along.OUTPUTS, Scales.CALIBRATED)


# The yardstick


@pytest.mark.parametrize("name", ["opt", "opt-350m-like", "llama-multi-query", "llama-tied-grouped"])
def test_the_yardstick_changes_what_the_engine_compresses(name: str) -> None:
    compression = Compression(4, 16, Along.OUTPUTS)
    model, before = random_model(name), random_model(name)
    changed = apply_rtn(model, compression)
    assert len(changed) == len(set(changed))
    old = dict(before.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        stays = parameter.dim() < 2 or "embed_positions" in parameter_name
        assert torch.equal(parameter, old[parameter_name]) == stays, parameter_name
    table = model.get_input_embeddings().weight
    how = {id(weight): kind for _, weight, kind in matrices(model, compression)}
    assert how[id(table)].along is Along.INPUTS, "rows are looked up in it"


@pytest.mark.parametrize("name", ["opt-350m-like", "llama-multi-query", "llama-tied-grouped"])
@pytest.mark.parametrize("along", Along)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_packed_model_holds_the_yardsticks_values(name: str, along: Along, bits: int, tmp_path: Path) -> None:
    """Every tensor of the store, as the engine will use it."""
    compression = Compression(bits, 16, along)
    folder = save(random_model(name), tmp_path / "ckpt")
    kind = PackedWeights.from_checkpoint(folder, DType.FLOAT32, tmp_path / "cache", compression=compression)
    model = random_model(name)
    apply_rtn(model, compression)
    expected = model.state_dict()
    content = torch.frombuffer(bytearray(kind.store.path.read_bytes()), dtype=torch.uint8)
    differing = total = 0
    for entry in kind.packed.entries:
        found = view(content, entry, 0, torch.float32)
        values = found if isinstance(found, torch.Tensor) else found.dequantize()
        theirs = torch.cat([_of(expected, source) for source in entry.tensor.sources])
        differing += int((values - theirs).abs().gt(1e-5).sum())
        total += values.numel()
    assert differing <= total * 2e-4, "values between two codes may go either way"


def _of(state: dict[str, torch.Tensor], source: str) -> torch.Tensor:
    return next(t for n, t in state.items() if n == source or n.endswith(f".{source}"))
