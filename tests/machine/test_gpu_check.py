"""The step runner of scripts/gpu_check.sh: which steps there are, what is done, what a failure leaves. No GPU is
needed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check = load("gpu_check")
OK = '{"records": ["a.json"], "status": {"ok": 1}}\n'


def test_every_cell_of_the_suite_is_a_step_of_under_ten_minutes(tmp_path: Path) -> None:
    steps = check.all_steps(tmp_path)
    names = [step.name for step in steps]
    assert names[:4] == ["environment", "kernels", "tests", "rates"]
    assert len(set(names)) == len(names)
    for system in ("flexgen", "flexgen_original"):
        for cell in ("opt-6.7b", "opt-30b", "opt-175b-4bit"):
            assert f"{cell}:{system}" in names
    assert {"opt-30b-batches:accelerate", "opt-30b-batches:deepspeed"} <= set(names)
    assert all(step.limit_s < 600 for step in steps)
    for step in steps:
        path = step.command[0] if step.command[0] != "-m" else f"{step.command[1]}/__main__.py"
        assert (ROOT / path).exists() or step.command[1] == "pytest"


@pytest.mark.parametrize(
    ("output", "returncode", "done", "why"),
    [
        (OK, 0, True, "ok"),
        ('{"records": ["a"], "status": {"oom": 1}}', 0, True, "oom"),
        ('{"records": ["a"], "status": {"timeout": 1}}', 1, True, "timeout"),
        ('{"records": ["a"], "status": {"unavailable": 1}}', 1, False, "unavailable"),
        ('{"records": ["a"], "status": {"failed": 1}}', 1, False, "failed"),
        ("error: gpu = 'x'", 2, False, "no record, exit status 2"),
        ("", None, False, "stopped after its 5 s"),
    ],
)
def test_how_a_cell_ended(output: str, returncode: int | None, done: bool, why: str) -> None:
    step = check.Step("c:s", "", (), 5, is_cell=True)
    assert check.judge(step, returncode, output) == {"done": done, "why": why}


def test_a_failing_step_stops_nothing_and_is_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [check.Step(name, name, (), 10) for name in ("first", "second", "third")]
    fails, ran = {"second"}, []

    def runner(step: Any, log: Path) -> dict[str, Any]:
        ran.append(step.name)
        return {"done": step.name not in fails, "why": "x", "seconds": 1}

    path = tmp_path / "steps.json"
    assert check.run(steps, check.Notes(path), tmp_path, runner=runner) == 1
    assert ran == ["first", "second", "third"]
    assert "open  second" in capsys.readouterr().out
    fails.clear()
    assert check.run(steps, check.Notes(path), tmp_path, runner=runner) == 0
    assert ran[3:] == ["second"]
    assert check.run(steps[:1], check.Notes(path), tmp_path, again=True, runner=runner) == 0
    assert ran[4:] == ["first"]


def test_no_step_starts_that_could_end_too_late(tmp_path: Path) -> None:
    steps = [check.Step("long", "", (), 500), check.Step("short", "", (), 50)]
    ran: list[str] = []

    def runner(step: Any, log: Path) -> dict[str, Any]:
        ran.append(step.name)
        return {"done": True, "why": "ok"}

    notes = check.Notes(tmp_path / "steps.json")
    assert check.run(steps, notes, tmp_path, for_s=100, runner=runner) == 1
    assert ran == ["short"]


def test_notes_that_were_cut_short_are_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    path.write_text('{"first": {"do')
    assert check.Notes(path).entries == {}


def test_a_step_is_a_process_with_a_log_and_an_end(tmp_path: Path) -> None:
    ok = check.Step("ok", "", ("-c", "import os; print(os.environ['HF_HUB_OFFLINE'], 'said')"), 30)
    entry = check.run_step(ok, tmp_path / "ok.log")
    assert (entry["done"], entry["why"]) == (True, "ok")
    assert (tmp_path / "ok.log").read_text() == "1 said\n"
    slow = check.Step("slow", "", ("-c", "import time; time.sleep(60)"), 0.5)
    entry = check.run_step(slow, tmp_path / "slow.log")
    assert not entry["done"]
    assert entry["seconds"] < 30


def shell(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(ROOT / "scripts/gpu_check.sh"), *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def test_list_and_unknown_steps(tmp_path: Path) -> None:
    listed = shell("--list", "--results", str(tmp_path))
    assert listed.returncode == 0
    assert "open  rates (at most 400 s)" in listed.stdout
    unknown = shell("speed", "--results", str(tmp_path))
    assert unknown.returncode == 2
    assert "step = 'speed': must be one of environment, kernels, tests, rates" in unknown.stderr
    assert not list(tmp_path.iterdir())


def test_the_environment_step_says_what_is_missing(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is nothing missing here")
    ended = shell("environment", "--results", str(tmp_path))
    assert ended.returncode == 1
    folder = tmp_path / "benchmarks/gpu_check"
    report = json.loads((folder / "environment.json").read_text())
    assert "torch sees no CUDA device" in report["problems"]
    assert report["packages"]["torch"] == torch.__version__
    assert report["host"]["memory_bytes"] > 0
    notes = json.loads((folder / "steps.json").read_text())
    assert notes["environment"]["done"] is False


def test_rates_can_be_tried_out_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "rates.json"
    command = [
        sys.executable,
        "benchmarks/gpu_rates.py",
        "--device",
        "cpu",
        "--quick",
        "--dir",
        str(tmp_path),
        "--out",
        str(out),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    found = json.loads(out.read_text())
    assert not found["errors"]
    wanted = {"h2d", "d2h", "product", "packed product", "prefill attention", "decode attention", "disk read"}
    assert wanted <= {row["what"] for row in found["rows"]}
    assert all(row["apart"] < 0.01 for row in found["rows"] if row["what"] == "packed product")
    assert all(row["slowest"] <= row["median"] <= row["fastest"] for row in found["rows"])


def test_a_short_stay_ends_within_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What teaches most comes first, and what is left out is left out from the end; a step that is not done in time is
    stopped. 675 s and a part of OPT-175B are what fifteen minutes hold, start included."""
    steps = check.short_steps(tmp_path, quick=False)
    assert [step.name for step in steps][:2] == ["environment", "short:layer"]
    assert sum(step.expected_s for step in steps) < 840 - 100
    clock, ran = [0.0], []
    monkeypatch.setattr(check.time, "monotonic", lambda: clock[0])

    def runner(step: Any, log: Path) -> dict[str, Any]:
        ran.append(step)
        clock[0] += step.expected_s
        return {"done": True, "why": "ok"}

    notes = check.Notes(tmp_path / "steps.json")
    assert check.run(steps, notes, tmp_path, budget_s=200, runner=runner) == 1
    limits = (120, 120, 90, 75)
    assert ran == [check.replace(step, limit_s=limit) for step, limit in zip(steps[:4], limits, strict=True)]
    assert check.run(steps, notes, tmp_path, budget_s=840, runner=runner) == 0
    assert [step.name for step in ran] == [step.name for step in steps]
    files = {word for step in steps for word in step.command if word.startswith(str(tmp_path))}
    assert len(files) + 1 <= 8  # with the notes


def test_a_step_of_a_short_stay_without_a_gpu(tmp_path: Path) -> None:
    (step,) = (one for one in check.short_steps(tmp_path, quick=True) if one.name == "short:175b")
    assert check.run_step(step, tmp_path / "log")["why"] == "ok", (tmp_path / "log").read_text()
    found = json.loads((tmp_path / "benchmarks/gpu_check/short.json").read_text())["175b"]
    assert found["evidence"] == "EMULATED"
    assert found["projected"]["evidence"] == "PROJECTED"
    assert found["tok_per_s"] > found["projected"]["tok_per_s"] > 0
    assert found["predicted"]["tok_per_s"] > 0


@pytest.mark.slow
def test_a_whole_short_stay_can_be_tried_out_without_a_gpu(tmp_path: Path) -> None:
    ended = shell("--budget", "840", "--quick", "--results", str(tmp_path), timeout=500)
    assert ended.returncode == 0, ended.stdout
    found = json.loads((tmp_path / "benchmarks/gpu_check/short.json").read_text())
    assert list(found) == ["layer", "products", "threads", "resident", "original", "4bit", "30b", "tokens", "175b"]
    assert found["original"]["2"].startswith("skipped: the original FlexGen needs a CUDA device")
    assert all(one["same"] == one["of"] for one in found["tokens"]["policies"].values())
    assert shell("--budget", "840", "--quick", "--results", str(tmp_path)).stdout.count("done before") == 9
