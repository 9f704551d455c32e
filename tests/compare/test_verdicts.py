"""Which of two sets of records is better, and how sure that is."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_bench.compare.pairs import match
from flexgen_bench.compare.ratio import paired, unpaired
from flexgen_bench.compare.verdict import Verdict, judge
from flexgen_bench.core.metrics import GENERATION
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.store.reader import StoredRecord
from tests.support.record_factory import make_record, make_spec

METRIC = GENERATION


def stored(*records: Record) -> list[StoredRecord]:
    return [StoredRecord(Path(f"{record.run_id}.json"), record) for record in records]


def timed(*seconds: float, run: int = 0, **changes: object) -> Record:
    return make_record(times=[(1.0, s - 1.0) for s in seconds], run=run, **changes)


def verdict_of(a: list[Record], b: list[Record], **options: object) -> Verdict:
    (pair,) = match(stored(*a), stored(*b)).pairs
    return judge(pair, METRIC, **options).verdict


def test_a_clear_difference_has_a_side_and_turns_around_with_the_sides():
    slow, fast = timed(4.0, 4.01, 4.02), timed(2.0, 2.01, 2.02, run=1)
    assert verdict_of([slow], [fast]) is Verdict.BETTER
    assert verdict_of([fast], [slow]) is Verdict.WORSE


def test_small_changes_are_the_same_and_wide_ones_undecided():
    assert verdict_of([timed(4.0, 4.001, 4.002)], [timed(4.01, 4.011, 4.012, run=1)]) is Verdict.SAME
    assert verdict_of([timed(4.0, 5.0, 6.0)], [timed(3.0, 5.0, 6.5, run=1)]) is Verdict.UNDECIDED


def test_one_repetition_each_decides_nothing_however_far_apart():
    assert verdict_of([timed(4.0)], [timed(1.5, run=1)]) is Verdict.UNDECIDED


def test_runs_count_where_both_sides_have_several_and_their_spread_decides():
    """Repetitions inside a run agree closely and say nothing of what differs from run to run."""
    a = [timed(4.0, 4.001, 4.002), timed(5.0, 5.001, 5.002, run=1)]
    b = [timed(4.2, 4.201, 4.202, run=2), timed(4.7, 4.701, 4.702, run=3)]
    (pair,) = match(stored(*a), stored(*b)).pairs
    judged = judge(pair, METRIC)
    assert judged.verdict is Verdict.UNDECIDED
    assert judged.ratio is not None
    assert (judged.ratio.of, judged.ratio.counts) == ("runs", (2, 2))


def test_rounds_are_compared_as_pairs():
    """The machine slows down by half over the rounds, for both: B is faster in each by a tenth."""
    a = [timed(4.0 * f, run=i) for i, f in enumerate((1.0, 1.2, 1.5))]
    b = [timed(3.6 * f, run=i + 3) for i, f in enumerate((1.0, 1.2, 1.5))]
    assert verdict_of(a, b, rounds=True) is Verdict.BETTER
    assert verdict_of(a, b) is Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (Status.OK, Status.FAILED, Verdict.WORSE),
        (Status.OK, Status.OOM, Verdict.WORSE),
        (Status.FAILED, Status.OK, Verdict.BETTER),
        (Status.OK, Status.UNAVAILABLE, Verdict.UNDECIDED),
        (Status.TIMEOUT, Status.FAILED, Verdict.UNDECIDED),
    ],
)
def test_how_runs_end_counts(a: Status, b: Status, verdict: Verdict):
    first, second = (timed(4.0, 4.01, run=i, status=s, reason="it broke") for i, s in enumerate((a, b)))
    assert verdict_of([first], [second]) is verdict


def test_one_failed_round_is_not_hidden_by_later_ones():
    a = [timed(4.0, run=i) for i in range(3)]
    b = [timed(2.0, run=3), timed(2.0, run=4, status=Status.FAILED, reason="crash"), timed(2.0, run=5)]
    assert verdict_of(a, b, rounds=True) is Verdict.WORSE


def test_figures_of_two_kinds_are_not_judged():
    assert verdict_of([timed(4.0, 4.01)], [timed(2.0, 2.01, run=1, evidence=Evidence.EMULATED)]) is Verdict.UNDECIDED


def test_cells_of_other_machines_are_paired_and_the_machine_is_named():
    spec = make_spec("flexgen")
    other = replace(spec, threads=8)
    (pair,) = match(
        stored(make_record(spec=spec)), stored(make_record(spec=other, environment={"cpu": {"model": "Other"}}))
    ).pairs
    assert any("another machine: Some CPU" in text and "Other" in text for text in pair.differences)
    assert "threads: 2 | 8" in pair.differences


def test_what_only_one_side_has_is_named_and_unclear_pairs_are_not_guessed():
    spec = make_spec("flexgen")
    two = [replace(spec, threads=n) for n in (4, 8)]
    a = stored(make_record(spec=spec), make_record(system="accelerate", run=1))
    b = stored(*[make_record(spec=s, run=i + 2) for i, s in enumerate(two)])
    matched = match(a, b)
    assert matched.pairs == ()
    assert len(matched.only_a) == 2
    assert len(matched.only_b) == 1  # both cells have the same title


def test_a_later_side_is_judged_by_what_is_new_in_it():
    """Records of a commit stay in the next one; pooled with them, the new ones would count for half."""
    old, new = [timed(4.0, run=i) for i in range(2)], [timed(2.0, run=i + 2) for i in range(2)]
    (pair,) = match(stored(*old), stored(*old, *new)).pairs
    judged = judge(pair, METRIC)
    assert judged.verdict is Verdict.BETTER
    assert judged.ratio is not None
    assert judged.ratio.value == pytest.approx(2.0)
    assert verdict_of(old, old) is Verdict.SAME


def test_another_cap_on_one_machine_is_another_cell() -> None:
    """A rung of 25 % in A and one of 50 % in B were judged as one cell, and the status was 1."""
    spec = make_spec("flexgen")
    other = replace(spec, hardware=replace(spec.hardware, cpu_memory_bytes=2**20))
    beside = make_record("accelerate", run=2)
    matched = match(stored(make_record(spec=spec), beside), stored(make_record(spec=other, run=1), beside))
    assert len(matched.pairs) == 1
    assert (len(matched.only_a), len(matched.only_b)) == (1, 1)


def test_rounds_without_the_figure_are_left_out_on_both_sides() -> None:
    """A figure that one round of B lacks ended the command with an error of zip."""
    a = [timed(4.0 + 0.01 * i, run=i) for i in range(3)]
    b = [timed(2.0 + 0.01 * i, run=i + 3) for i in range(3)]
    b[1] = replace(b[1], batch_size=None)
    (pair,) = match(stored(*a), stored(*b)).pairs
    judged = judge(pair, "first_token_s", rounds=True)
    assert judged.ratio is not None
    assert judged.ratio.counts == (2, 2)


def test_tokens_that_changed_are_noted():
    a, b = timed(4.0, 4.01), timed(2.0, 2.01, run=1, outputs={"token_ids": [[1, 2, 3, 4]] * 3 + [[9, 9, 9, 9]]})
    (pair,) = match(stored(a), stored(b)).pairs
    assert judge(pair, METRIC).notes == ("tokens differ: 3 of 4 prompts have the same",)


def test_intervals_cover_as_often_as_they_say():
    """95 % of the intervals of noisy runs hold the true ratio, 1.2 here; 1,000 draws, so 93 to 97 % is chance."""
    source = random.Random(7)
    inside = {"unpaired": 0, "paired": 0}
    for _ in range(1000):
        a = [math.exp(source.gauss(0.0, 0.05)) for _ in range(5)]
        b = [1.2 * math.exp(source.gauss(0.0, 0.05)) for _ in range(5)]
        for name, ratio in (("unpaired", unpaired(a, b, "runs")), ("paired", paired(a, b))):
            assert ratio.low is not None
            assert ratio.high is not None
            inside[name] += ratio.low <= 1.2 <= ratio.high
    assert all(930 <= count <= 970 for count in inside.values()), inside


def test_a_ratio_and_its_inverse_say_the_same():
    a, b = [1.0, 1.1, 1.3], [2.0, 2.4, 2.2]
    there, back = unpaired(a, b, "runs"), unpaired(b, a, "runs")
    assert there.low is not None
    assert back.high is not None
    assert there.value == pytest.approx(1 / back.value)
    assert there.low == pytest.approx(1 / back.high)
