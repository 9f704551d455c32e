"""The card before a run: what would be done and why, what it takes, and no trace of having asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flexgen_bench.config.paths import conf_dir
from flexgen_bench.machine import host as machine
from flexgen_bench.machine.measured_rates import SCHEMA, path_for
from tests.support.simulated_cli import Answer, Run, add_system, document, make_run, written

HERE = ("model=opt-125m", "workload=tiny", "gpu=cpu")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


def calibrate(folder: Path) -> None:
    """As if this machine had been measured: it sustains what the profile t4 states for its processor."""
    from importlib import metadata

    cpu = yaml.safe_load((conf_dir() / "gpu" / "t4.yaml").read_text())["rates"]["cpu"]
    path = path_for(folder / "cache", machine.physical_cores())
    path.parent.mkdir(parents=True)
    data = {
        "schema": SCHEMA,
        "torch": metadata.version("torch"),
        "machine": {},
        "mode": "quick",
        "measured": "2026-01-01T00:00:00",
        "unstable": [],
        "notes": [],
        "also": {},
        "rates": {"cpu": cpu, "links": {"disk_read": 2e9, "disk_write": 1e9}, "spread": {"cpu.memory": 0.1}},
    }
    path.write_text(yaml.safe_dump(data))


def card(answer: Answer) -> dict[str, str]:
    """The lines of a card by their names; of several with one name, joined."""
    lines: dict[str, str] = {}
    for line in answer.stdout.splitlines():
        if line.startswith("  ") and not line.startswith("   "):
            name, text = line[2:14].strip(), line[14:].strip()
            lines[name] = f"{lines[name]} / {text}" if name in lines else text
    return lines


def test_a_card(run: Run, tmp_path: Path) -> None:
    add_system(tmp_path, "fake", "Compressing", follows_policy=True)
    answer = run("model=opt-30b", "gpu=t4", "system=fake", "policy.lossy.weights=null", command="plan")
    assert answer.returncode == 0, answer.stderr
    assert "fake, opt-30b (dummy weights), float16, on t4" in answer.stdout
    assert "as many prompts as a block holds, 512 + 32 tokens [SIMULATED]" in answer.stdout
    lines = card(answer)
    assert lines["policy"] == "2x2; weights gpu 20 %, cpu 80 %; KV cache cpu; attention on the cpu"
    assert lines["why"] == "the link is busier than anything else / so blocks are large"
    assert lines["gpu"] == "[#####               ] 3.73 GiB of 15.00 GiB (25%)"
    assert lines["cpu"] == "[#####               ] 48.43 GiB of 208.00 GiB (23%)"
    assert lines["time"].startswith("prefill 2.0s, decode 6.0s, in all 8.0s for 4 prompts in 1 block")
    assert lines["speed"] == "16.0 tok/s (decode 20.7 tok/s) SIMULATED"
    assert lines["bottleneck"] == "the link to the gpu", "as the table of the same job has it"
    assert lines["limits"].startswith("cpu memory (")
    # A linear program's promise: it knows of no waiting.
    assert lines["one more"] == (
        "10 % faster h2d: +1.5 tok/s in the program that placed it / 1 GB of gpu memory: +0.25 tok/s in the program "
        "that placed it"
    )
    assert lines["writes"] == "2.79 GiB to disk"
    assert lines["note"] == "a remark"
    assert "no NVIDIA GPU" in lines["here"]
    assert "the run is simulated" in lines["here"]
    assert [row["tok_per_s"] for row in document(answer)["simulated"]] == [pytest.approx(16)]
    assert written(tmp_path) == [Path("cache/predictions.json")], "what was searched for"


def test_the_card_of_a_job_whose_blocks_overlap(run: Run, tmp_path: Path) -> None:
    """It told seconds of a prefill that was over before the machine could have done it: most prompts were computed
    later."""
    add_system(tmp_path, "fake", "Overlapping")
    lines = card(run("model=opt-30b", "gpu=t4", "system=fake", command="plan"))
    assert lines["time"] == ("prefill -, decode - (they overlap), in all 32.0s for 16 prompts in 4 blocks of 4")
    assert lines["speed"] == "16.0 tok/s SIMULATED"


def test_dry_run_is_the_same(run: Run, tmp_path: Path) -> None:
    add_system(tmp_path, "fake", "Plain")
    arguments = ("model=opt-30b", "gpu=t4", "system=fake")
    assert run(*arguments, command="plan").stdout == run(*arguments, "dry_run=true").stdout


def test_what_does_not_fit_fails(run: Run, tmp_path: Path) -> None:
    add_system(tmp_path, "large", "TooLarge")
    answer = run("model=opt-30b", "gpu=t4", "system=large", command="plan")
    assert answer.returncode == 1
    assert "DOES NOT FIT" in card(answer)["outcome"]
    assert "Take a smaller model." in answer.stdout


def test_what_is_refused_is_bad_input(run: Run, tmp_path: Path) -> None:
    add_system(tmp_path, "strict", "Strict")
    answer = run("model=opt-30b", "gpu=t4", "system=strict", command="plan")
    assert answer.returncode == 2
    assert "one of slow, slower" in card(answer)["outcome"]
    assert run("model=opt-31b", command="plan").returncode == 2


def test_what_cannot_be_predicted_is_no_failure(run: Run, tmp_path: Path) -> None:
    add_system(tmp_path, "none", "Impossible")
    answer = run("model=opt-30b", "gpu=t4", "system=none", command="plan")
    assert answer.returncode == 0
    assert card(answer)["outcome"] == "not possible: it knows no such model"


def test_a_cell_of_this_machine(run: Run, tmp_path: Path) -> None:
    """Its job is the one that is run; it says what has to be made first, and that nothing is recorded."""
    calibrate(tmp_path)
    target = "baselines.transformers.system:TransformersSystem"
    add_system(tmp_path, "mine", "Plain", target=target)
    before = written(tmp_path)
    answer = run(*HERE, "system=mine", command="plan")
    assert answer.returncode == 0, answer.stderr
    lines = card(answer)
    assert "4 prompts, 8 + 4 tokens" in answer.stdout
    assert lines["first"].startswith("making random weights: a checkpoint of 238.8")
    assert lines["recorded"] == "no"
    assert written(tmp_path) == before


def test_beside_a_measurement(run: Run, tmp_path: Path) -> None:
    """The record keeps what was predicted for the run; the table shows it; the next card names the record."""
    calibrate(tmp_path)
    target = "baselines.transformers.system:TransformersSystem"
    add_system(tmp_path, "mine", "Plain", target=target, constants={"batch": 4})
    few = ("measure.repetitions=1", "measure.warmup=0")
    answer = run(*HERE, "system=mine", *few)
    assert answer.returncode == 0, answer.stderr
    (name,) = document(answer)["records"]
    record = json.loads((tmp_path / name).read_text())
    assert record["prediction"] == {
        "evidence": "SIMULATED",
        "machine": "cpu",
        "rates": "measured on this machine",
        "status": "ok",
        "tok_per_s": pytest.approx(2.0),
        "prefill_s": 2.0,
        "decode_s": 6.0,
        "bottleneck": "the link to the gpu",
    }
    assert record["spec"]["hardware"]["rates"]["cpu"]["memory"] == 6e10
    assert "2.00 (S)" in answer.stdout
    assert "(S) = SIMULATED" in answer.stdout
    lines = card(run(*HERE, "system=mine", *few, command="plan"))
    assert lines["recorded"] == f"{name} (is skipped; rerun=true measures again)"
    assert "first" not in lines


def test_without_calibration(run: Run, tmp_path: Path) -> None:
    """Nothing is known of this machine, and nobody may measure it: there is nothing to predict with, and that is
    said."""
    add_system(tmp_path, "fake", "Plain")
    answer = run(*HERE, "system=fake", "calibrate=false", command="plan")
    assert answer.returncode == 2
    assert "gpu.rates" in card(answer)["outcome"]
    assert written(tmp_path) == []


def test_a_disk_that_is_too_small(run: Run, tmp_path: Path) -> None:
    calibrate(tmp_path)
    add_system(tmp_path, "fake", "Plain")
    there = tmp_path / "checkpoint"
    there.mkdir()
    answer = run(
        "model=opt-175b", "weights=path", f"location={there}", "gpu=cpu", "system=fake", "workload=tiny", command="plan"
    )
    if "disk" not in card(answer):
        pytest.skip("this machine's disk holds two copies of OPT-175B")
    assert answer.returncode == 1
    assert "DOES NOT FIT: opt-175b on gpu=cpu cannot be measured" in answer.stdout
