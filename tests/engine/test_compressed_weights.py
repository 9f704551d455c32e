"""Compressed weights: the same tokens as transformers on fake-quantized weights; stores that notice what is wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_bench.core.compression import EXACT, Along, Compression, Lossy, Scales
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Lane, Site, Tier
from flexgen_bench.core.units import MIB
from flexgen_bench.engine.arenas import Arenas
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.engine.store_plan import store_plan
from flexgen_bench.engine.weights import Weights
from flexgen_bench.kernels.quantization import QuantizedWeight, fake_quantize
from flexgen_bench.llm.llm import LLM
from flexgen_bench.memory import weight_store
from flexgen_bench.models.model import Model
from flexgen_bench.models.packing import pack
from flexgen_bench.models.registry import family
from flexgen_bench.planner.default_policy import default_policy
from flexgen_bench.planner.memory_plan import plan_job
from flexgen_bench.planner.search_space import SearchSpace
from flexgen_bench.schedule.scheduled_job import UnitKind
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.schedule.steps import Step, StepKind
from tests.support.shapes import llama_shape, opt_shape
from tests.support.tiny_models import EMULATED, HOST, MODELS, greedy_reference, random_model, random_prompts, save

NEW_TOKENS = 6
# The models' dimensions are 20, 48, 60, 64, 90 and 100: most are no multiples of these groups, some none of 8.
COMPRESSIONS = [
    Compression(3, 16),
    Compression(4, 64),
    Compression(8, 8),
    Compression(4, 16, Along.OUTPUTS, Scales.MSE),
]
FOUR = Compression(4, 16)
FOUR_ALONG_OUTPUTS = Compression(4, 16, Along.OUTPUTS)


def fake_quantized(model: Any, compression: Compression) -> Any:
    """The model with every matrix replaced by what compression leaves of it; positions stay as they are."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied table comes once
            if parameter.dim() == 2 and "embed_positions" not in name:
                per_token = "embed_tokens" in name or "lm_head" in name
                how = compression.of_vocabulary if per_token else compression
                parameter.copy_(rounded(parameter, how))
    return model


def rounded(weight: torch.Tensor, compression: Compression) -> torch.Tensor:
    if compression.along is Along.INPUTS:
        return fake_quantize(weight, compression)
    return fake_quantize(weight.t(), compression).t()


def convert(model: Any, folder: Path, compression: Compression | None, dtype: DType = DType.FLOAT32) -> PackedWeights:
    checkpoint = folder / "ckpt"
    if not checkpoint.exists():
        save(model, checkpoint)
    return PackedWeights.from_checkpoint(checkpoint, dtype, folder / "cache", compression=compression)


def greedy(
    weights: PackedWeights, policy: Policy, hardware: HardwareProfile, folder: Path, prompts: list[list[int]]
) -> list[list[int]]:
    params = SamplingParams(max_tokens=NEW_TOKENS)
    sequences = to_full_length(prompts, params)
    lossy = Lossy(weights=weights.packed.compression)
    engine = weights.engine(replace(policy, lossy=lossy), Device.open(hardware, 1), folder)
    try:
        engine.generate(sequences)
    finally:
        engine.close()
    return [s.new for s in sequences]


@dataclass(frozen=True)
class Reference:
    """A tiny model, packed and compressed, and the greedy tokens of transformers on its fake-quantized weights."""

    weights: PackedWeights
    prompts: list[list[int]]
    tokens: list[list[int]]


@pytest.fixture(scope="module", params=sorted(MODELS))
def model_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=COMPRESSIONS, ids=lambda c: str(c).replace("/", "-"))
def reference(model_name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    compression: Compression = request.param
    prompts = random_prompts([1, 12, 3, 3, 7])
    weights = convert(random_model(model_name), tmp_path_factory.mktemp("c"), compression)
    model = fake_quantized(random_model(model_name), compression)
    return Reference(weights, prompts, greedy_reference(model, prompts, NEW_TOKENS))


def on(tier: Tier) -> Placement:
    return Placement.all_on(tier)


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    ("hardware", "weights"),
    [
        (HOST, on(Tier.CPU)),
        (HOST, on(Tier.DISK)),
        (HOST, Placement(cpu=0.5, disk=0.5)),
        (EMULATED, on(Tier.GPU)),
        (EMULATED, on(Tier.CPU)),
        (EMULATED, on(Tier.DISK)),
        (EMULATED, Placement(0.4, 0.3, 0.3)),
    ],
    ids=["cpu", "disk", "cpu+disk", "emulated", "emulated-cpu", "emulated-disk", "thirds"],
)
def test_tokens_are_those_of_fake_quantized_weights(
    reference: Reference, hardware: HardwareProfile, weights: Placement, tmp_path: Path
) -> None:
    policy = Policy(2, 2, weights, on(hardware.compute_tier), on(Tier.CPU))
    found = greedy(reference.weights, policy, hardware, tmp_path, reference.prompts)
    assert found == reference.tokens


@pytest.mark.one_in(5)
@pytest.mark.parametrize("seed", range(4))
def test_random_policies(reference: Reference, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{reference.weights.shape.family}{reference.weights.packed}{seed}")
    hardware = rng.choice([HOST, EMULATED])
    mixes = [on(Tier.CPU), on(Tier.DISK), Placement(cpu=0.5, disk=0.5)]
    mixes += [on(Tier.GPU), Placement(0.4, 0.3, 0.3)] if hardware is EMULATED else []
    policy = Policy(
        gpu_batch_size=rng.choice([1, 2, 7]),
        num_gpu_batches=rng.choice([1, 3]),
        weights=rng.choice(mixes),
        kv_cache=rng.choice(mixes),
        activations=rng.choice(mixes),
        prefetch=rng.choice([1, 2, 9]),
        overlap=rng.choice([True, False]),
        attention=rng.choice(list(AttentionSite)),
    )
    found = greedy(reference.weights, policy, hardware, tmp_path, reference.prompts)
    assert found == reference.tokens, policy


def hold(weights: PackedWeights, tier: Tier, dequantized_buffers: int = 0) -> Weights:
    """All weights on one tier, with one staging buffer and this many for unpacked units."""
    device, packed = Device.open(HOST, 1), weights.packed
    policy = Policy(weights=on(tier), prefetch=1, lossy=Lossy(packed.compression))
    plan = plan_job(Model(weights.shape, DType.FLOAT32, packed), policy, HOST, [Request(1, 1)])
    job = replace(plan.job, dequantized_buffers=dequantized_buffers)
    return Weights(weights.store, packed, DType.FLOAT32, job, device, Arenas(device))


@pytest.mark.parametrize("tier", [Tier.CPU, Tier.DISK])
@pytest.mark.parametrize("compression", [FOUR, FOUR_ALONG_OUTPUTS], ids=str)
def test_a_unit_unpacked_by_a_step_holds_the_fake_quantized_values(
    model_name: str, compression: Compression, tier: Tier, tmp_path: Path
) -> None:
    """The way taken where a pass unpacks a layer once for all micro-batches: from its slot, or from where it lives."""
    weights = convert(random_model(model_name), tmp_path, compression)
    plain = convert(fake_quantized(random_model(model_name), compression), tmp_path / "plain", None)
    units = weights.packed.units
    held = hold(weights, tier, dequantized_buffers=2)
    expected = hold(plain, Tier.CPU)
    slots = {slot.kind: i for i, slot in enumerate(held._job.buffers.get(Site.CPU, ()))}
    try:
        for unit in units:
            slot = -1 if tier is Tier.CPU or not unit.entries else 0
            place = slots[unit.kind] if slot == 0 else -1
            step = Step(
                Lane.CPU, StepKind.DEQUANTIZE, unit.index, weight_buffer=place, dequantized_buffer=unit.index % 2
            )
            if slot == 0:
                load = Step(Lane.DISK_READ, StepKind.LOAD_WEIGHTS, unit.index, weight_buffer=slots[unit.kind])
                for piece in range(len(held._job.pieces(held._job.units[unit.index]))):
                    held.load(load._replace(part=piece))
            if not unit.plain_bytes:
                continue
            held.dequantize(step)
            if slot == 0:  # what was loaded is needed no longer
                held._slots[Tier.CPU][place].fill_(255)
            logit_rows = expected.of(step._replace(weight_buffer=-1, dequantized_buffer=-1))
            found = held.of(step)
            assert set(found) == set(logit_rows)
            for name, tensor in logit_rows.items():
                assert isinstance(tensor, torch.Tensor)
                assert torch.equal(found[name], tensor), (unit.index, name)
    finally:
        held.close()
        expected.close()


@pytest.mark.parametrize("tier", [Tier.CPU, Tier.DISK])
def test_rows_of_a_compressed_table_are_unpacked_alone(tier: Tier, tmp_path: Path) -> None:
    weights = convert(random_model("opt-350m-like"), tmp_path, Compression(3, 16))
    original = random_model("opt-350m-like").model.decoder.embed_tokens.weight.detach()
    table = fake_quantize(original, Compression(8, 16))
    held = hold(weights, tier)
    try:
        indices = torch.tensor([130, 0, 7, 7, 64])
        assert torch.equal(held.rows("tokens", indices), table[indices])
        assert held.rows("tokens", indices[:0]).shape == (0, 20)
    finally:
        held.close()


# Layout


@pytest.mark.parametrize("shape", [opt_shape(), llama_shape()], ids=["tied", "untied"])
def test_matrices_are_compressed_and_nothing_else(shape: Any) -> None:
    inventory = family(shape.family).inventory(shape)
    packed = pack(shape, inventory, DType.BFLOAT16, FOUR)
    for entry in packed.entries:
        spec = entry.tensor.spec
        is_compressed = len(spec.shape) == 2 and spec.name != "positions"
        kind = FOUR.of_vocabulary if spec.name in ("tokens", "unembed") else FOUR
        assert entry.compression == (kind if is_compressed else None), spec.name
    parts = sorted(part for entry in packed.entries for part in entry.parts)
    for (offset, count), (following, _) in zip(parts, [*parts[1:], (packed.file_bytes, 0)], strict=True):
        assert offset % 64 == 0
        assert offset + count <= following
    assert sum(u.num_values for u in packed.units if u.kind is UnitKind.LAYER) == sum(
        t.spec.num_values for layer in inventory.layers for t in layer
    )


def test_four_bits_take_nine_sixteenths_of_a_byte_per_value() -> None:
    shape = opt_shape(
        hidden_size=1024, embed_dim=1024, ffn_size=4096, num_heads=8, num_kv_heads=8, head_dim=128, vocab_size=512
    )
    inventory = family("opt").inventory(shape)
    four = pack(shape, inventory, DType.FLOAT16, Compression(4))
    sixteen = pack(shape, inventory, DType.FLOAT16)
    layer = four.units[1]
    assert layer.num_bytes / layer.num_values == pytest.approx(0.5625, rel=5e-3)
    assert layer.home_bytes <= layer.num_bytes
    assert layer.num_values == sixteen.units[1].num_values
    assert layer.plain_bytes == pytest.approx(sixteen.units[1].num_bytes, rel=1e-3)
    assert sixteen.units[1].plain_bytes == 0
    assert four.units[-1].plain_bytes, "a tied table is part of the head"


# Stores


@pytest.mark.parametrize("tier", [Tier.CPU, Tier.DISK])
@pytest.mark.parametrize("compression", [FOUR, FOUR_ALONG_OUTPUTS], ids=str)
@pytest.mark.parametrize("part", [0, 1], ids=["codes", "parameters"])
@pytest.mark.parametrize("where", ["layer", "table"])
def test_a_corrupt_byte_is_found(tmp_path: Path, tier: Tier, part: int, where: str, compression: Compression) -> None:
    weights = convert(random_model("llama-multi-query"), tmp_path, compression)
    is_layer = where == "layer"
    entry = weights.packed.units[2].entries[1] if is_layer else weights.packed.tables[-1]
    offset, count = entry.parts[part]
    with weights.store.path.open("r+b") as file:
        file.seek(offset + count - 3)
        byte = file.read(1)[0]
        file.seek(offset + count - 3)
        file.write(bytes([byte ^ 1]))
    name = r"layers\.1\.self_attn\.q_proj" if is_layer else "embed_tokens"
    with pytest.raises(StoreError, match=rf"{name}.*corrupt"):
        greedy(weights, Policy(weights=on(tier)), HOST, tmp_path, [[5, 6]])


def test_an_interrupted_conversion_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("opt")
    written: list[str] = []
    original = weight_store._write_group

    def failing(fd, ckpt, plan, group):  # type: ignore[no-untyped-def]
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(group[0].name)
        return original(fd, ckpt, plan, group)

    monkeypatch.setattr(weight_store, "_write_group", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path, FOUR)
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    monkeypatch.setattr(weight_store, "_write_group", lambda *a: (written.append(a[3][0].name), original(*a))[1])
    resumed = convert(model, tmp_path, FOUR)
    monkeypatch.undo()
    fresh = convert(model, tmp_path / "other", FOUR)
    assert resumed.store.path.read_bytes() == fresh.store.path.read_bytes()
    assert resumed.store.checksums == fresh.store.checksums
    plan = store_plan(fresh.family, fresh.shape, fresh.packed, fresh.dtype)
    assert len(written) == len(plan.groups), "what was on disk is not written again"


def test_each_compression_has_its_own_store(tmp_path: Path) -> None:
    model = random_model("opt")
    kinds = [None, Compression(4), Compression(4, 16), Compression(3)]
    kinds += [Compression(4, 16, a, s) for a in Along for s in (Scales.MINMAX, Scales.MSE)][1:]
    paths = {convert(model, tmp_path, kind).store.path for kind in kinds}
    assert len(paths) == len(kinds)
    checkpoint, cache = tmp_path / "ckpt", tmp_path / "cache"
    assert PackedWeights.is_packed(checkpoint, DType.FLOAT32, cache, Compression(3))
    assert not PackedWeights.is_packed(checkpoint, DType.FLOAT32, cache, Compression(8))


@pytest.mark.parametrize("compression", [FOUR, FOUR_ALONG_OUTPUTS, COMPRESSIONS[-1]], ids=str)
def test_blocks_of_rows_give_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: Compression
) -> None:
    """Large tables are quantized piece by piece."""
    model = random_model("llama-tied-grouped")
    whole = convert(model, tmp_path / "a", compression).store
    monkeypatch.setattr("flexgen_bench.memory.stored_tensor.BLOCK_VALUES", 200)
    pieces = convert(model, tmp_path / "b", compression).store
    assert whole.path.read_bytes() == pieces.path.read_bytes()
    assert whole.checksums == pieces.checksums


def test_weights_are_quantized_from_the_checkpoints_own_type(tmp_path: Path) -> None:
    """Rounding to the engine's type first would add an error of its own."""
    model = random_model("opt")
    own = convert(model, tmp_path, FOUR, DType.FLOAT32)
    half = convert(model, tmp_path, FOUR, DType.BFLOAT16)
    for a, b in zip(own.packed.entries, half.packed.entries, strict=True):
        if a.compression:
            for (i, count), (j, _) in zip(a.parts, b.parts, strict=True):
                one, other = own.store.path.read_bytes(), half.store.path.read_bytes()
                assert one[i : i + count] == other[j : j + count], a.tensor.spec.name


@pytest.mark.parametrize(
    ("value", "message"), [(70000.0, "70000.*float16"), (-1e9, "float16"), (float("nan"), "NaN or infinite")]
)
def test_values_that_cannot_be_quantized_are_refused(tmp_path: Path, value: float, message: str) -> None:
    model = random_model("opt")
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[3, 5] = value
    with pytest.raises(StoreError, match=rf"layers\.1\.fc1.*{message}"):
        convert(model, tmp_path, FOUR)
    if abs(value) < float("inf"):
        convert(model, tmp_path, None)


# Policies


def test_a_policy_must_say_how_the_weights_are_packed(tmp_path: Path) -> None:
    weights = convert(random_model("opt"), tmp_path, FOUR)
    device = Device.open(HOST, 1)
    others = (Compression(4, 64), FOUR_ALONG_OUTPUTS, Compression(4, 16, scales=Scales.MSE))
    for lossy in (EXACT, *(Lossy(weights=other) for other in others)):
        with pytest.raises(UserError, match=r"lossy\.weights.*4 bits in groups of 16 along inputs"):
            weights.engine(Policy(lossy=lossy), device, tmp_path)


def test_the_chosen_policy_carries_what_is_lossy_and_fits_more(tmp_path: Path) -> None:
    shape = opt_shape(
        num_layers=8, hidden_size=256, embed_dim=256, ffn_size=1024, num_heads=4, num_kv_heads=4, head_dim=64
    )
    plain = Model.of(shape, DType.FLOAT32).packed
    rest = 20 * MIB  # workspace and what belongs to the sequences
    free = {Tier.CPU: sum(u.home_bytes for u in plain.units) // 2 + rest}
    lossy = Lossy(weights=Compression(4))
    exact, small = (
        default_policy(SearchSpace(Job(shape, DType.FLOAT32, HOST, 8, 4, 1), (one,), free)) for one in (EXACT, lossy)
    )
    assert exact.lossy == EXACT
    assert small.lossy == lossy
    assert exact.weights.disk > 0
    assert small.weights.cpu == 1


def test_llm_with_compressed_weights(tmp_path: Path) -> None:
    model = fake_quantized(random_model("llama-tied-grouped"), FOUR)
    prompts = random_prompts([4, 9])
    logit_rows = greedy_reference(model, prompts, NEW_TOKENS)
    folder = save(random_model("llama-tied-grouped"), tmp_path / "ckpt")
    params, lossy = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True), Lossy(weights=FOUR)
    options: dict[str, Any] = {"gpu": "cpu", "cache_dir": tmp_path / "cache", "threads": 1}
    with LLM(folder, lossy=lossy, **options) as llm:
        found = llm.generate(prompts, params)
        assert [list(o.token_ids) for o in found] == logit_rows
        assert llm.policy is not None
        assert llm.policy.lossy == lossy
    with LLM(folder, policy=Policy(lossy=lossy), **options) as llm:
        assert [list(o.token_ids) for o in llm.generate(prompts, params)] == logit_rows
    with pytest.raises(UserError, match=r"lossy = '4-bit/16 weights'.*policy"):
        LLM(folder, policy=Policy(), lossy=lossy, **options)


def test_groups_along_outputs_wherever_a_layer_is_computed(tmp_path: Path) -> None:
    """Unpacked into dequantized buffers for an accelerator, in place on the processor: the same tokens."""
    model = fake_quantized(random_model("llama-tied-grouped"), FOUR_ALONG_OUTPUTS)
    prompts = random_prompts([4, 9, 20])
    logit_rows = greedy_reference(model, prompts, NEW_TOKENS)
    weights = convert(random_model("llama-tied-grouped"), tmp_path, FOUR_ALONG_OUTPUTS)
    for offloaded in Offloaded:
        policy = Policy(2, 2, on(Tier.CPU), on(Tier.GPU), on(Tier.GPU), offloaded=offloaded)
        assert greedy(weights, policy, EMULATED, tmp_path, prompts) == logit_rows


def test_compressed_and_plain_weights_are_told_apart(tmp_path: Path) -> None:
    weights = convert(random_model("opt"), tmp_path, FOUR)
    held = hold(weights, Tier.CPU)
    try:
        found = held.of(Step(Lane.CPU, StepKind.PROJECT, 1))
        assert isinstance(found["qkv.weight"], QuantizedWeight)
        assert isinstance(found["qkv.bias"], torch.Tensor)
    finally:
        held.close()
