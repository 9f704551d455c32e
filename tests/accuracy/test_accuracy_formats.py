"""Published formats as modes: records, bytes, controls and pages; loss in llama.cpp's words beside them; arithmetic in
words."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.accuracy.compare.compare import Margins
from flexgen_bench.accuracy.compare.outcome import outcomes
from flexgen_bench.accuracy.data.metrics import number_scores
from flexgen_bench.accuracy.run.identity import mode_key, task_key
from flexgen_bench.accuracy.run.modes import load_mode
from flexgen_bench.cli.accuracy import main
from flexgen_bench.core.accuracy import LayerError
from flexgen_bench.core.compression import EXACT
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.token_loss import TokenLoss, Uncertain
from flexgen_bench.report.accuracy.build import build_accuracy
from flexgen_bench.report.accuracy.page import model_page
from flexgen_bench.store.accuracy_store import accuracy_files, read_accuracy, read_mode, read_task, write_accuracy
from tests.accuracy.test_accuracy_run import numbers, tiny_tasks
from tests.support.accuracy_factory import choice_items, mode_record, subject, task_record
from tests.support.tiny_text_models import text_model

pytest.importorskip("lm_eval")
ROOT = Path(__file__).resolve().parents[2]

LOSS = TokenLoss(
    text="passages",
    chunk=512,
    positions=1530,
    kld=Uncertain(0.0551, 0.0021),
    kld_median=0.0213,
    kld_99=0.61,
    kld_999=1.4,
    kld_max=2.25,
    reverse_kld=Uncertain(0.0561, 0.0022),
    same_top=Uncertain(0.8471, 0.0092),
    delta_p=Uncertain(-0.0102, 0.0015),
    rms_delta_p=Uncertain(0.0612, 0.0019),
    ppl=Uncertain(21.5, 1.1),
    ppl_exact=Uncertain(20.9, 1.0),
    ln_ppl_ratio=Uncertain(0.0283, 0.0091),
    correlation=0.985,
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    checkpoint = text_model(tmp_path / "tiny-llama", "llama", positions=256)
    monkeypatch.setattr("flexgen_bench.accuracy.run.run.requested_tasks", lambda request, limit: tiny_tasks()[:2])

    def call(*words: str) -> int:
        places = (f"model={checkpoint}", f"cache_dir={tmp_path / 'cache'}", f"results_dir={tmp_path / 'results'}")
        return main([*places, "threads=1", "text_tokens=100", *words])

    return call


def test_formats_beside_our_modes(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("mode=[q8_0,q4_0,mxfp4,w8]", "loss_tokens=256") == 0
    told = numbers(tmp_path / "results")
    assert {mode: told[mode].subject.weight_format for mode in told} == {
        "q8_0": "Q8_0",
        "q4_0": "Q4_0",
        "mxfp4": "MXFP4",
        "w8": None,
    }
    # All matrices alike, but for norms in float32.
    assert 8.5 / 8 < told["q8_0"].bytes_per_weight < 1.02 * 8.5 / 8
    assert max(told["mxfp4"].bytes_per_weight, told["q4_0"].bytes_per_weight) < told["q8_0"].bytes_per_weight
    assert 0 < told["q8_0"].weight_error < 0.01 < told["q4_0"].weight_error < told["mxfp4"].weight_error < 0.15
    for record in told.values():
        assert record.loss is not None
        assert (record.loss.chunk, record.loss.positions) == (256, 127)
    assert 0 < told["q8_0"].loss.kld.value < told["q4_0"].loss.kld.value
    assert told["q8_0"].loss.ppl_exact == told["q4_0"].loss.ppl_exact
    captured = capsys.readouterr().out
    assert "llama.cpp tells it" in captured
    assert "127 positions of passages" in captured
    assert run("mode=[q8_0,q4_0,mxfp4,w8]", "loss_tokens=256") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == [], "it is done"


def test_a_text_of_ones_own(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "wiki.test.raw"
    text.write_text("Of making many books there is no end. " * 40)
    assert run("mode=w8", "loss_tokens=512", f"loss_text={text}") == 0
    first = numbers(tmp_path / "results")["w8"]
    assert first.loss is not None
    assert (first.loss.text, first.loss.positions) == ("wiki.test.raw", 2 * 127)
    assert run("mode=w8", "loss_tokens=512") == 0, "another text is another record"
    assert len(list((tmp_path / "results").rglob("_mode--*"))) == 2
    assert run("mode=w8", "loss_text=/nowhere.txt") == 2
    assert "loss_text" in capsys.readouterr().err


def test_what_is_no_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_mode("q4_k_m").weight_format == "Q4_K_M"
    assert load_mode("q4_k_m").lossy == EXACT
    for text, wrong in (
        ("title: x\nweight_format: Q9_9\n", "weight_format"),
        ("title: x\nweight_format: Q4_0\nlossy: {weights: {bits: 4}}\n", "lossy.weights"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        monkeypatch.setattr("flexgen_bench.accuracy.run.modes.choice_file", lambda *_, file=path: file)
        with pytest.raises(UserError, match=wrong):
            load_mode("bad")


def test_a_family_without_such_files_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flexgen_bench.accuracy.run.run.requested_tasks", lambda request, limit: tiny_tasks()[:1])
    checkpoint = text_model(tmp_path / "tiny-opt", "opt")
    words = [f"model={checkpoint}", f"cache_dir={tmp_path / 'cache'}", f"results_dir={tmp_path / 'results'}"]
    assert main([*words, "mode=q4_0"]) == 2
    assert "a GGUF format, of a opt model" in capsys.readouterr().err
    assert not list((tmp_path / "results").rglob("*.json.gz"))


def test_keys_of_older_records_stay() -> None:
    """A new field of a subject must not hide what was recorded before it."""
    records = [p for p in accuracy_files(ROOT / "results") if not p.name.startswith("_mode")]
    assert records
    for path in records[:: len(records) // 10]:
        record = read_task(path)
        key = task_key(record.subject, record.task, record.task_version, record.data_sha256, record.metric, None)
        assert key == record.key, path
    old, new = (mode_key(subject("w4"), "text", 64, "other", tokens) for tokens in (0, 512))
    assert old == "1a3db8da4fc17fe2"
    assert old != new


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def formats(folder: Path, **changes: Any) -> None:
    write_accuracy(task_record(choice_items(300, 0.7)), folder)
    published = subject("q4_0", lossy={}, weight_format="Q4_0")
    flipped = task_record(choice_items(300, 0.7, flip=range(6), extra_loss=0.1), "q4_0", subject=published)
    write_accuracy(flipped, folder)
    values: dict[str, Any] = {
        "subject": published,
        "weights": (LayerError(0, "attn_q.weight", 100, 0.08),),
        "loss": LOSS,
    }
    write_accuracy(mode_record("q4_0", **(values | changes)), folder)


def test_the_page_has_a_table_of_losses(tmp_path: Path) -> None:
    formats(tmp_path)
    (outcome,) = outcomes(read_accuracy(tmp_path), Margins())
    page = model_page(outcome)
    assert "## q4\\_0: Q4\\_0 weights" in page
    assert "1,530 positions of passages: the second halves of 6 chunks of 512 tokens" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| q4") and "0.0551 ± 0.0021" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:12] == [
        "4.50",
        "0.0551 ± 0.0021",
        "0.0213",
        "0.6100",
        "1.4000",
        "2.2500",
        "0.0561 ± 0.0022",
        "84.71 ± 0.92",
        "6.12 ± 0.19",
        "-1.02 ± 0.15",
        "+0.0283 ± 0.0091",
    ]
    assert outcome.recommendation.mode is None, "it is no setting of this engine"
    build_accuracy(tmp_path, tmp_path / "out", _write)
    (values,) = csv.DictReader(io.StringIO((tmp_path / "out" / "loss.csv").read_text()))
    assert (values["kld"], values["kld_error"], values["bits_per_weight"]) == ("0.0551", "0.0021", "4.504")


def test_records_without_loss_give_the_pages_of_before(tmp_path: Path) -> None:
    formats(tmp_path, loss=None)
    (outcome,) = outcomes(read_accuracy(tmp_path), Margins())
    assert "llama.cpp tells it" not in model_page(outcome)


@pytest.mark.parametrize("change", ["silent", "unchanged"])
def test_a_format_that_was_not_applied_fails(tmp_path: Path, change: str) -> None:
    formats(tmp_path, weights=() if change == "unchanged" else (LayerError(0, "attn_q.weight", 100, 0.08),))
    if change == "silent":
        published = subject("q4_0", lossy={}, weight_format="Q4_0")
        same = task_record(choice_items(300, 0.7), "q4_0", subject=published, ended_utc="2026-11-23T20:00:00+00:00")
        write_accuracy(replace(same, run_id="later"), tmp_path)
    (outcome,) = outcomes(read_accuracy(tmp_path), Margins())
    (finding,) = [f for f in outcome.findings if f.fails]
    assert finding.name == "compression silently off"
    assert "Q4_0" in finding.text


def test_a_broken_loss_is_named_and_hides_no_other(tmp_path: Path) -> None:
    formats(tmp_path)
    (path,) = [p for p in accuracy_files(tmp_path) if p.name.startswith("_mode")]
    data = json.loads(gzip.decompress(path.read_bytes()))
    for wrong, said in (
        ({"kld": 0.05}, "record.loss.kld"),
        ({"unheard": 1}, "record.loss.unheard"),
        ({"positions": None}, "record.loss.positions"),
    ):
        path.write_bytes(gzip.compress(json.dumps(data | {"loss": data["loss"] | wrong}).encode()))
        with pytest.raises(StoreError, match=said):
            read_mode(path)
        stored = read_accuracy(tmp_path)
        assert [len(stored.tasks), len(stored.modes), len(stored.problems)] == [2, 0, 1]
        (outcome,) = outcomes(stored, Margins())
        assert "llama.cpp tells it" not in model_page(outcome)


@pytest.mark.parametrize(
    ("text", "exact", "stated"),
    [
        (" 16 - 3 = 13. 13 * 2 = 26. So the answer is 26.", 1.0, 1.0),
        (" So the answer is $26.00.", 1.0, 1.0),
        (" So the answer is 1,026.", 0.0, 0.0),
        (" The answer is 26. He had 5 left.", 0.0, 1.0),
        (" It is 26 dollars.", 1.0, 0.0),
        (" I do not know.", 0.0, 0.0),
        (" The answer is -26.", 0.0, 0.0),
    ],
)
def test_the_answer_at_the_end_of_its_steps(text: str, exact: float, stated: float) -> None:
    assert number_scores({"answer": "26"}, [text]) == {"exact_match": exact, "stated": stated}


def test_large_answers_have_commas() -> None:
    assert number_scores({"answer": "1,026"}, ["so the answer is 1026."])["exact_match"] == 1.0
