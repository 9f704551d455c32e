"""The command line of accuracy on tiny random models: what it writes, how it goes on after a kill, and controls that
see what was broken."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.accuracy.run.run import RequestedTask
from flexgen_bench.cli.accuracy import main
from flexgen_bench.core.accuracy import ModeRecord, TaskRecord
from flexgen_bench.store.accuracy_store import read_accuracy
from tests.support.tiny_text_models import text_model

lm_eval = pytest.importorskip("lm_eval")
ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "a",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "while",
    "nobody",
    "is",
    "looking",
    "at",
    "it",
]


def documents(count: int, **_: Any) -> dict[str, Any]:
    from datasets import Dataset

    rows = [
        {
            "text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 7)),
            "choices": [WORDS[i % 14], WORDS[(i + 5) % 14], WORDS[(i + 9) % 14]],
            "gold": i % 3,
        }
        for i in range(count)
    ]
    return {"test": Dataset.from_list(rows)}


def tiny_tasks(count: int = 8) -> list[RequestedTask]:
    """One task of each kind of request."""
    from lm_eval.api.task import ConfigurableTask

    mean = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    kinds: dict[str, dict[str, Any]] = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "text",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": mean,
        },
        "recall": {
            "output_type": "loglikelihood",
            "doc_to_text": "text",
            "doc_to_target": "{{' ' ~ choices[0]}}",
            "metric_list": mean,
        },
        "read": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        },
        "write": {
            "output_type": "generate_until",
            "doc_to_text": "text",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 5, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    found = []
    for name, config in kinds.items():
        task = ConfigurableTask(
            config={
                "task": name,
                "custom_dataset": lambda **_: documents(count),
                "test_split": "test",
                "target_delimiter": " ",
                "num_fewshot": 0,
                **config,
            }
        )
        metric = config["metric_list"][0]["metric"]
        found.append(RequestedTask(name, "1", {"test": "0" * 64}, metric, count, task))
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("models") / "tiny-opt")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command with tiny tasks instead of those of packages."""
    monkeypatch.setattr("flexgen_bench.accuracy.run.run.requested_tasks", lambda request, limit: tiny_tasks())

    def call(*words: str) -> int:
        usual = [f"model={checkpoint}", f"cache_dir={cache}", f"results_dir={tmp_path}", "threads=1"]
        given = {w.partition("=")[0] for w in words}
        return main([*(u for u in usual if u.partition("=")[0] not in given), "text_tokens=100", *words])

    return call


def records(folder: Path) -> dict[tuple[str, str, str], TaskRecord]:
    return {(r.subject.system, r.subject.mode, r.task): r for _, r in read_accuracy(folder).tasks}


def numbers(folder: Path) -> dict[str, ModeRecord]:
    return {r.subject.mode: r for _, r in read_accuracy(folder).modes}


def test_every_kind_of_task_under_several_modes(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("mode=[w8,w4,w3,kv4,sparse]", "reference=transformers") == 0
    found, told = records(tmp_path), numbers(tmp_path)
    assert {mode for _, mode, _ in found} == {"exact", "w8", "w4", "w3", "kv4", "sparse"}
    assert {task for _, _, task in found} == {"choose", "recall", "read", "write"}
    choose = found["flexgen", "exact", "choose"]
    assert [len(item.loglik) for item in choose.items] == [3] * 8
    assert [item.gold for item in choose.items] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [item.bytes[0] for item in choose.items] == [len(WORDS[i]) + 1 for i in range(8)]
    assert found["flexgen", "exact", "read"].items[0].bytes == (len(documents(1)["test"][0]["text"]),)
    # transformers' own arithmetic gives the same predictions, and log-likelihoods up to rounding
    for item, other in zip(choose.items, found["transformers", "exact", "choose"].items, strict=True):
        assert item.prediction == other.prediction
        assert item.loglik == pytest.approx(other.loglik, abs=2e-4)
    # each mode changes the numbers, the coarser the more
    assert 0 < told["w8"].weight_error < 0.01 < told["w4"].weight_error < told["w3"].weight_error
    assert told["w4"].bytes_per_weight < told["w8"].bytes_per_weight
    kl = {mode: told[mode].divergence[0].kl for mode in told}
    assert 0 < kl["w8"] < kl["w4"] < kl["w3"]
    assert kl["kv4"] > 0
    assert kl["sparse"] > 0, "a mode that only decoding can show"
    assert {e.layer for e in told["kv4"].kv} == {0, 1, 2}
    assert all(0.01 < e.error < 0.3 for e in told["kv4"].kv)
    out = capsys.readouterr().out
    assert "Uncompressed, beside a reference" in out
    assert json.loads(out.splitlines()[-1])["controls"] == "hold"


def test_what_is_recorded_is_not_run_again(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("mode=w4") == 0
    before = sorted(tmp_path.rglob("*.json.gz"))

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("flexgen_bench.accuracy.run.run.opened", never)
    assert run("mode=w4") == 0
    assert sorted(tmp_path.rglob("*.json.gz")) == before


def test_fewer_items_than_are_recorded_are_not_run_again_and_more_are(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode evaluated on a hundred items beside an uncompressed model evaluated on five hundred had evaluated that
    again."""
    assert run("mode=exact") == 0
    before = sorted(tmp_path.rglob("*.json.gz"))
    for count, new in ((5, 0), (8, 0), (11, 4)):
        monkeypatch.setattr(
            "flexgen_bench.accuracy.run.run.requested_tasks", lambda request, limit, n=count: tiny_tasks(n)
        )
        assert run("mode=exact") == 0
        assert len(sorted(tmp_path.rglob("*.json.gz"))) == len(before) + new
    assert len(records(tmp_path)["flexgen", "exact", "choose"].items) == 11


def test_a_damaged_record_is_made_again_and_hides_no_other(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("mode=w8") == 0
    victim = next(p for p in tmp_path.rglob("recall--*.json.gz") if "w8" in str(p))
    victim.write_bytes(victim.read_bytes()[:100])
    stored = read_accuracy(tmp_path)
    assert len(stored.problems) == 1
    assert len(stored.tasks) == 7
    assert run("mode=w8") == 0
    assert ("flexgen", "w8", "recall") in records(tmp_path)


def test_a_record_of_a_later_version_is_refused_by_name(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("mode=exact") == 0
    path = next(tmp_path.rglob("choose--*.json.gz"))
    data = json.loads(gzip.decompress(path.read_bytes())) | {"schema_version": 99}
    path.write_bytes(gzip.compress(json.dumps(data).encode()))
    (problem,) = read_accuracy(tmp_path).problems
    assert "schema version 99" in problem.message
    assert "Update flexgen-bench" in problem.message


def test_items_that_were_cut_are_counted(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("mode=exact", "max_length=24") == 0
    found = records(tmp_path)
    assert 0 < found["flexgen", "exact", "recall"].truncated["loglikelihood"] <= 8
    assert 0 < found["flexgen", "exact", "write"].truncated["generate_until"] <= 8
    assert not found["flexgen", "exact", "read"].truncated  # cut into windows, nothing is lost


def test_the_count_of_cut_items_survives_a_kill(tmp_path: Path) -> None:
    """Who goes on sees fewer items, but all were counted before the first was answered."""
    from flexgen_bench.accuracy.run.evaluate import TruncationCount

    answers = tmp_path / "answers"
    first = TruncationCount.next_to(answers)
    for _ in range(3):
        first["loglikelihood"] += 1
    assert TruncationCount.next_to(answers) == {}, "killed before the first answer: count again"
    for _ in range(3):
        TruncationCount.next_to(answers)
    again = TruncationCount.next_to(answers)
    again["loglikelihood"] += 3
    (tmp_path / "answers_rank0.db").touch()
    resumed = TruncationCount.next_to(answers)
    resumed["loglikelihood"] += 1
    assert resumed == {"loglikelihood": 3}


def test_the_yardstick_is_compared(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("mode=[w4,kv4]", "reference=yardstick") == 0
    found = records(tmp_path)
    assert ("yardstick", "w4", "read") in found
    assert ("yardstick", "kv4", "read") not in found
    ours, theirs = (found[system, "w4", "read"].items for system in ("flexgen", "yardstick"))
    exact = found["flexgen", "exact", "read"].items
    added = [sum(-b.loglik[0] + a.loglik[0] for a, b in zip(exact, of, strict=True)) for of in (ours, theirs)]
    assert added[0] == pytest.approx(added[1], rel=0.05)


def test_compression_that_is_silently_off_fails(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken for real: the model that is opened for w4 is the uncompressed one, and its packed weights are read for
    w4's."""
    from flexgen_bench.accuracy.run import models, numbers
    from flexgen_bench.core.compression import EXACT

    original, errors = models.opened, numbers.weight_errors

    def uncompressed(setup: Any, *rest: Any) -> Any:
        return original(replace(setup, mode=replace(setup.mode, lossy=EXACT)), *rest)

    def of_uncompressed(folder: Path, dtype: Any, cache: Path, compression: Any, rounded: Any) -> Any:
        return errors(folder, dtype, cache, None, rounded)

    monkeypatch.setattr("flexgen_bench.accuracy.run.run.opened", uncompressed)
    monkeypatch.setattr(numbers, "weight_errors", of_uncompressed)
    assert run("mode=w4") == 1
    told = capsys.readouterr().err
    assert "compression silently off" in told
    assert "digit for digit" in told
    assert "hold no compressed tensor" in told


def test_a_wrong_grid_fails(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Broken for real: a quantizer whose scales are three times too large, in a cache of its own."""
    from flexgen_bench.kernels import quantization

    original = quantization._quantize_groups

    def coarse(values: Any, *rest: Any) -> None:
        original(values * 3 - 2 * values.mean(), *rest)

    monkeypatch.setattr(quantization, "_quantize_groups", coarse)
    monkeypatch.setenv("FLEXGEN_NATIVE", "0")  # the native kernel goes another way
    assert run("mode=w4", f"cache_dir={tmp_path / 'broken'}") == 1
    assert "weight error out of band" in capsys.readouterr().err


def test_three_bits_as_good_as_four_fail(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken for real: what runs as w3 is four bits, and is looked at as such."""
    from flexgen_bench.accuracy.run import models, numbers
    from flexgen_bench.core.compression import Compression

    original, errors = models.opened, numbers.weight_errors
    four = Compression(4)

    def finer(setup: Any, *rest: Any) -> Any:
        weights = setup.lossy.weights
        if weights is not None and weights.bits == 3:
            setup = replace(setup, mode=replace(setup.mode, lossy=replace(setup.lossy, weights=four)))
        return original(setup, *rest)

    def of_finer(folder: Path, dtype: Any, cache: Path, compression: Any, rounded: Any) -> Any:
        return errors(folder, dtype, cache, compression and four, rounded)

    monkeypatch.setattr("flexgen_bench.accuracy.run.run.opened", finer)
    monkeypatch.setattr(numbers, "weight_errors", of_finer)
    assert run("mode=[w3,w4]") == 1
    assert "3-bit not worse than 4-bit" in capsys.readouterr().err


def test_weights_on_the_grid_are_told_and_do_not_fail(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SmolLM2's on that of groups of 32: lossless by construction, which must not be read as a result."""
    from transformers import AutoModelForCausalLM

    from flexgen_bench.accuracy.run.rtn_baseline import apply_rtn
    from flexgen_bench.core.compression import Compression

    folder = text_model(tmp_path / "gridded")
    model = AutoModelForCausalLM.from_pretrained(folder)
    apply_rtn(model, Compression(4, 32))
    model.save_pretrained(folder)
    assert run(f"model={folder}", "mode=w4g32") == 0
    out = capsys.readouterr().out
    assert "weights on the grid" in out
    assert "No compressed setting is recommended" in out


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
from tests.accuracy.test_accuracy_run import tiny_tasks
import flexgen_bench.accuracy.run.run as run
from flexgen_bench.accuracy.run.lm import SystemLM
run.requested_tasks = lambda request, limit: tiny_tasks(60)[:2]
keep = SystemLM._keep
def slowly(self, *rest):
    keep(self, *rest)
    print("answered", flush=True)
    time.sleep(0.02)
SystemLM._keep = slowly
from flexgen_bench.cli.accuracy import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_run_goes_on_item_by_item(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(root=str(Path(__file__).parents[2])))
    words = [
        sys.executable,
        str(script),
        f"model={checkpoint}",
        "mode=exact",
        f"cache_dir={cache}",
        f"results_dir={tmp_path / 'results'}",
        "threads=1",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answered = 0
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as first:
        assert first.stdout is not None
        for line in first.stdout:
            answered += line.startswith("answered")
            if answered == 40:
                break
        first.send_signal(signal.SIGKILL)
        answered += first.stdout.read().count("answered")
    assert not list((tmp_path / "results").rglob("*.json.gz"))
    second = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    again = second.stdout.count("answered")
    total = 60 * 3 + 60
    assert again < total
    assert answered + again >= total - 5 * 14  # equal requests are answered once
    assert total - again >= 30, "what had been answered is not asked again"
    found = records(tmp_path / "results")
    assert len(found["flexgen", "exact", "choose"].items) == 60
