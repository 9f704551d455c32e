"""A batch that is killed (SIGKILL) at random moments and started again, real processes: nothing is lost, nothing is
there twice, and every line is that of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.cli import batch
from tests.support.documented import ROOT
from tests.support.tiny_text_models import text_model

LINES = 200


def comparable_answers(path: Path) -> list[Any]:
    """The answers without what differs from run to run: names and times."""
    comparable = []
    for line in path.read_text().splitlines():
        answer = json.loads(line)
        answer["response"].pop("request_id")
        answer["response"]["body"].pop("id", None)
        answer["response"]["body"].pop("created", None)
        comparable.append(answer)
    return comparable


def lose_nothing(words: list[str], lines: list[dict[str, Any]], kills: int, folder: Path) -> None:
    """Kill a batch of these lines so often, each time at another moment, and compare with one that was left alone."""
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    undisturbed, out = folder / "undisturbed.jsonl", folder / "out.jsonl"
    assert batch.main([str(source), "-o", str(undisturbed), *words]) == 0
    program = [sys.executable, "-m", "tests.support.batch_kills", str(len(lines)), str(kills)]
    done = subprocess.run(
        [*program, str(source), "-o", str(out), *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500 if kills < 50 else 2900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] >= kills
    assert comparable_answers(out) == comparable_answers(undisturbed)
    for earlier in folder.glob("*.out.jsonl"):
        assert sorted(comparable_answers(earlier), key=lambda a: a["id"]) == comparable_answers(undisturbed)


@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_kills_lose_nothing(kills: int, tmp_path: Path) -> None:
    model = text_model(tmp_path / "ckpt", "llama")
    lines: list[dict[str, Any]] = [
        {"prompt": f"prompt {n}", "max_tokens": 1 + n % 9, "temperature": n % 2, "n": 1 + n % 2, "ignore_eos": True}
        for n in range(LINES)
    ]
    lines[17] = {"nothing": 1}
    words = [f"model={model}", "gpu=cpu", "threads=1", f"cache_dir={tmp_path / 'cache'}", "--window", "16"]
    lose_nothing(words, lines, kills, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kills_of_a_trained_model(smollm2: tuple[object, Path], shared_cache: Path, tmp_path: Path) -> None:
    """Conversations and prompts, greedy and sampled, whose answers end by themselves."""
    starts = ["Once upon a time there was", "The capital of France is", "def fib(n):", "Q: What is 2+2?\nA:"]
    lines: list[dict[str, Any]] = []
    for n in range(120):
        common = {"max_tokens": 2 + n % 7, "temperature": 0.7 * (n % 2)}
        text = f"{starts[n % 4]} {n}"
        lines.append(
            {"messages": [{"role": "user", "content": text}], **common} if n % 3 == 0 else {"prompt": text, **common}
        )
    words = [f"model={smollm2[1]}", "gpu=cpu", "threads=1", "dtype=float32", f"cache_dir={shared_cache}"]
    lose_nothing([*words, "--window", "16"], lines, 100, tmp_path)
