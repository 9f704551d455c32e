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


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_kills_lose_nothing(kills: int, tmp_path: Path) -> None:
    model = text_model(tmp_path / "ckpt", "llama")
    lines = [
        {"prompt": f"prompt {n}", "max_tokens": 1 + n % 9, "temperature": n % 2, "n": 1 + n % 2, "ignore_eos": True}
        for n in range(LINES)
    ]
    lines[17] = {"nothing": 1}
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"model={model}", "gpu=cpu", "threads=1", f"cache_dir={tmp_path / 'cache'}", "--window", "16"]
    undisturbed = tmp_path / "undisturbed.jsonl"
    assert batch.main([str(source), "-o", str(undisturbed), *words]) == 0

    out = tmp_path / "out.jsonl"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.batch_kills",
            str(LINES),
            str(kills),
            str(source),
            "-o",
            str(out),
            *words,
        ],
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
    for earlier in tmp_path.glob("*.out.jsonl"):
        assert sorted(comparable_answers(earlier), key=lambda a: a["id"]) == comparable_answers(undisturbed)
