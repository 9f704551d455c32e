"""Programs of several ranks, started as people start them: torchrun, ``batch``, a cell; and their ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from flexgen_bench.core.errors import CannotRun
from flexgen_bench.systems.flexgen_system import FlexGenSystem
from flexgen_bench.systems.load_system import check_capable
from tests.support.failing_systems import Counting
from tests.support.record_factory import make_spec
from tests.support.tiny_models import random_model, save
from tests.support.tiny_text_models import text_model

SCRIPT = """
import json, os, sys
from flexgen_bench import LLM, SamplingParams

model = sys.argv[2] if os.environ.get("RANK") == "1" and len(sys.argv) > 2 else sys.argv[1]
with LLM(model, gpu="cpu", dtype="float32", cache_dir=CACHE, threads=1, ranks=RANKS) as llm:
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    print("begins", flush=True)
    prompts = [[5 + i % 100, 6, 7] for i in range(PROMPTS)]
    print(json.dumps([output.token_ids for output in llm.generate(prompts, params)]), flush=True)
"""


def script(tmp_path: Path, ranks: int | None = None, tokens: int = 6, prompts: int = 3) -> Path:
    path = tmp_path / "answer.py"
    words = {"CACHE": repr(str(tmp_path / "cache")), "RANKS": repr(ranks), "TOKENS": str(tokens)}
    text = SCRIPT.replace("PROMPTS", str(prompts))
    for word, value in words.items():
        text = text.replace(word, value)
    path.write_text(text)
    return path


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def answers(output: str) -> object:
    return json.loads(next(line for line in output.splitlines() if line.startswith("[[")))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def torchrun(processes: int, *command: str | Path) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port()))
    return run(*launcher, *command)


def test_a_system_that_knows_one_device_says_so() -> None:
    """It would measure one device under the name of several."""
    spec = make_spec("flexgen")
    several = replace(spec, hardware=replace(spec.hardware, count=2))
    with pytest.raises(CannotRun, match=r"computes on one device here, not on gpu.count=2"):
        check_capable(Counting, several)
    check_capable(FlexGenSystem, several)
    assert several.spec_hash != spec.spec_hash


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_torchrun_gives_the_tokens_of_one_process(tmp_path: Path, processes: int) -> None:
    folder, program = save(random_model("llama-multi-query"), tmp_path / "model"), script(tmp_path)
    one, several = run(program, folder), torchrun(processes, program, folder)
    assert several.returncode == 0, several.stderr
    assert answers(several.stdout) == answers(one.stdout)
    assert several.stdout.count("begins") == 1, "rank 0 alone goes on"


@pytest.mark.slow
def test_a_program_of_torchrun_that_never_closes_its_model_ends_well(tmp_path: Path) -> None:
    """The other ranks took its end for a failure."""
    folder, program = save(random_model("opt"), tmp_path / "model"), script(tmp_path)
    text = program.read_text()
    program.write_text(text.replace("with LLM(", "if llm := LLM(").replace(") as llm:", "):"))
    ended = torchrun(2, program, folder)
    assert ended.returncode == 0, ended.stderr
    assert "begins" in ended.stdout


@pytest.mark.slow
def test_ranks_of_different_models_are_named_before_weights_are_read(tmp_path: Path) -> None:
    """torchrun once ended rank 0, which knows the reason, before it had told it."""
    folder, other = (save(random_model(n), tmp_path / n) for n in ("llama-multi-query", "opt"))
    ended = torchrun(2, script(tmp_path), folder, other)
    assert ended.returncode != 0
    assert "UserError: ranks = " in ended.stderr
    assert "rank 1 (" in ended.stderr
    assert "has model 'opt, 3 layers" in ended.stderr
    assert not list((tmp_path / "cache").rglob("weights*"))


@pytest.mark.slow
def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    folder = save(random_model("opt"), tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ended = run(script(tmp_path), folder, **group)
    assert ended.returncode == 1
    assert f"MASTER_PORT = {port}: must be a port that is free" in ended.stderr


@pytest.mark.slow
def test_a_killed_rank_0_leaves_no_process(tmp_path: Path) -> None:
    folder = save(random_model("glm"), tmp_path / "model")
    program = script(tmp_path, ranks=4, tokens=50, prompts=3000)
    with subprocess.Popen([sys.executable, str(program), str(folder)], stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        assert leader.stdout.readline() == "begins\n"
        time.sleep(0.5)
        ranks = psutil.Process(leader.pid).children()
        assert len(ranks) == 3
        leader.kill()
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert alive == []


def lines(path: Path) -> list[Mapping[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_batch_goes_on_after_a_lost_rank_with_the_same_command(tmp_path: Path) -> None:
    folder, asked = text_model(tmp_path / "model"), tmp_path / "asked.jsonl"
    requests = [{"custom_id": str(i), "prompt": f"{i} abc", "max_tokens": 60, "ignore_eos": True} for i in range(200)]
    asked.write_text("".join(json.dumps(request) + "\n" for request in requests))

    def command(out: str, *more: str) -> list[str]:
        words = [f"model={folder}", "gpu=cpu", "dtype=float32", f"cache_dir={tmp_path / 'cache'}", "threads=2", *more]
        files = [str(asked), "-o", str(tmp_path / out), "--window", "40"]
        return ["-m", "flexgen_bench", "batch", *files, *words]

    assert run(*command("one.jsonl")).returncode == 0
    several, out = command("two.jsonl", "ranks=2"), tmp_path / "two.jsonl"
    with subprocess.Popen([sys.executable, *several], stderr=subprocess.PIPE, text=True) as leader:
        while len(lines(out)) < 45:
            assert leader.poll() is None
            time.sleep(0.01)
        for rank in psutil.Process(leader.pid).children():
            with suppress(psutil.Error):
                rank.kill()
        said = leader.communicate(timeout=60)[1]
    assert leader.returncode == 1
    assert "rank 1 is lost: its process was killed by SIGKILL" in said
    kept = lines(out)
    assert 45 <= len(kept) < 200
    assert run(*several).returncode == 0
    assert [strip(line) for line in lines(out)] == [strip(line) for line in lines(tmp_path / "one.jsonl")]


def strip(line: Mapping[str, object]) -> object:
    """What of an answer is the same in every run."""
    body = line["response"]["body"]  # type: ignore[index]
    return line["custom_id"], body["choices"], body["usage"]
