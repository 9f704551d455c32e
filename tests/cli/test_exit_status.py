"""A command's exit status is about what the benchmark is about; of the systems beside it there is a record, a line and
a warning."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.command import run_command

ROOT = Path(__file__).parents[2]
SYSTEMS = ("counting", "raising", "sleeping", "crashing", "short")


@pytest.fixture
def run(tmp_path: Path, shared_cache: Path):  # type: ignore[no-untyped-def]
    """The command with systems that fail in their own ways; ``subject`` is the one that it is about."""

    def command(*arguments: str, subject: str = "counting") -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        conf = tmp_path / "conf"
        for folder in ("system", "suite"):
            (conf / folder).mkdir(parents=True, exist_ok=True)
        for name in SYSTEMS:
            text = {
                "name": name,
                "target": f"tests.support.failing_systems:{name.capitalize()}",
                "options": {},
                "choices": {},
                "subject": name == subject,
            }
            (conf / "system" / f"{name}.yaml").write_text(yaml.safe_dump(text))
        group = {
            "name": "all",
            "overrides": [
                "model=opt-4m",
                "weights=dummy",
                "workload=tiny",
                "dtype=float32",
                "gpu=cpu",
                "measure.repetitions=1",
                "measure.warmup=0",
            ],
            "systems": list(SYSTEMS),
            "system_overrides": {"sleeping": ["measure.time_limit_s=8"]},
        }
        (conf / "suite" / "mine.yaml").write_text(yaml.safe_dump({"cells": [group]}))
        done = run_command(
            tmp_path,
            *("--config-dir", str(conf), "calibrate=false", *arguments),
            FLEXGEN_BENCH_CACHE=str(shared_cache),
            PID_FILE=str(tmp_path / "pids"),
            PYTHONPATH=str(ROOT),
        )
        return done, json.loads(done.stdout.strip().splitlines()[-1])

    return command


def test_rivals_that_fail_are_recorded_shown_and_warned_of(run) -> None:  # type: ignore[no-untyped-def]
    """``make bench`` ended in "Error 1" because a system beside ours was slow. Of each there is everything; the status
    is of ours."""
    done, told = run("suite=mine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert told["status"] == {"ok": 1, "failed": 2, "timeout": 1, "invalid": 1}
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1] for line in warnings] == ["raising", "sleeping", "crashing", "short"]
    assert "the weights are upside down" in warnings[0]
    assert "sleeping ended in timeout: time limit of 8.0s reached" in done.stderr
    assert "cell=all system=raising" in warnings[0], "how to run it again"
    for name in SYSTEMS:
        assert f"| {name}" in done.stdout
    assert len(told["records"]) == len(SYSTEMS)
    # Finished, and still warned of.
    again, told = run("suite=mine")
    assert again.returncode == 0
    assert again.stderr.count("warning: ") == 4
    assert "5 cells, nothing left to run" in again.stderr


@pytest.mark.parametrize(
    "subject", ["raising", *(pytest.param(s, marks=pytest.mark.slow) for s in ("crashing", "short"))]
)
def test_ours_that_fails_is_the_status(run, subject: str) -> None:  # type: ignore[no-untyped-def]
    done, told = run("suite=mine", "measure.time_limit_s=8", subject=subject)
    assert done.returncode == 1
    assert told["status"]["ok"] == 1
    assert f"warning: {subject}" not in done.stderr


@pytest.mark.slow
def test_a_rival_asked_for_alone_is_the_status(run) -> None:  # type: ignore[no-untyped-def]
    for extra in ([], ["suite=mine"]):
        done, told = run("model=opt-4m", "weights=dummy", "workload=tiny", "gpu=cpu", "system=raising", *extra)
        assert told["status"] == {"failed": 1}
        assert done.returncode == 1
        assert "warning" not in done.stderr
