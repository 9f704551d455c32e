"""Slices of layers: what all of them make adds up to what the whole layer makes, for every family."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from flexgen_bench.core.compression import Along, Compression
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.slices import Slice
from flexgen_bench.kernels import ops
from flexgen_bench.memory.stored_tensor import StoredTensor
from flexgen_bench.models import formulas
from flexgen_bench.models.inventory import PackedTensor
from flexgen_bench.models.model import Model
from flexgen_bench.models.parts import Decoder
from flexgen_bench.models.registry import family, shape_from_config
from flexgen_bench.models.stored_names import expected_sources
from tests.support.sliced_models import MODELS

ROWS = 7


def shape_of(name: str) -> ModelShape:
    return shape_from_config(MODELS[name]().config.to_dict(), name)


def tensors(entries: list[PackedTensor], sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors as a store has them."""
    made = {}
    for tensor in entries:
        spec = tensor.spec
        stored = StoredTensor(
            *(spec.name, spec.shape, 0, 0, tensor.sources, tensor.source_rows), cut=tensor.cut, firsts=tensor.firsts
        )
        made[spec.name] = torch.cat([stored.own(n, sources[name]) for n, name in enumerate(tensor.sources)])
        assert made[spec.name].shape == spec.shape
    return made


def layer_of(model: Model, number: int, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return tensors([e.tensor for e in model.packed.units[number + 1].entries], sources)


def angles(decoder: Decoder) -> object:
    positions = torch.arange(ROWS)
    return formulas.angles(ops, decoder, positions, torch.full((ROWS,), ROWS), torch.zeros(1))


@pytest.mark.parametrize("name", MODELS)
def test_parts_add_up_to_the_whole(name: str) -> None:
    """Every layer: heads are those of the whole layer, what the slices make behind the attention and behind the MLP is
    together what the layer makes. A bias is added once, whatever it is of."""
    shape = shape_of(name)
    torch.manual_seed(0)
    inventory = family(shape.family).inventory(shape)
    sources = {source: torch.randn(rows) * 0.3 for source, rows in expected_sources(inventory).items()}
    whole = Model.of(shape, DType.FLOAT32)
    for ranks in (2, 4):
        slices = [whole.sliced(Slice(rank, ranks)) for rank in range(ranks)]
        assert len({tuple(u.num_bytes for u in one.packed.units) for one in slices}) == 1
        for number, layer in enumerate(whole.decoder.layers):
            w, of_ranks = layer_of(whole, number, sources), [layer_of(one, number, sources) for one in slices]
            x = torch.randn(ROWS, shape.hidden_size)
            heads = formulas.project(ops, whole.decoder, layer, w, x, angles(whole.decoder))
            own = [
                formulas.project(ops, one.decoder, one.decoder.layers[number], w, x, angles(one.decoder))
                for one, w in zip(slices, of_ranks, strict=True)
            ]
            for place in range(3):
                torch.testing.assert_close(torch.cat([each[place] for each in own], 1), heads[place])
            attended = torch.randn(ROWS, shape.num_heads * shape.head_dim)
            parts = attended.chunk(ranks, 1)
            expected = formulas.output(ops, layer, w, x, attended)
            out = sum(formulas.attention_out(ops, w, a) for w, a in zip(of_ranks, parts, strict=True))
            state = formulas.after_output(ops, layer, of_ranks[1], x, out)
            made = sum(
                formulas.made(ops, one.decoder.layers[number], w, state[1])
                for one, w in zip(slices, of_ranks, strict=True)
            )
            after = formulas.after_mlp(ops, layer, of_ranks[1], state[0], made)
            torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4)
            if layer.sums == 1:
                once = formulas.after_mlp(ops, layer, of_ranks[0], x, out + made)
                torch.testing.assert_close(once, expected, rtol=1e-3, atol=1e-4)


def test_a_layer_is_summed_as_often_as_it_must_be() -> None:
    """Once where attention and MLP are added to the same; else the MLP reads what the attention has made."""
    sums = {name: {layer.sums for layer in Model.of(shape_of(name), DType.FLOAT32).decoder.layers} for name in MODELS}
    assert {name for name, counts in sums.items() if counts == {1}} == {"gptj", "codegen", "gpt-neox"}
    assert all(counts in ({1}, {2}) for counts in sums.values())


def test_a_slice_has_its_share_of_everything_that_grows() -> None:
    whole = Model.of(shape_of("llama"), DType.FLOAT32)
    half = whole.sliced(Slice(1, 2))
    assert (half.shape.num_heads, half.shape.num_kv_heads, half.shape.ffn_size) == (4, 2, 46)
    assert half.shape.hidden_size == whole.shape.hidden_size
    attention, mlp = half.decoder.layers[0].attention, half.decoder.layers[0].mlp
    assert (attention.heads, attention.kv_heads, getattr(mlp, "width", None)) == (4, 2, 46)
    assert half.packed.units[0].num_values == whole.packed.units[0].num_values
    assert half.packed.units[1].num_values < 0.55 * whole.packed.units[1].num_values
    assert half.shallow(1).part == half.part
    assert whole.sliced(Slice(0, 1)) is whole


def test_alibi_slopes_are_those_of_the_heads() -> None:
    whole = Model.of(shape_of("bloom"), DType.FLOAT32)
    slopes = [whole.sliced(Slice(rank, 4)).decoder.layers[0].attention.mod.slopes for rank in range(4)]
    assert sum(slopes, ()) == whole.decoder.layers[0].attention.mod.slopes


@pytest.mark.parametrize(
    ("name", "ranks", "why"),
    [("llama", 3, "8 query heads"), ("llama", 8, "4 key/value heads"), ("opt", 8, "4 query heads")],
)
def test_what_cannot_be_divided_is_named(name: str, ranks: int, why: str) -> None:
    with pytest.raises(UserError, match=why) as error:
        Model.of(shape_of(name), DType.FLOAT32).sliced(Slice(0, ranks))
    assert error.value.field == "gpu.tensor_parallel"


def test_groups_of_compressed_weights_are_never_cut() -> None:
    """Along inputs, columns of a slice are whole groups; along outputs, rows are. 48 columns and 100 of OPT's."""
    shape = shape_of("opt")
    fits = Compression(4, 8)
    with pytest.raises(UserError, match=r"out\.weight has 12 values"):
        Model.of(shape, DType.FLOAT32, fits).sliced(Slice(0, 4))
    with pytest.raises(UserError, match=r"down\.weight has 50 values"):
        Model.of(shape, DType.FLOAT32, fits).sliced(Slice(1, 2))
    with pytest.raises(UserError, match=r"policy\.lossy\.weights"):
        Model.of(shape, DType.FLOAT32, Compression(4, 64, Along.OUTPUTS)).sliced(Slice(0, 2))


def test_experts_are_not_placed_apart_from_shared_layers() -> None:
    model = Model.of(shape_of("mixtral"), DType.FLOAT32).sliced(Slice(0, 2))
    with pytest.raises(UserError, match=r"policy\.experts"):
        model.packed_for(Policy(1, 1, experts=Placement(cpu=1.0)))
