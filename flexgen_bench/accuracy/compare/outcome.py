"""Records of one model put together: each mode beside the uncompressed one, with controls and a recommendation. Knows
no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexgen_bench.accuracy.compare.agreement import Agreement, agreement
from flexgen_bench.accuracy.compare.compare import Margins, ModeComparison, combined, compare_task
from flexgen_bench.accuracy.compare.controls import Finding, Seen, check, on_grid
from flexgen_bench.accuracy.compare.recommend import Candidate, Recommendation, recommend
from flexgen_bench.core.accuracy import EXACT_MODE, ModeRecord, Role, Subject, TaskRecord
from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.store.accuracy_store import StoredAccuracy


@dataclass(frozen=True)
class ModeOutcome:
    """One mode of a model. tasks: its records by name. comparison None: the uncompressed mode itself."""

    mode: str
    subject: Subject
    tasks: Mapping[str, TaskRecord]
    numbers: ModeRecord | None
    comparison: ModeComparison | None
    rtn: ModeComparison | None
    on_grid: bool

    @property
    def lossy(self) -> Lossy:
        return self.subject.changes

    @property
    def bytes_per_weight(self) -> float | None:
        return None if self.numbers is None else self.numbers.bytes_per_weight


@dataclass(frozen=True)
class ModelOutcome:
    """What the records of one model under one system say. problems: records that could not be compared, in words."""

    model: str
    system: str
    dtype: str
    exact: Mapping[str, TaskRecord]
    modes: Sequence[ModeOutcome]
    agreements: Sequence[Agreement]
    findings: Sequence[Finding]
    recommendation: Recommendation
    margins: Margins
    problems: Sequence[str]

    @property
    def fails(self) -> bool:
        return any(finding.fails for finding in self.findings)


Records = Mapping[tuple[str, str], dict[str, TaskRecord]]  # by (system, mode), by task


def outcomes(stored: StoredAccuracy, margins: Margins) -> list[ModelOutcome]:
    """Every model (its weights, and the dtype of the run) and system with an uncompressed record, by name."""
    model_outcomes: list[ModelOutcome] = []
    for model in sorted({_model(r.subject) for _, r in stored.tasks}):
        by_subject: dict[tuple[str, str], dict[str, TaskRecord]] = {}
        for _, record in stored.tasks:
            if _model(record.subject) == model:
                key = (record.subject.system, record.subject.mode)
                by_subject.setdefault(key, {})[record.task] = record
        numbers = {(r.subject.system, r.subject.mode): r for _, r in stored.modes if _model(r.subject) == model}
        roles = {r.subject.system: r.subject.role for _, r in stored.tasks}
        systems = sorted({system for system, mode in by_subject if mode == EXACT_MODE})
        references = [s for s in systems if roles[s] is Role.REFERENCE]
        for system in [s for s in systems if s not in references] or systems:
            model_outcomes.append(_outcome(model[0], system, by_subject, numbers, margins, references))
    return model_outcomes


def _model(subject: Subject) -> tuple[str, str, str]:
    """What must be the same for records to be compared."""
    return subject.model, subject.run_dtype, subject.fingerprint


def _outcome(
    model: str,
    system: str,
    records: Records,
    numbers: Mapping[tuple[str, str], ModeRecord],
    margins: Margins,
    references: Sequence[str],
) -> ModelOutcome:
    exact = records[system, EXACT_MODE]
    problems: list[str] = []
    modes = []
    for (of, mode), tasks in sorted(records.items(), key=_order):
        if of != system or mode == EXACT_MODE:
            continue
        mine = numbers.get((system, mode))
        rtn_tasks = records.get((Role.YARDSTICK.value, mode))
        modes.append(
            ModeOutcome(
                mode=mode,
                subject=next(iter(tasks.values())).subject,
                tasks=tasks,
                numbers=mine,
                comparison=_compared(exact, tasks, margins, problems),
                rtn=None if rtn_tasks is None else _compared(exact, rtn_tasks, margins, problems),
                on_grid=on_grid(mine),
            )
        )
    agreements = [
        agreement(exact[name], records[other, EXACT_MODE][name])
        for other in references
        if other != system
        for name in sorted(exact)
        if name in records[other, EXACT_MODE]
    ]
    seen = [Seen(m.mode, m.lossy, m.comparison, m.numbers, m.rtn, m.subject.weight_format) for m in modes]
    candidates = [Candidate(m.mode, m.lossy, m.bytes_per_weight, m.comparison, m.on_grid) for m in modes]
    return ModelOutcome(
        model=model,
        system=system,
        dtype=next(iter(exact.values())).subject.dtype,
        exact=exact,
        modes=modes,
        agreements=agreements,
        findings=[*check(seen), *_disagreements(agreements)],
        recommendation=recommend(candidates),
        margins=margins,
        problems=problems,
    )


def _compared(
    exact: Mapping[str, TaskRecord], tasks: Mapping[str, TaskRecord], margins: Margins, problems: list[str]
) -> ModeComparison:
    """Tasks that cannot be compared are told and left out: one of them must not hide the others."""
    comparisons = []
    for name, record in tasks.items():
        if name not in exact:
            problems.append(f"{record.subject.mode}, {name}: the uncompressed model has no record of it")
            continue
        try:
            comparisons.append(compare_task(exact[name], record, margins))
        except UserError as error:
            problems.append(f"{record.subject.mode}, {name}: {error}")
    return combined(comparisons, margins)


def _disagreements(agreements: Sequence[Agreement]) -> list[Finding]:
    wrong = [a for a in agreements if a.different]
    if not wrong:
        return []
    text = "; ".join(
        f"{a.task}: {len(a.different)} of {a.n} ({', '.join(a.different[:3])}) beside {a.reference}" for a in wrong
    )
    return [Finding(EXACT_MODE, "predictions differ from the reference's", f"not ties: {text}.", True)]


def _order(entry: tuple[tuple[str, str], object]) -> tuple[int, int, str]:
    """Whoever compresses least first; published formats last."""
    (system, mode), tasks = entry
    assert isinstance(tasks, dict)
    subject = next(iter(tasks.values())).subject
    lossy = subject.changes
    bits = -(lossy.weights.bits if lossy.weights else 16)
    kind = 2 if subject.weight_format is not None else int(not subject.is_exact)
    return kind, bits, f"{system}{mode}"
