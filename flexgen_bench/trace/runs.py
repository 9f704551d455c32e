"""Finding a recorded run by what a person types, and its trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from flexgen_bench.core.codec import from_json
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.record import Record
from flexgen_bench.core.timeline import Slice, Timeline
from flexgen_bench.models.parts import Experts
from flexgen_bench.models.registry import family
from flexgen_bench.store.reader import StoredRecord, read_paths, read_record, record_files
from flexgen_bench.store.trace import read_trace

LATEST = "latest"
_ALLOWED = f"a record's file, its name, the beginning of its hash or of its run's name, or {LATEST!r}"


@dataclass(frozen=True)
class TracedRun:
    """A record with its trace."""

    path: Path
    record: Record
    timeline: Timeline

    @property
    def title(self) -> str:
        """System, model, workload, machine and evidence, in one line."""
        spec = self.record.spec
        return (
            f"{spec['system']}, {spec['model']['shape']['name']}, {spec['dtype']}, workload "
            f"{spec['workload']['name']}, "
            f"hardware {spec['hardware']['name']}: {self.record.evidence.value}"
        )

    @property
    def num_layers(self) -> int:
        return int(self.record.spec["model"]["shape"]["num_layers"])

    @cached_property
    def _mixtures(self) -> list[int]:
        """The numbers of the layers that have experts."""
        shape = from_json(ModelShape, self.record.spec["model"]["shape"], "model.shape")
        layers = enumerate(family(shape.family).decoder(shape).layers, start=1)
        return [number for number, layer in layers if isinstance(layer.mlp, Experts)]

    def number(self, unit: int) -> int:
        """A unit's own; of experts that are placed apart, that of their layer."""
        beyond = unit - self.num_layers - 2
        return self._mixtures[beyond] if beyond >= 0 else unit

    def unit_name(self, unit: int) -> str:
        """``embedding``, ``layer 3`` (from 1), ``head`` or ``experts of layer 3``."""
        if unit > self.num_layers + 1:
            return f"experts of layer {self.number(unit)}"
        return "embedding" if unit == 0 else "head" if unit > self.num_layers else f"layer {unit}"

    def slice_name(self, slice_: Slice) -> str:
        """Kind, unit and micro-batch: ``attend layer 3 mb 1``."""
        name = f"{slice_.kind} {self.unit_name(slice_.unit)}"
        return name if slice_.micro_batch_index < 0 else f"{name} mb {slice_.micro_batch_index}"


def find_run(run: str, results_dir: Path) -> TracedRun:
    """The run that ``run`` names, with its trace.

    Raises UserError for an unknown or ambiguous name and for a record without trace, StoreError for a damaged file.
    """
    stored = _latest(results_dir) if run == LATEST else _named(run, results_dir)
    record = stored.record
    if not record.trace:
        raise UserError("RUN", stored.path.name, "a record with a trace", _why_without(record))
    trace_path = stored.path.parent / record.trace
    trace = read_trace(trace_path)
    if trace.spec_hash != record.spec_hash:
        raise StoreError(
            f"{trace_path} is the trace of another cell ({trace.spec_hash}, not {record.spec_hash}). "
            "Measure the cell again."
        )
    return TracedRun(stored.path, record, trace.timeline)


def _named(run: str, results_dir: Path) -> StoredRecord:
    if Path(run).is_file():
        return StoredRecord(Path(run), read_record(Path(run)))
    paths = list(record_files(results_dir))
    matching = [p for p in paths if run in (p.name, p.stem)]
    # <system>--<model>--<workload>--<spec hash>--<run id>
    matching = matching or [p for p in paths if run and any(part.startswith(run) for part in p.stem.split("--")[3:])]
    if not matching:
        raise UserError("RUN", run, _ALLOWED, _near(run, paths, results_dir))
    if len({p.stem.split("--")[-2] for p in matching}) > 1:
        names = ", ".join(p.stem for p in matching[:5])
        raise UserError("RUN", run, "the beginning of one hash only", f"It fits {names}.")
    if len(matching) == 1:
        return StoredRecord(matching[0], read_record(matching[0]))
    return _newest(matching, run)  # reruns of one cell


def _latest(results_dir: Path) -> StoredRecord:
    records, _ = read_paths(record_files(results_dir))
    traced = [stored for stored in records if stored.record.trace]
    if not traced:
        action = f"No record in {results_dir} has a trace: measure something with our engine first."
        raise UserError("RUN", LATEST, _ALLOWED, action)
    return max(traced, key=lambda stored: stored.age)


def _newest(paths: Sequence[Path], run: str) -> StoredRecord:
    records, problems = read_paths(paths)
    if not records:
        raise StoreError(f"no record of {run} can be used: {problems[0].message}")
    return max(records, key=lambda stored: stored.age)


def _near(run: str, paths: Sequence[Path], results_dir: Path) -> str:
    if not paths:
        return f"There are no records in {results_dir}; choose another folder with --results."
    hashes = {p.stem.split("--")[-2]: p.stem for p in paths if p.stem.count("--") >= 4}
    close = get_close_matches(run, [*(p.stem for p in paths), *hashes], n=3, cutoff=0.3)
    names = dict.fromkeys(hashes.get(name, name) for name in close)
    return f"Nearest: {', '.join(names or sorted(p.stem for p in paths)[:3])}."


def _why_without(record: Record) -> str:
    if not record.samples:
        return f"It ended as {record.status.value} and has measured nothing that could be traced."
    return (
        "Its system keeps none, or it was measured before traces were kept; our engine's runs have one when measured "
        f"again: {record.rerun_command}"
    )
