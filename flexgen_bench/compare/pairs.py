"""Which records of A and B measure the same cell."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen_bench.core.codec import as_mapping
from flexgen_bench.core.machine_name import machine_of
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Status
from flexgen_bench.report.same_tokens import lossy_of
from flexgen_bench.store.reader import StoredRecord
from flexgen_bench.store.writer import suite_folder

# What is known about a machine's speed, and where a number lies in the code, changes no cell.
_NOT_ASKED = (*(("hardware", part) for part in ("rates", "sources", "gpu_memory_is_cap", "weight_shares")), ("target",))
_CAPS = ("gpu_memory_bytes", "cpu_memory_bytes", "disk_bytes")
# What two machines, or two versions of the project, may say differently of the same question.
_OF_A_PLACE = ("hardware", "threads", "measure", "target")


@dataclass(frozen=True)
class Pair:
    """Runs of one cell, oldest first, at least one on each side. differences: in what the two were not asked the
    same, or not on the same machine."""

    title: str
    a: tuple[StoredRecord, ...]
    b: tuple[StoredRecord, ...]
    differences: tuple[str, ...] = ()

    @property
    def is_one(self) -> bool:
        """Whether both sides hold the very same runs."""
        return {stored.record.run_id for stored in self.a} == {stored.record.run_id for stored in self.b}

    @property
    def ok_a(self) -> list[Record]:
        return [stored.record for stored in self.a if stored.record.status is Status.OK]

    @property
    def ok_b(self) -> list[Record]:
        return [stored.record for stored in self.b if stored.record.status is Status.OK]


@dataclass(frozen=True)
class Matched:
    """All pairs, and titles of cells that only one side has."""

    pairs: tuple[Pair, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


def match(a: Sequence[StoredRecord], b: Sequence[StoredRecord]) -> Matched:
    """Pair cells of equal spec; of those left, cells that ask the same of another machine, where that is clear.

    A single record on each side is a pair whatever it measures: that is what was asked for.
    """
    if len(a) == len(b) == 1:
        return Matched((_pair(tuple(a), tuple(b)),), (), ())
    pairs = []
    left_a, left_b = list(a), list(b)
    for key in (_same_spec, _same_question):
        cells_a, cells_b = _cells(left_a, key), _cells(left_b, key)
        # Of one question there may be several cells (two caps): which belongs to which is then not clear.
        both = [(k, cells_a[k], cells_b[k]) for k in cells_a if k in cells_b]
        single = [(k, x[-1].record, y[-1].record) for k, x, y in both if _is_one_cell(x) and _is_one_cell(y)]
        clear = [k for k, x, y in single if _may_differ(x, y)]
        pairs += [_pair(tuple(cells_a[k]), tuple(cells_b[k])) for k in clear]
        left_a = [stored for k, cell in cells_a.items() if k not in clear for stored in cell]
        left_b = [stored for k, cell in cells_b.items() if k not in clear for stored in cell]
    pairs.sort(key=lambda pair: pair.title)
    return Matched(tuple(pairs), _titles(left_a), _titles(left_b))


def title_of(record: Record) -> str:
    """``default: flexgen (4-bit weights), opt-1.3b, 32-32, bfloat16, cpu``."""
    spec = record.spec
    model, workload, hardware = (as_mapping(spec.get(k)) for k in ("model", "workload", "hardware"))
    system = str(spec.get("system", "?"))
    if not lossy_of(record).is_exact:
        system += f" ({lossy_of(record)})"
    shape = as_mapping(model.get("shape")).get("name", "?")
    parts = (system, shape, workload.get("name", "?"), spec.get("dtype", "?"), hardware.get("name", "?"))
    return f"{suite_folder(record.suite)}: " + ", ".join(str(part) for part in parts)


def _pair(a: tuple[StoredRecord, ...], b: tuple[StoredRecord, ...]) -> Pair:
    title_a, title_b = title_of(a[-1].record), title_of(b[-1].record)
    title = title_a if title_a == title_b else f"{title_a} | {title_b}"
    a, b = _without(a, b), _without(b, a)
    return Pair(title, a, b, tuple(_differences(a[-1].record, b[-1].record)))


def _without(runs: tuple[StoredRecord, ...], others: tuple[StoredRecord, ...]) -> tuple[StoredRecord, ...]:
    """The runs that the other side has not, or all of them if it has all: a later commit still holds the records of an
    earlier one, and what is new in it is what it is to be judged by."""
    known = {stored.record.run_id for stored in others}
    return tuple(stored for stored in runs if stored.record.run_id not in known) or runs


def _differences(a: Record, b: Record) -> Iterable[str]:
    machines = [machine_of(record.environment) for record in (a, b)]
    if machines[0] != machines[1]:
        yield f"another machine: {machines[0] or 'unknown'} | {machines[1] or 'unknown'}"
    flat_a, flat_b = (dict(_flat(record.spec)) for record in (a, b))
    for path in sorted(flat_a.keys() | flat_b.keys()):
        if not any(path[: len(start)] == start for start in _NOT_ASKED):
            first, second = flat_a.get(path, "-"), flat_b.get(path, "-")
            if first != second:
                yield f"{'.'.join(path)}: {first} | {second}"


def _flat(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], str]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, (*path, name))
        else:
            yield (*path, name), json.dumps(inner, sort_keys=True, default=str)


def _same_spec(stored: StoredRecord) -> Hashable:
    return suite_folder(stored.record.suite), stored.record.spec_hash


def _same_question(stored: StoredRecord) -> Hashable:
    asked = {k: v for k, v in stored.record.spec.items() if k not in _OF_A_PLACE}
    return suite_folder(stored.record.suite), json.dumps(asked, sort_keys=True, default=str)


def _cells(records: Sequence[StoredRecord], key: Any) -> dict[Hashable, list[StoredRecord]]:
    cells: dict[Hashable, list[StoredRecord]] = {}
    for stored in sorted(records, key=lambda stored: stored.age):
        cells.setdefault(key(stored), []).append(stored)
    return cells


def _is_one_cell(records: Sequence[StoredRecord]) -> bool:
    return len({stored.record.spec_hash for stored in records}) == 1


def _may_differ(a: Record, b: Record) -> bool:
    """Another machine has other memory. On one machine another cap is another cell."""
    caps = [[as_mapping(r.spec.get("hardware")).get(cap) for cap in _CAPS] for r in (a, b)]
    return caps[0] == caps[1] or machine_of(a.environment) != machine_of(b.environment)


def _titles(records: Sequence[StoredRecord]) -> tuple[str, ...]:
    return tuple(sorted({title_of(stored.record) for stored in records}))
