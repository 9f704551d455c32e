"""What papers print: the rows of ``conf/paper/*.csv``, checked one by one. ``tables.csv`` is the FlexGen paper's."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from flexgen_bench.core.errors import StoreError, UserError, unknown_choice
from flexgen_bench.published.policy_text import parse_policy

# Where a value was taken from, best first (conf/paper/README.md): the first word of the source's bracket.
TRUST_LEVELS = ("exact", "copy", "digitised", "derived", "reconstructed")
OOM = "OOM"
NOT_FOUND = "NOT FOUND"
NOT_PRINTED = ""
_BRACKET = re.compile(r"\[([^\]]*)\]")
_COUNTS = ("prompt_len", "gen_len", "gpus")


@dataclass(frozen=True)
class Quoted:
    """One printed value, as text: a number as the source writes it, OOM, NOT FOUND, or nothing where none is
    printed."""

    table: str
    system: str
    model: str
    prompt_len: str
    gen_len: str
    gpus: str
    metric: str
    value: str
    unit: str
    policy: str
    source: str

    @property
    def number(self) -> float | None:
        """None for a word."""
        return None if self.value in (OOM, NOT_FOUND, NOT_PRINTED) else float(self.value)

    @property
    def trust(self) -> str:
        """What the source's first bracket says of the value: ``exact``, ``digitised +-0.3 s``; "" for a value nobody
        found."""
        match = _BRACKET.search(self.source)
        return match.group(1) if match else ""

    @property
    def quantity(self) -> str:
        """What is counted: the metric up to its colon."""
        return self.metric.partition(": ")[0]

    @property
    def item(self) -> str:
        """Of what: the metric from its colon on ("prefill time: compute"); "" without one."""
        return self.metric.partition(": ")[2]

    @property
    def block(self) -> str:
        """Sequences of the run, as far as the policy tells: executed, or of one block."""
        policy = parse_policy(self.policy)
        size = policy.executed or policy.block_size
        return "" if size is None else str(size)

    @property
    def names_a_job(self) -> bool:
        """Whether it has lengths, so that there is something to ask a system for."""
        return bool(self.prompt_len and self.gen_len)

    def count(self, field: str) -> int | None:
        """A length or a number of GPUs; None where the row names none."""
        text = self.text(field)
        return int(text) if text else None

    def text(self, field: str) -> str:
        """Any of ``FIELDS``."""
        return str(getattr(self, field))

    def matches(self, where: Mapping[str, str]) -> bool:
        return all(self.text(field) == value for field, value in where.items())


COLUMNS = tuple(f.name for f in fields(Quoted))
# What rows, columns and conditions of a table may name.
FIELDS = (*COLUMNS, "quantity", "item", "block")


def read_quoted(path: Path) -> list[Quoted]:
    """Every row. Raises UserError naming the line, the column and what it must be; StoreError if it cannot be read."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file, strict=True)
            header = next(lines, [])
            if tuple(header) != COLUMNS:
                raise UserError(f"{path.name}, header", header, f"the columns {', '.join(COLUMNS)}")
            return [_row(line, f"{path.name}, line {lines.line_num}") for line in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"cannot read the printed values in {path}: {error}") from error


def read_papers(folder: Path) -> list[Quoted]:
    """Every row of every paper, in the order of the files' names. Raises as ``read_quoted``, and UserError for a table
    that two papers have."""
    rows: list[Quoted] = []
    for path in sorted(folder.glob("*.csv")):
        own = read_quoted(path)
        twice = {row.table for row in own} & {row.table for row in rows}
        if twice:
            raise UserError(f"{path.name}, table", min(twice), "a name that no other paper's table has")
        rows += own
    return rows


def _row(line: list[str], where: str) -> Quoted:
    if len(line) != len(COLUMNS):
        raise UserError(where, line, f"{len(COLUMNS)} values, one for each of {', '.join(COLUMNS)}")
    row = Quoted(*line)
    check(row, where)
    if not row.value:
        raise UserError(f"{where}, value", row.value, f"a number, {OOM} or {NOT_FOUND}")
    known = row.trust.replace(",", " ").split()[:1]
    if row.value != NOT_FOUND and (not known or known[0] not in TRUST_LEVELS):
        raise UserError(
            f"{where}, source",
            row.source,
            f"a source with how far to trust it in square brackets: {', '.join(TRUST_LEVELS)}",
        )
    return row


def check(row: Quoted, where: str) -> None:
    """Raises UserError for a value that is neither number nor word, lengths that are no counts, a policy that cannot
    be."""
    for name in ("table", "metric"):
        if not row.text(name):
            raise UserError(f"{where}, {name}", "", "given")
    for name in _COUNTS:
        text = row.text(name)
        if text and not (text.isascii() and text.isdigit()):
            raise UserError(f"{where}, {name}", text, "a whole number, or empty")
    try:
        parse_policy(row.policy)
    except UserError as error:
        raise UserError(f"{where}, policy", error.value, error.allowed, error.action) from error
    if row.value not in (OOM, NOT_FOUND, NOT_PRINTED):
        try:
            finite = math.isfinite(float(row.value)) and row.value == row.value.strip()
        except ValueError:
            finite = False
        if not finite:
            raise UserError(f"{where}, value", row.value, f"a number, {OOM} or {NOT_FOUND}")


def of_tables(rows: Iterable[Quoted], names: Iterable[str]) -> list[Quoted]:
    """The rows of these tables, table after table. Raises UserError for a table nobody printed."""
    by_name: dict[str, list[Quoted]] = {}
    for row in rows:
        by_name.setdefault(row.table, []).append(row)
    selected: list[Quoted] = []
    for name in names:
        if name not in by_name:
            raise unknown_choice("table.printed", name, by_name)
        selected += by_name[name]
    return selected
