"""Do systems that ran the same prompts produce the same tokens? Compared with the group's reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexgen_bench.core.codec import from_json
from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Status


@dataclass(frozen=True)
class Agreement:
    """How many prompts got exactly the reference's tokens. ``total`` None: nothing to compare with.

    is_lossy: a compressed run need not say the same; how well it does is a matter of accuracy, not of being right.
    """

    is_reference: bool = False
    is_lossy: bool = False
    equal: int | None = None
    total: int | None = None

    def __str__(self) -> str:
        if self.is_reference:
            return "reference"
        if self.is_lossy:
            return "lossy"
        if self.equal is None or self.total is None:
            return "-"
        if self.equal == self.total:
            return "= reference"
        return f"{self.equal} of {self.total} prompts equal"


def compare_group(records: Sequence[Record]) -> list[Agreement]:
    """One agreement per record of a comparable group, in order.

    The reference is the record whose ``outputs["reference"]`` is true; with none, or several whose tokens
    differ, nothing is compared. Lossy runs are not compared, and are no reference. A record with another number of
    prompts equals the reference in none.
    """
    references = [r for r in records if _is_reference(r)]
    answers = [_tokens(r) for r in references]
    agreed = bool(answers) and all(answer == answers[0] for answer in answers)
    return [_agreement(r, answers[0] if agreed else None) for r in records]


def lossy_of(record: Record) -> Lossy:
    """What a run was allowed to change of the results; a spec that says nothing is exact."""
    return from_json(Lossy, record.spec.get("lossy") or {}, "lossy")


def _agreement(record: Record, wanted: list[Any] | None) -> Agreement:
    if not lossy_of(record).is_exact:
        return Agreement(is_lossy=bool(_tokens(record)))
    if wanted is None:
        return Agreement()
    if _is_reference(record):
        return Agreement(is_reference=True)
    got = _tokens(record)
    if not got:
        return Agreement()
    same_prompts = len(got) == len(wanted)
    equal = sum(g == w for g, w in zip(got, wanted, strict=True)) if same_prompts else 0
    return Agreement(equal=equal, total=len(wanted))


def _is_reference(record: Record) -> bool:
    """Only a whole run can be what others are held against."""
    return (
        record.status is Status.OK
        and lossy_of(record).is_exact
        and record.outputs.get("reference") is True
        and bool(_tokens(record))
    )


def _tokens(record: Record) -> list[Any] | None:
    tokens = record.outputs.get("token_ids")
    return [list(ids) for ids in tokens] if isinstance(tokens, list | tuple) else None
