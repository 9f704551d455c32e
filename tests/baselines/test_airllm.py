"""AirLLM as a system: transformers' tokens from one layer at a time. Skipped where its package is neither installed nor
in the cache; nothing is installed by a test."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baselines.airllm.package import PACKAGE
from baselines.airllm.system import FAMILIES, AirLLMSystem
from baselines.common import beside
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.core.status import Status
from flexgen_bench.runner.job import CellProcessJob
from flexgen_bench.systems.contract import ModelFiles
from tests.baselines import test_baselines as shared


def system(folder: Path, family: str = "llama", **options: Any) -> AirLLMSystem:
    target = "baselines.airllm.system:AirLLMSystem"
    spec = replace(shared.spec_of("transformers", family), system="airllm", target=target, system_options=options)
    return AirLLMSystem(spec, ModelFiles(folder, folder / "scratch", folder / "cache"))


@pytest.mark.skipif(not PACKAGE.is_installed(default_cache_dir()), reason="AirLLM is not in the cache")
@pytest.mark.slow
def test_its_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shared.write_checkpoint(folder, "llama")
    cache = tmp_path / "cache"
    (cache / "python").mkdir(parents=True)
    installed = PACKAGE.folder(default_cache_dir())
    if installed.is_dir():
        PACKAGE.folder(cache).symlink_to(installed)
    (tmp_path / "scratch").mkdir()
    spec = replace(system(folder).spec, measure=shared.MeasureSpec(repetitions=1, warmup=0, batch_sizes=(2,)))
    job = CellProcessJob(spec, folder, tmp_path / "scratch", cache, shared.PROMPTS)
    made = shared.work(replace(job, prepare_only=True), tmp_path)
    assert made.status is Status.OK, made.reason
    state = shared.work(job, tmp_path)
    assert state.status is Status.OK, state.reason
    assert state.outputs["token_ids"] == shared.expected_tokens("llama", tmp_path / "reference")
    assert state.report.realised["weights"] == {"disk": 1.0}
    assert state.report.lowest_tier == "disk"


def test_other_families_and_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match=f"opt models are not tried.*{', '.join(FAMILIES)}"):
        system(tmp_path, "opt").check()
    with pytest.raises(UserError, match="prefetching"):
        system(tmp_path, prefetching="often").check()


def test_a_package_that_cannot_be_had_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")

    monkeypatch.setattr(beside.subprocess, "run", pip)
    monkeypatch.setattr(beside.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CannotRun, match=r"cannot install airllm==4.*PIP_FIND_LINKS"):
        PACKAGE.install(tmp_path)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert "--no-deps" in commands[0]
