"""gpt-oss as it is published: experts in MXFP4, which stay as they are, and sinks that count."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.checkpoints.source import open_source
from flexgen_bench.config.build import model_spec
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.microscaling import MXFP4
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, ExpertLoads, Offloaded, Policy
from flexgen_bench.core.tiers import Site, Tier
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.resident_cache import Attention
from flexgen_bench.kernels.native import build
from flexgen_bench.kernels.quantization import fake_quantize
from flexgen_bench.models.model import Model
from flexgen_bench.planner.cost import StepCost
from flexgen_bench.planner.memory_plan import plan_job
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.schedule.steps import StepKind
from tests.engine.test_engine_tokens import Reference, check_allocated_as_planned, on, run
from tests.kernels.test_microscaling import stack
from tests.support.planner_machines import GPU_SITE, accelerator
from tests.support.shapes import no_progress
from tests.support.tiny_models import EMULATED, HOST, VOCAB, greedy_reference, random_prompts, save

PROMPTS = random_prompts([1, 30, 9, 9, 5])
EXPERTS, HIDDEN, WIDTH = 4, 64, 32


def made(**changes: Any) -> Any:
    """A random model, of sizes that are whole groups."""
    from transformers import GptOssConfig, GptOssForCausalLM

    settings = {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
    }
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**(settings | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(torch.randn_like(parameter) * 0.15 + around)
    return model.eval()


@dataclass(frozen=True)
class Published:
    """folder: a checkpoint with experts in MXFP4; model: what transformers reads there, with the same numbers."""

    folder: Path
    model: Any


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    from transformers import AutoModelForCausalLM

    folder = save(made(), tmp_path_factory.mktemp("gpt-oss") / "ckpt")
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        for name, outputs, inputs in (("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
            whole = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[whole]
            blocks, scales = stack(EXPERTS, outputs, inputs, seed=layer)
            tensors |= {f"{whole}_blocks": blocks, f"{whole}_scales": scales - 5}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return Published(folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


@pytest.fixture(scope="module")
def reference(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    weights = PackedWeights.from_checkpoint(published.folder, DType.FLOAT32, tmp_path_factory.mktemp("cache"))
    return Reference(weights, PROMPTS, greedy_reference(published.model, PROMPTS, 9))


def matrices_of_experts(weights: PackedWeights) -> int:
    return sum(e.compression == MXFP4 for e in weights.packed.entries)


def test_experts_stay_as_they_are(reference: Reference) -> None:
    """A byte for two values, and one for 32, and nothing else."""
    packed = reference.weights.packed
    entries = [e for e in packed.entries if e.compression == MXFP4]
    assert len(entries) == 2 * EXPERTS * 2
    assert all(sum(n for _, n in e.parts) == e.tensor.spec.num_values * 17 // 32 for e in entries)
    assert packed.compression is None, "nothing is lossy"


@pytest.mark.parametrize(("name", "gib"), [("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)])
def test_plans_count_what_is_published(name: str, gib: float) -> None:
    """The checkpoints' sizes by their model card."""
    packed = Model.of(model_spec(name).shape, DType.BFLOAT16).packed
    assert packed.file_bytes / 2**30 == pytest.approx(gib, abs=0.05)


@pytest.mark.parametrize("native", ["1", "0"], ids=["native", "torch"])
@pytest.mark.parametrize("tier", [Tier.CPU, Tier.DISK])
def test_tokens_on_the_host(
    reference: Reference, tier: Tier, native: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(build.SWITCH, native)
    assert run(reference, Policy(3, 2, on(tier), on(tier)), HOST, tmp_path)[0] == reference.tokens


@pytest.mark.parametrize("offloaded", Offloaded)
def test_tokens_of_streamed_layers(reference: Reference, offloaded: Offloaded, tmp_path: Path) -> None:
    """The cpu attends for layers whose weights are on their way."""
    policy = Policy(2, 3, on(Tier.CPU), on(Tier.CPU), attention=AttentionSite.CPU, offloaded=offloaded)
    found, result = run(reference, policy, EMULATED, tmp_path)
    assert found == reference.tokens
    check_allocated_as_planned(result, EMULATED)


@pytest.mark.parametrize("tier", [Tier.CPU, Tier.DISK])
@pytest.mark.parametrize("loads", ExpertLoads)
def test_experts_apart(reference: Reference, tier: Tier, loads: ExpertLoads, tmp_path: Path) -> None:
    """Packed on every link; what is not touched stays."""
    for policy in (
        Policy(2, 3, on(Tier.GPU), on(Tier.CPU), experts=on(tier), expert_loads=loads),
        Policy(1, 3, on(Tier.GPU), on(Tier.GPU), experts=on(tier), expert_loads=loads, offloaded=Offloaded.IN_PLACE),
    ):
        found, result = run(reference, policy, EMULATED, tmp_path)
        assert found == reference.tokens
        check_allocated_as_planned(result, EMULATED)


def test_unpacking_is_planned_and_priced() -> None:
    """An accelerator unpacks an expert whenever it is used, and reads it packed; nobody unpacks plain ones."""
    shape, policy = model_spec("gpt-oss-20b").shape, Policy(4, 1, on(Tier.CPU), on(Tier.GPU), on(Tier.GPU))
    workspaces, seconds = [], []
    for packing in ("mxfp4", None):
        model = Model.of(replace(shape, options=dict(shape.options) | {"packing": packing}), DType.BFLOAT16)
        plan = plan_job(model, policy, accelerator(), [Request(64, 4)] * 4)
        workspaces.append(plan.bytes[Site.GPU]["workspace"])
        scheduler = Scheduler(policy, plan)
        scheduler.steps(scheduler.schedule())
        scheduler.postprocess()
        step = next(s for s in scheduler.steps(scheduler.schedule()) if s.unit == 1 and s.kind is StepKind.LAYER)
        seconds.append(StepCost(plan).seconds(step))
    one = 3 * 2880**2 + 3 * 2880
    assert workspaces[0] - workspaces[1] == 2 * one
    values, site = plan.job.units[1].touched(4) * one, GPU_SITE
    assert seconds[0] - seconds[1] == pytest.approx(values * (2 / site.unpack - (2 - 17 / 32) / site.memory), rel=1e-3)


def test_compression_is_of_the_others(published: Published, tmp_path: Path) -> None:
    """A policy's compression leaves experts alone: they are exact, and smaller than it would make them."""
    four = Compression(4, 16)
    weights = PackedWeights.from_checkpoint(published.folder, DType.FLOAT32, tmp_path, compression=four)
    assert matrices_of_experts(weights) == 2 * EXPERTS * 2
    model = made()
    model.load_state_dict(published.model.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "router" not in name and "experts" not in name:
                kept = four.of_vocabulary if name.startswith(("model.embed", "lm_head")) else four
                parameter.copy_(fake_quantize(parameter, kept))
    same = Reference(weights, PROMPTS, greedy_reference(model, PROMPTS, 9))
    for hardware, tier in ((HOST, Tier.CPU), (EMULATED, Tier.CPU), (EMULATED, Tier.GPU)):
        policy = Policy(3, 2, on(tier), on(tier), lossy=Lossy(weights=four))
        assert run(same, policy, hardware, tmp_path)[0] == same.tokens


def test_resident_layers_of_an_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without windows, decoding goes through the few operators that take a layer's sinks."""
    model = made(layer_types=["full_attention"] * 2)
    weights = PackedWeights.from_checkpoint(save(model, tmp_path / "ckpt"), DType.FLOAT32, tmp_path / "cache")
    same = Reference(weights, PROMPTS, greedy_reference(model, PROMPTS, 9))
    calls, attend = [], Attention.__call__

    def counted(self: Attention, *given: Any) -> Any:
        calls.append(self)
        return attend(self, *given)

    monkeypatch.setattr(Attention, "__call__", counted)
    monkeypatch.setattr(Device, "launches_kernels", True)
    assert run(same, Policy(3, 2, on(Tier.GPU), on(Tier.GPU), on(Tier.GPU)), EMULATED, tmp_path)[0] == same.tokens
    assert calls
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-100.0)
    assert greedy_reference(model, PROMPTS, 9) != same.tokens, "sinks count"


@pytest.mark.parametrize("source", ["dummy", "as it is", "in another type"])
def test_cells_keep_what_is_packed(published: Published, source: str, tmp_path: Path) -> None:
    """Every system is given MXFP4, and transformers reads there what this engine does."""
    from transformers import AutoModelForCausalLM

    with open_source(published.folder) as opened:
        shape = opened.shape
    kind = WeightSource.DUMMY if source == "dummy" else WeightSource.PATH
    spec = ModelSpec(shape, kind, "" if source == "dummy" else str(published.folder))
    dtype = DType.BFLOAT16 if source == "in another type" else DType.FLOAT32
    folder = prepare_checkpoint(spec, dtype, tmp_path, no_progress)
    assert (folder == published.folder) is (source == "as it is")
    weights = PackedWeights.from_checkpoint(folder, DType.FLOAT32, tmp_path / "cache")
    assert matrices_of_experts(weights) == 2 * EXPERTS * 2
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    same = Reference(weights, PROMPTS, greedy_reference(model, PROMPTS, 9))
    assert run(same, Policy(3, 2), HOST, tmp_path)[0] == same.tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t.pop(f"{name}_scales"), "gate_up_proj_scales is missing"),
        (lambda t, name: t.__setitem__(f"{name}_blocks", t[f"{name}_blocks"][:, :, :, :8]), "expected are uint8"),
        (lambda t, name: t[f"{name}_scales"][1, 2].fill_(255), "holds NaN"),
        (lambda t, name: t[f"{name}_scales"][1, 2].fill_(254), "beyond the numbers"),
    ],
    ids=["no scales", "other blocks", "NaN", "too large"],
)
def test_damaged_checkpoints_are_named(published: Published, change: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    (folder / "config.json").write_text((published.folder / "config.json").read_text())
    tensors = load_file(published.folder / "model.safetensors")
    change(tensors, "model.layers.1.mlp.experts.gate_up_proj")
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(StoreError, match=message):
        PackedWeights.from_checkpoint(folder, DType.FLOAT32, tmp_path / "cache")
