"""A suite's report page and the index, as Markdown text. Nothing in them depends on when they are built."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flexgen_bench.core.machine_name import machine_of
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Status
from flexgen_bench.core.workload import PromptKind
from flexgen_bench.report.cells import STATUS_WORDS, one_line
from flexgen_bench.report.ladder.markdown import ladder_lines
from flexgen_bench.report.ladder.rungs import measured_ladders
from flexgen_bench.report.rows import Row
from flexgen_bench.report.table import by_group, escape, to_markdown
from flexgen_bench.store.reader import Problem

# Enough to see that the text is sane and the same; the records hold all of it.
_SHOWN_PROMPTS = 3
_SHOWN_CHARACTERS = 240


def suite_page(
    suite: str, rows: Sequence[Row], problems: Sequence[Problem], results_dir: Path, accuracy: Sequence[str] = ()
) -> str:
    """The page of one suite: its ladder if its memory goes up in shares of the weights, table, what compression costs
    (``accuracy``, lines of its own), generated texts, what to know about the figures, how to rerun them."""
    records = [r.stored.record for r in rows]
    lines = [
        f"# Suite {escape(suite)}",
        "",
        "Built from the records alone by `python -m flexgen_bench.report`; edit nothing here.",
        "",
        *_provenance(records),
        "",
        *ladder_lines(measured_ladders(rows)),
        to_markdown(rows),
        *accuracy,
        *_texts(rows),
        *_notes(rows),
        *_reruns(rows),
        *problem_lines(problems, results_dir),
    ]
    return "\n".join(lines).rstrip() + "\n"


def index_page(
    suites: dict[str, Sequence[Row]],
    problems: Sequence[Problem],
    results_dir: Path,
    accuracy: str = "",
    pictures: str = "",
    ladders: str = "",
) -> str:
    """All suites with how their cells ended, where accuracy, pictures and predicted ladders are told (pages of these
    names), and every file that could not be used."""
    lines = ["# Reports", "", "Built from the records alone by `python -m flexgen_bench.report`.", ""]
    if suites:
        lines += ["| Suite | Cells | Ended | Evidence | Measured until |", "|---|---|---|---|---|"]
    for suite, rows in suites.items():
        records = [r.stored.record for r in rows]
        ended = Counter(STATUS_WORDS[r.status] for r in records)
        evidence = Counter(r.evidence.value for r in records if r.status is Status.OK)
        cells = (
            f"[{escape(suite)}]({suite}.md) ([csv]({suite}.csv))",
            str(len(records)),
            _counts(ended),
            _counts(evidence),
            max(r.ended_utc for r in records),
        )
        lines.append(f"| {' | '.join(cells)} |")
    if accuracy:
        lines += ["", f"What compression costs in accuracy: [accuracy]({accuracy})."]
    if pictures:
        lines += ["", f"Speed against latency, memory, price, accuracy and prediction: [pictures]({pictures})."]
    if ladders:
        lines += ["", f"Throughput against memory on machines that are not here: [predicted ladders]({ladders})."]
    lines += ["", *problem_lines(problems, results_dir)]
    return "\n".join(lines).rstrip() + "\n"


def problem_lines(problems: Sequence[Problem], results_dir: Path) -> list[str]:
    """A section naming each unusable file; empty where there is none."""
    if not problems:
        return []
    lines = ["## Records that could not be used", ""]
    for problem in problems:
        name = os.path.relpath(problem.path, results_dir)
        # The message names the file by the path it was read from; a report must not depend on that.
        reason = problem.message.replace(str(problem.path), name)
        lines.append(f"- {escape(reason)}")
    return [*lines, ""]


def _provenance(records: Sequence[Record]) -> list[str]:
    machines = sorted({machine_of(r.environment) or "machine not recorded" for r in records})
    commits = sorted({_commit(r) for r in records})
    first, last = min(r.started_utc for r in records), max(r.ended_utc for r in records)
    return [
        f"- {len(records)} cells, run {escape(first)} to {escape(last)}",
        f"- on {escape('; '.join(machines))}",
        f"- code: commit {escape(', '.join(commits))}",
    ]


def _commit(record: Record) -> str:
    code = record.environment.get("code") or {}
    changed = " with uncommitted changes" if code.get("dirty") else ""
    return f"{str(code.get('commit') or 'unknown')[:12]}{changed}"


def _texts(rows: Sequence[Row]) -> list[str]:
    """What the systems wrote for the first prompts of text workloads; equal texts are shown once."""
    lines: list[str] = []
    for group in by_group(rows):
        texts = [r for r in group if _is_text(r) and _listed(r, "texts")]
        for index in range(min((len(_listed(r, "texts")) for r in texts), default=0)):
            if index == _SHOWN_PROMPTS:
                break
            lines += [f"Prompt {index + 1}{_prompt(texts, index)}", ""]
            writers: dict[str, list[str]] = {}
            for row in sorted(texts, key=lambda r: r.label):
                text = one_line(str(_listed(row, "texts")[index]), _SHOWN_CHARACTERS)
                writers.setdefault(text, []).append(row.label)
            lines += [f"- {escape(', '.join(who))}: {escape(text)}" for text, who in writers.items()]
            lines.append("")
    return ["## Generated text", "", *lines] if lines else []


def _is_text(row: Row) -> bool:
    workload = row.stored.record.spec.get("workload") or {}
    return row.status is Status.OK and workload.get("kind") == PromptKind.TEXT.value


def _listed(row: Row, name: str) -> Sequence[object]:
    listed = row.stored.record.outputs.get(name)
    return listed if isinstance(listed, list | tuple) else ()


def _prompt(rows: Sequence[Row], index: int) -> str:
    """The end of the prompt itself, where a record holds it: that is what the text continues."""
    for row in rows:
        prompts = _listed(row, "prompts")
        if index < len(prompts):
            flat = " ".join(str(prompts[index]).split())
            start = "..." if len(flat) > _SHOWN_CHARACTERS else ""
            return f": {start}{escape(flat[-_SHOWN_CHARACTERS:])}"
    return ""


def _notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of a system's figures must know, each note once per system."""
    notes = {(r.label, note) for r in rows for note in _facts(r.stored.record)}
    if not notes:
        return []
    return ["## Notes", "", *(f"- {escape(s)}: {escape(n)}" for s, n in sorted(notes)), ""]


def _facts(record: Record) -> list[str]:
    facts = list(record.report.notes)
    if record.validity.get("cap_note"):
        facts.append(str(record.validity["cap_note"]))
    cap_reason = record.memory_cap.get("reason")
    if record.memory_cap.get("requested_bytes") is not None and cap_reason:
        facts.append(f"memory cap: {cap_reason}")
    if record.validity.get("repetitions_agree") is False:
        facts.append("its repetitions did not all produce the same tokens")
    return facts


def _reruns(rows: Sequence[Row]) -> list[str]:
    commands = {r.stored.record.rerun_command: None for r in rows if r.stored.record.rerun_command}
    if not commands:
        return []
    return ["## Run it again", "", "```", *commands, "```", ""]


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items())) or "-"
