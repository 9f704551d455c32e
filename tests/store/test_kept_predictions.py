"""Answers that are kept: found again only by all that decides them, never in the way, and never in the checkout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import EXACT, Compression, Lossy
from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.slices import Slice
from flexgen_bench.core.status import Status
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.ask import Ask
from flexgen_bench.store import kept_predictions
from flexgen_bench.store.kept_predictions import MOST, Answer, KeptPredictions, load, text_of
from tests.support.planner_machines import MIB, host, small_opt
from tests.support.simulated_cli import Run, add_system, document, make_run

ENGINE = "flexgen_bench.planner.engine_predictor:EnginePredictor"
MACHINE = host(64 * MIB)
JOB = Job(small_opt(), DType.FLOAT16, MACHINE, 32, 4, 8)
ASK = Ask("flexgen", ENGINE, {"share": 0.5}, {"policy": None}, JOB)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


def changed(**fields: Any) -> Ask:
    return replace(ASK, job=replace(JOB, **fields))


def with_rates(change: Callable[[Any], Any]) -> Ask:
    rates = MACHINE.rates
    assert rates is not None
    return changed(hardware=replace(MACHINE, rates=change(rates)))


def faster_memory(rates: Any) -> Any:
    site = rates.sites[Tier.CPU]
    return replace(rates, sites={**rates.sites, Tier.CPU: replace(site, memory=site.memory * 1.001)})


DIFFERENT = {
    "predictor": replace(ASK, predictor=ENGINE + "2"),
    "constants": replace(ASK, constants={"share": 0.51}),
    "options": replace(ASK, options={"policy": None, "more": 1}),
    "a policy": replace(ASK, options={"policy": Policy(4)}),
    "shape": changed(shape=replace(small_opt(), num_layers=5)),
    "dtype": changed(dtype=DType.BFLOAT16),
    "prompt_len": changed(prompt_len=33),
    "gen_len": changed(gen_len=5),
    "num_prompts": changed(num_prompts=None),
    "lossy": changed(lossy=Lossy(weights=Compression(4))),
    "num_gpus": changed(num_gpus=2),
    "part": changed(part=Slice(0, 2)),
    "max_latency_s": changed(max_latency_s=9.0),
    "memory": changed(hardware=replace(MACHINE, cpu_memory_bytes=65 * MIB)),
    "a link": changed(hardware=replace(MACHINE, links={"disk_read": 1.5e9})),
    "a rate": with_rates(faster_memory),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_whatever_decides_an_answer_decides_its_key(name: str) -> None:
    assert DIFFERENT[name].key != ASK.key


def test_every_field_of_a_job_has_been_changed() -> None:
    """A field that is added to Job must not be left out of the key."""
    told = {"hardware": "memory"}
    assert {told.get(f.name, f.name) for f in fields(Job)} <= set(DIFFERENT)


def test_what_decides_nothing_is_not_in_the_key() -> None:
    sourced = replace(MACHINE, sources={"links": "measured elsewhere"})
    assert changed(hardware=sourced).key == ASK.key
    assert replace(ASK, name="another").key == ASK.key
    assert replace(ASK, options={}).key == ASK.key, "None is for the predictor to choose"
    given = [replace(ASK, options={"policy": policy}).key for policy in (Policy(4), to_json(Policy(4)))]
    assert given[0] == given[1], "a policy decides by what it says"


def test_code_that_changes_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ASK.key
    monkeypatch.setattr(kept_predictions, "code_of", lambda predictor: "other code")
    assert ASK.key != before


def test_an_answer_comes_back_whole(tmp_path: Path) -> None:
    found = ASK.answer()
    assert found.run is not None
    path = tmp_path / "predictions.json"
    path.write_text(text_of({ASK.key: found}))
    assert load(path) == {ASK.key: found}
    assert found.run.settings["policy"]["gpu_batch_size"] >= 1
    tight = changed(hardware=replace(MACHINE, cpu_memory_bytes=MIB), num_prompts=8, prompt_len=100_000).answer()
    assert tight.status is Status.OOM
    assert (tight.need_bytes or 0) > (tight.capacity_bytes or 0) > 0
    path.write_text(text_of({"k": tight}))
    assert load(path) == {"k": tight}


def answer(asked: str) -> Answer:
    return Answer(Prediction(1.0, 2.0, 4, 32, 4, 4), asked=asked)


def test_the_users_file_keeps_the_newest(tmp_path: Path) -> None:
    told: list[str] = []
    kept = KeptPredictions(tmp_path / "shipped.json", tmp_path / "cache" / "own.json", told.append)
    kept.keep({f"old{i}": answer("x") for i in range(MOST)})
    kept.keep({"new": answer("y")})
    again = KeptPredictions(kept.shipped, kept.own, told.append)
    assert again.find("new") == answer("y")
    assert again.find("old0") is None
    assert again.find("old1") == answer("x")
    assert not kept.shipped.exists()
    assert told == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"schema_version": 99, "answers": {}}',
        '{"schema_version": 3, "answers": 1}',
        '{"schema_version": 3, "answers": {"k": {"asked": "x", "status": "ok"}}}',
        '{"schema_version": 3, "answers": {"k": {"asked": "x", "status": "ok", "run": {"prefill_s": 1}}}}',
    ],
)
def test_a_damaged_file_is_told_and_made_anew(tmp_path: Path, text: str) -> None:
    told: list[str] = []
    own, shipped = tmp_path / "own.json", tmp_path / "shipped.json"
    own.write_text(text)
    shipped.write_text(text)
    kept = KeptPredictions(shipped, own, told.append)
    assert kept.find("k") is None
    assert [str(own) in line or str(shipped) in line for line in told] == [True, True]
    kept.keep({"k": answer("x")})
    assert load(own) == {"k": answer("x")}
    assert shipped.read_text() == text, "it is for reading alone"


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / "file").write_text("")
    kept = KeptPredictions(tmp_path / "none", tmp_path / "file" / "own.json", told.append)
    kept.keep({"k": answer("x")})
    assert len(told) == 1
    assert "not kept" in told[0]


SMALL = (
    "model=opt-125m",
    "gpu=laptop",
    "workload=32-32",
    "system=flexgen",
    "workload.num_prompts=4",
    "policy.lossy.weights=null",
)


def test_a_search_is_made_once(run: Run, tmp_path: Path) -> None:
    """The title command searched for the same policies whenever it was asked: 36 s on two slow cores."""
    first = run(*SMALL)
    assert "searching for a policy: flexgen opt-125m" in first.stderr
    own = tmp_path / "cache" / "predictions.json"
    text = own.read_text()
    assert "opt-125m on laptop, 4 prompts of 32, 32 generated, exact" in text
    again = run(*SMALL)
    assert "searching" not in again.stderr
    assert again.stdout == first.stdout
    assert own.read_text() == text
    other = run(*SMALL, "gpu.cpu_memory=15GiB")
    assert "searching" in other.stderr
    own.write_text(text[:100])
    damaged = run(*SMALL)
    assert f"warning: {own} does not hold predictions" in damaged.stderr
    assert damaged.stdout == first.stdout
    assert len(json.loads(own.read_text())["answers"]) == 1


def test_mistakes_are_not_kept(run: Run, tmp_path: Path) -> None:
    add_system(tmp_path, "broken", "Mistaken", follows_policy=True)
    answer = run("model=opt-30b", "gpu=t4", "system=broken")
    assert document(answer)["simulated"][0]["status"] == "failed"
    assert not (tmp_path / "cache" / "predictions.json").exists()


def test_the_question_says_what_it_asks() -> None:
    assert EXACT.is_exact
    assert ASK.answer().asked.endswith("8 prompts of 32, 4 generated, exact")
