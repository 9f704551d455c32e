"""All pages of accuracy written into a folder: one a model, ``index.md``, and ``tasks.csv``, ``layers.csv`` and
``loss.csv``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flexgen_bench.accuracy.compare.compare import Margins
from flexgen_bench.accuracy.compare.outcome import ModelOutcome, outcomes
from flexgen_bench.report.accuracy.formatting import NOTHING, advice
from flexgen_bench.report.accuracy.page import model_page, page_name
from flexgen_bench.report.accuracy.values import layers_csv, loss_csv, tasks_csv
from flexgen_bench.report.page import problem_lines
from flexgen_bench.report.table import escape
from flexgen_bench.store.accuracy_store import read_accuracy
from flexgen_bench.store.reader import Problem

FOLDER = "accuracy"
Write = Callable[[Path, str], Path]


def build_accuracy(
    results_dir: Path, out: Path, write: Write, margins: Margins | None = None
) -> tuple[list[Path], list[ModelOutcome]]:
    """Returns the paths written (none where no accuracy has been recorded), and what the pages say."""
    stored = read_accuracy(results_dir)
    models = outcomes(stored, margins or Margins())
    if not models and not stored.problems:
        return [], []
    written = [write(out / f"{page_name(o)}.md", model_page(o)) for o in models]
    written.append(write(out / "tasks.csv", tasks_csv(models)))
    written.append(write(out / "layers.csv", layers_csv(models)))
    written.append(write(out / "loss.csv", loss_csv(models)))
    written.append(write(out / "index.md", _index(models, stored.problems, results_dir)))
    return written, models


def _index(models: Sequence[ModelOutcome], problems: Sequence[Problem], results_dir: Path) -> str:
    lines = [
        "# Accuracy",
        "",
        "What compression costs each model, built from the records alone by `python -m flexgen_bench.report`. "
        "All tasks under all modes: [tasks.csv](tasks.csv); the error of every tensor: [layers.csv](layers.csv); "
        "loss token by token: [loss.csv](loss.csv).",
        "",
        "| Model | System | dtype | Tasks | Items | Modes | Controls | Advice |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for outcome in models:
        items = sum(len(record.items) for record in outcome.exact.values())
        cells = (
            outcome.system,
            outcome.dtype,
            str(len(outcome.exact)),
            str(items),
            ", ".join(mode.mode for mode in outcome.modes) or NOTHING,
            "**fail**" if outcome.fails else "hold",
        )
        shown = [cell if cell.startswith("**") else escape(cell) for cell in cells]
        link = f"[{escape(outcome.model)}]({page_name(outcome)}.md)"
        lines.append(f"| {' | '.join([link, *shown, escape(advice(outcome))])} |")
    lines += ["", *problem_lines(problems, results_dir)]
    return "\n".join(lines).rstrip() + "\n"
