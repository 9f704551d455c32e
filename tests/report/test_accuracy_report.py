"""Pages of accuracy from records made by hand: what they say, that they need no torch, and that they do not change by
themselves."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_bench.accuracy.compare.compare import Margins
from flexgen_bench.accuracy.compare.outcome import ModelOutcome, outcomes
from flexgen_bench.cli.report import main
from flexgen_bench.core.accuracy import Divergence, LayerError, Role
from flexgen_bench.core.codec import to_json
from flexgen_bench.report.accuracy.page import model_page
from flexgen_bench.store.accuracy_store import accuracy_files, read_accuracy, write_accuracy
from flexgen_bench.store.writer import write_record
from tests.support.accuracy_factory import (
    W4,
    choice_items,
    mode_record,
    perplexity_record,
    subject,
    task_record,
    text_items,
)
from tests.support.record_factory import make_record

ROOT = Path(__file__).resolve().parents[2]


def error(value: float, layer: int = 0) -> LayerError:
    return LayerError(layer, "qkv.weight", 1000, value)


def fill(folder: Path) -> None:
    """w8 costs nothing, w4 a little, w3 much; w3's numbers are as they should be."""
    right = [i for i, item in enumerate(choice_items(600, 0.7)) if item.correct]
    flips = {"exact": [], "w8": [], "w4": right[:4], "w3": right[:150]}
    losses = {"exact": 0.0, "w8": 0.05, "w4": 1.0, "w3": 8.0}
    for mode, flip in flips.items():
        write_accuracy(task_record(choice_items(600, 0.7, flip=flip, extra_loss=losses[mode] / 50), mode), folder)
        write_accuracy(perplexity_record(text_items(60, losses[mode]), mode, key=f"p{mode}".ljust(16, "0")), folder)
    sizes = {"w8": (1063, 0.005), "w4": (563, 0.085), "w3": (438, 0.18)}
    for mode, (size, relative) in sizes.items():
        found = Divergence("passages", 1000, 0.01 * losses[mode], 990, 3000.0, 3000.0 + losses[mode])
        write_accuracy(
            mode_record(
                mode,
                weight_bytes=size,
                weights=(error(relative), error(relative * 1.1, 1)),
                grid_error=relative,
                divergence=(found,),
            ),
            folder,
        )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    fill(folder)
    return folder


def only(folder: Path) -> ModelOutcome:
    (found,) = outcomes(read_accuracy(folder), Margins())
    return found


def report(results: Path, out: Path, *more: str) -> int:
    return main([str(results), str(out), "--tables", "none", *more])


def test_the_smallest_setting_within_the_margin_is_recommended(results: Path) -> None:
    found = only(results)
    assert [mode.mode for mode in found.modes] == ["w8", "w4", "w3"]
    assert found.recommendation.mode == "w4"
    assert not found.fails
    strict = outcomes(read_accuracy(results), Margins(score=0.01))[0]
    assert strict.recommendation.mode == "w8"


def test_a_mode_evaluated_on_fewer_tasks_is_neither_recommended_nor_called_nearest(results: Path) -> None:
    """A run stopped after its first task had left a mode with one easy task, and the page called it the nearest to the
    uncompressed model."""
    write_accuracy(task_record(choice_items(600, 0.7), "w2", "quiz", key="q" * 16), results)
    assert only(results).recommendation.mode == "w4"
    none = outcomes(read_accuracy(results), Margins(score=1e-4, bits=1e-6))[0].recommendation
    assert none.mode is None
    assert "nearest is w8" in none.why


def test_log_loss_alone_recommends_nothing(tmp_path: Path) -> None:
    for mode in ("exact", "w8"):
        write_accuracy(perplexity_record(text_items(60, 0.0), mode, key=f"p{mode}".ljust(16, "0")), tmp_path)
    found = only(tmp_path).recommendation
    assert found.mode is None
    assert "right and wrong answers" in found.why


def test_a_page_for_who_has_to_decide(results: Path, tmp_path: Path) -> None:
    assert report(results, tmp_path / "out") == 0
    page = (tmp_path / "out" / "accuracy" / "tiny--flexgen--float32.md").read_text()
    assert "**Recommended: w4" in page
    assert "±2 points, ±0.02 bits per byte" in page
    w3 = next(line for line in page.splitlines() if line.startswith("| w3 |"))
    assert "worse on" in w3
    assert "quiz" in w3
    assert "| 0.44 |" in w3
    w4 = next(line for line in page.splitlines() if line.startswith("| w4 |"))
    assert "-0.7 (" in w4
    assert "equivalent" in w4
    assert "MEASURED" in page
    assert "python -m flexgen\\_bench.accuracy" not in page, "commands are shown as they are typed"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "accuracy" / "tasks.csv").read_text())))
    row = next(r for r in rows if (r["mode"], r["task"]) == ("w3", "quiz"))
    assert (row["lost"], row["won"], row["verdict"]) == ("150", "0", "worse")
    assert float(row["change"]) == pytest.approx(-0.25)
    layers = list(csv.DictReader(io.StringIO((tmp_path / "out" / "accuracy" / "layers.csv").read_text())))
    assert len(layers) == 6
    index = (tmp_path / "out" / "index.md").read_text()
    assert "(accuracy/index.md)" in index


def test_a_margin_of_ones_own(results: Path, tmp_path: Path) -> None:
    assert report(results, tmp_path / "out", "--margin-score", "0.01") == 0
    assert "**Recommended: w8" in next((tmp_path / "out" / "accuracy").glob("tiny*.md")).read_text()
    assert report(results, tmp_path / "out", "--margin-score", "2") == 2


def test_twice_the_same_bytes_without_torch(results: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'lm_eval', 'flexgen_bench.engine'):\n"
        "    sys.modules[name] = None\n"
        "from flexgen_bench.cli.report import main\n"
        f"sys.exit(main([{str(results)!r}, {str(tmp_path / 'out')!r}, '--tables', 'none']))\n"
    )

    def build() -> dict[str, bytes]:
        subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        return {str(p): p.read_bytes() for p in sorted((tmp_path / "out").rglob("*")) if p.is_file()}

    assert build() == build()


def test_a_damaged_record_is_named_and_hides_no_other(results: Path, tmp_path: Path) -> None:
    victim = next(p for p in accuracy_files(results) if p.name.startswith("quiz") and "w8" in str(p))
    victim.write_bytes(b"not a record")
    assert report(results, tmp_path / "out") == 0
    folder = tmp_path / "out" / "accuracy"
    assert "not a whole accuracy record" in (folder / "index.md").read_text()
    assert "| w4 |" in (folder / "tiny--flexgen--float32.md").read_text()


def test_records_of_other_weights_are_never_compared(results: Path) -> None:
    other = task_record(choice_items(600, 0.7), "w4", "quiz", run_id="other", key="o" * 16)
    other = replace(other, subject=subject("w4", fingerprint="trained again"))
    write_accuracy(other, results)
    assert only(results).recommendation.mode == "w4"  # there is no uncompressed record of those weights


def test_a_failed_control_is_at_the_top_of_the_page(results: Path) -> None:
    same = task_record(choice_items(600, 0.7), "w4", run_id="z", key="z" * 16)
    text = perplexity_record(text_items(60), "w4", run_id="z", key="y" * 16)
    for record in (same, text):
        write_accuracy(replace(record, ended_utc="2026-11-23T00:00:00+00:00"), results)
    found = only(results)
    assert found.fails
    page = model_page(found)
    assert page.index("A control fails") < page.index("## Modes")
    assert "compression silently off" in page


def test_the_yardstick_bar(results: Path) -> None:
    """Added log-loss of w4 is 1.0 on average; a yardstick that adds 0.9 makes that 1.1 times as much."""
    yardstick = subject("w4", system="yardstick", role=Role.YARDSTICK)
    slightly = perplexity_record(text_items(60, 0.9), "w4", run_id="y1", key="y1".ljust(16, "0"), subject=yardstick)
    write_accuracy(slightly, results)
    assert [f.name for f in only(results).findings if f.fails] == ["worse than the yardstick"]
    assert "1.1" in model_page(only(results))


def test_speed_of_a_compressed_system_leads_to_its_accuracy(results: Path, tmp_path: Path) -> None:
    record = make_record()
    spec = dict(record.spec) | {"lossy": to_json(W4), "system": "flexgen"}
    spec["model"] = {**spec["model"], "shape": {**spec["model"]["shape"], "name": "tiny"}}
    write_record(replace(record, spec=spec), results)
    assert report(results, tmp_path / "out") == 0
    pages = [p.read_text() for p in (tmp_path / "out").glob("*.md") if p.name != "index.md"]
    (page,) = pages
    assert "[mode w4](accuracy/tiny--flexgen--float32.md)" in page
    spec["lossy"] = {**to_json(W4), "value_share": 0.5}
    write_record(replace(record, spec=spec, run_id="later", spec_hash="1" * 16), results)
    assert report(results, tmp_path / "out") == 0
    page = next(p.read_text() for p in (tmp_path / "out").glob("*.md") if p.name != "index.md")
    assert "not evaluated yet: `python -m flexgen_bench.accuracy model=tiny" in page


def test_table_5_shows_what_was_measured_here(tmp_path: Path) -> None:
    results = tmp_path / "results"
    for mode in ("exact", "w4kv4"):
        record = task_record(
            choice_items(50, 0.4),
            mode,
            "lambada",
            scores={"acc": 0.4321, "perplexity": 20.0},
            subject=subject(mode, model="smollm2-135m"),
        )
        write_accuracy(record, results)
    assert main([str(results), str(tmp_path / "out"), "--tables", "t5", "--no-simulation"]) == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "paper" / "t5.csv").read_text())))
    mine = [r for r in rows if r["model"] == "SmolLM2-135M" and r["metric"] == "LAMBADA accuracy"]
    assert [(r["ours"], r["ours_evidence"]) for r in mine][:2] == [("0.4321", "MEASURED")] * 2
    assert mine[0]["ours_settings"] == "float32, 50 items"
    page = (tmp_path / "out" / "paper" / "t5.md").read_text()
    assert "0.725" in page
    assert "model=opt-30b weights=hub" in page
    assert "not measured yet" in page
