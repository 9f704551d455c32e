"""The page of one model: is it safe to compress it, and how sure is that? From records alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from flexgen_bench.accuracy.compare.outcome import ModelOutcome, ModeOutcome
from flexgen_bench.core.digits import fixed, power
from flexgen_bench.report.accuracy.formatting import (
    NOTHING,
    READING,
    advice,
    bits_interval,
    bytes_text,
    change_text,
    error_text,
    left_out_lines,
    p_text,
    points_interval,
    ratio_to_yardstick,
    score_text,
    share_text,
    verdict_text,
    worst_text,
)
from flexgen_bench.report.accuracy.loss import HEADERS, TITLE, basis, loss_rows
from flexgen_bench.report.accuracy.loss import READING as LOSS_READING
from flexgen_bench.report.table import escape


def page_name(outcome: ModelOutcome) -> str:
    """The file's name without its ending: one page for each model, system and dtype of the uncompressed run."""
    parts = (outcome.model, outcome.system, outcome.dtype)
    return "--".join("".join(c if c.isalnum() or c in "._-" else "_" for c in p) for p in parts)


def model_page(outcome: ModelOutcome) -> str:
    """Advice, modes, tasks under each mode, errors of weights and cache, provenance."""
    lines = [
        f"# Accuracy of {escape(outcome.model)}",
        "",
        f"Evaluated by {escape(outcome.system)}; the uncompressed model in {outcome.dtype}. Built from the records "
        "alone by "
        "`python -m flexgen_bench.report`; edit nothing here.",
        "",
        f"**{escape(advice(outcome))}**",
        "",
        f"Margin: {escape(str(outcome.margins))}; a loss up to this counts as none.",
        "",
        *_findings(outcome),
        *_modes(outcome),
        *_loss(outcome),
        *_agreements(outcome),
        "## How to read this",
        "",
        READING,
        "",
        *(line for mode in outcome.modes for line in _mode(mode)),
        *_errors(outcome.modes),
        *_provenance(outcome),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _findings(outcome: ModelOutcome) -> list[str]:
    left_out = left_out_lines(outcome)
    if not outcome.findings and not outcome.problems and not left_out:
        return []
    lines = ["## Mind", ""]
    for finding in outcome.findings:
        word = "**A control fails**" if finding.fails else "Note"
        lines.append(f"- {word}, {escape(finding.mode)}: {escape(finding.name)}. {escape(finding.text)}")
    lines += [f"- Not compared: {escape(problem)}" for problem in outcome.problems]
    lines += [f"- Left out, {escape(line)}" for line in left_out]
    return [*lines, ""]


def _modes(outcome: ModelOutcome) -> list[str]:
    if not outcome.modes:
        return ["Only the uncompressed model has been evaluated.", ""]
    headers = (
        "Mode",
        "What",
        "Bytes per weight",
        "Weight error",
        "Mean change, points (95 %)",
        "Added bits per byte (95 %)",
        "of plain rounding's",
        "KL, nats per token",
        "Same argmax",
        "Lost most",
        "Verdict",
    )
    rows = []
    for mode in outcome.modes:
        comparison, numbers = mode.comparison, mode.numbers
        error = None if numbers is None else numbers.weight_error
        text = numbers.divergence[0] if numbers is not None and numbers.divergence else None
        ratio = ratio_to_yardstick(mode)
        rows.append(
            (
                mode.mode,
                mode.subject.what,
                bytes_text(mode.bytes_per_weight),
                error_text(error),
                points_interval(comparison.score if comparison else None),
                bits_interval(comparison.bits if comparison else None),
                NOTHING if ratio is None else f"{fixed(ratio, 3)}x",
                NOTHING if text is None else power(text.kl, 2),
                NOTHING if text is None else share_text(text.agree, text.positions),
                worst_text(comparison),
                verdict_text(mode),
            )
        )
    return ["## Modes", "", *_table(headers, rows), ""]


def _loss(outcome: ModelOutcome) -> list[str]:
    rows = loss_rows(outcome)
    if not rows:
        return []
    return [f"## {TITLE}", "", f"{escape(basis(outcome))}. {LOSS_READING}", "", *_table(HEADERS, rows), ""]


def _agreements(outcome: ModelOutcome) -> list[str]:
    if not outcome.agreements:
        return []
    headers = (
        "Task",
        "Beside",
        "n",
        "Predictions differ",
        "of which ties below 1e-3",
        "Mean difference of log-likelihoods",
        "Largest",
    )
    rows = [
        (
            a.task,
            a.reference,
            str(a.n),
            str(len(a.different) + a.ties),
            str(a.ties),
            power(a.mean, 1, plus=True),
            power(a.largest, 1),
        )
        for a in outcome.agreements
    ]
    return ["## The uncompressed model beside a reference", "", *_table(headers, rows), ""]


def _mode(mode: ModeOutcome) -> list[str]:
    comparison = mode.comparison
    if comparison is None or not comparison.tasks:
        return []
    headers = (
        "Task",
        "n",
        "Metric",
        "exact",
        escape(mode.mode),
        "Change (95 %)",
        "lost / won",
        "p",
        "Added bits per byte (95 %)",
        "Same predictions",
        "Cut",
        "Verdict",
    )
    rows = [
        (
            t.task,
            str(t.n),
            t.metric,
            score_text(t, t.reference),
            score_text(t, t.score),
            change_text(t),
            NOTHING if t.lost is None else f"{t.lost} / {t.won}",
            p_text(t.p_holm),
            bits_interval(t.bits),
            f"{t.same_predictions} of {t.n}",
            str(t.truncated),
            str(t.verdict),
        )
        for t in comparison.tasks
    ]
    lines = [f"## {escape(mode.mode)}: {escape(mode.subject.what)}", "", *_table(headers, rows), ""]
    if any(t.truncated for t in comparison.tasks):
        lines += ["Cut: items longer than the context, cut from the left.", ""]
    return lines


def _errors(modes: Sequence[ModeOutcome]) -> list[str]:
    """By kind of tensor, smallest to largest over the layers; every layer is in the CSV."""
    rows = []
    for mode in modes:
        if mode.numbers is None:
            continue
        for name in dict.fromkeys(e.tensor for e in (*mode.numbers.weights, *mode.numbers.kv)):
            errors = sorted(e.error for e in (*mode.numbers.weights, *mode.numbers.kv) if e.tensor == name)
            middle = errors[len(errors) // 2]
            rows.append((mode.mode, name, str(len(errors)), *map(error_text, (errors[0], middle, errors[-1]))))
    if not rows:
        return []
    return [
        "## Error of weights, keys and values",
        "",
        "Relative: Frobenius norm of the change / of the original. Weights as the engine reads them; keys and values "
        "of real text.",
        "",
        *_table(("Mode", "Tensor", "Layers", "Smallest", "Median", "Largest"), rows),
        "",
    ]


def _provenance(outcome: ModelOutcome) -> list[str]:
    records = [*outcome.exact.values(), *(r for m in outcome.modes for r in m.tasks.values())]
    commits = sorted({_commit(r.environment) for r in records})
    versions = sorted({f"{r.task} {r.task_version}" for r in records})
    seconds = math.fsum(r.seconds for r in records)
    commands = dict.fromkeys(r.rerun_command for r in records)
    machines = sorted({_machine(r.environment) for r in records})
    return [
        "## Where the numbers come from",
        "",
        f"- {len(records)} records, {records[0].evidence}; {min(r.started_utc for r in records)} to "
        f"{max(r.ended_utc for r in records)}, {fixed(seconds, 0)} s of evaluating",
        f"- on {escape('; '.join(machines))}; code: commit {escape(', '.join(commits))}",
        f"- weights: {escape(records[0].subject.fingerprint)}",
        f"- tasks with their versions: {escape(', '.join(versions))}",
        "",
        "```",
        *commands,
        "```",
        "",
    ]


def _commit(environment: object) -> str:
    code = environment.get("code") if hasattr(environment, "get") else None
    return f"{str((code or {}).get('commit') or 'unknown')[:12]}{' with changes' if (code or {}).get('dirty') else ''}"


def _machine(environment: object) -> str:
    cpu = environment.get("cpu") if hasattr(environment, "get") else None
    cpu = cpu or {}
    return f"{cpu.get('model') or 'a machine not recorded'}, {cpu.get('usable_cores', '?')} cores"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(headers)} |",
        f"|{'---|' * len(headers)}",
        *(f"| {' | '.join(escape(cell) for cell in row)} |" for row in rows),
    ]
