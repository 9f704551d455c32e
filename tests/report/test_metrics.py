"""Metrics are what their definitions say, recomputed here by hand from raw samples."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.metrics import (
    DECODE,
    DEFINITIONS,
    GENERATION,
    PREFILL,
    IntervalKind,
    bytes_per_s,
    metrics,
    summaries,
    summarise,
)
from flexgen_bench.core.policy import Policy, Schedule
from flexgen_bench.core.record import LinkUse, Metric, Sample
from flexgen_bench.core.status import Evidence
from tests.support.record_factory import make_record, make_samples

seconds = st.floats(0.01, 1000)


def test_headline_is_total_tokens_over_total_time_not_a_mean_of_rates() -> None:
    record = make_record(times=[(1.0, 3.0), (2.0, 4.0), (1.0, 5.0)])
    summary = summarise(record)
    assert summary is not None
    assert summary.value == pytest.approx(3 * 16 / 16)
    assert summary.value != pytest.approx((16 / 4 + 16 / 6 + 16 / 6) / 3)
    assert (summary.low, summary.high) == pytest.approx((16 / 6, 16 / 4))
    assert (summary.n, summary.interval) == (3, IntervalKind.RANGE)


def test_phases_and_times_by_hand() -> None:
    record = make_record(times=[(1.0, 3.0), (3.0, 9.0)])
    values = {name: summary.value for name, summary in summaries(record).items()}
    assert values == pytest.approx(
        {
            GENERATION: 32 / 16,
            PREFILL: 64 / 4,
            DECODE: 24 / 12,
            "total_s": 8.0,
            "prefill_s": 2.0,
            "decode_s": 6.0,
            # Four prompts in batches of two: two batches of three decode steps in each repetition.
            "first_token_s": 4 / 4,
            "time_per_later_token_s": 12 / 12,
        }
    )


def test_every_metric_carries_unit_direction_and_the_records_evidence() -> None:
    record = replace(make_record(), evidence=Evidence.EMULATED)
    found = metrics(record)
    assert list(found) == list(DEFINITIONS)
    assert {m.evidence for m in found.values()} == {Evidence.EMULATED}
    assert found[GENERATION].higher_is_better
    assert not found["total_s"].higher_is_better
    assert found[GENERATION].samples == pytest.approx((4.0, 16 / 6, 16 / 6))


@pytest.mark.parametrize(
    ("n", "kind"),
    [(1, IntervalKind.SINGLE), (4, IntervalKind.RANGE), (5, IntervalKind.BOOTSTRAP), (9, IntervalKind.BOOTSTRAP)],
)
def test_the_interval_says_what_it_is(n: int, kind: IntervalKind) -> None:
    summary = summarise(make_record(times=[(1.0 + 0.1 * i, 3.0) for i in range(n)]))
    assert summary is not None
    assert (summary.interval, summary.n) == (kind, n)


def test_bootstrap_is_deterministic_and_narrower_than_the_range() -> None:
    record = make_record(times=[(1.0, 3.0 + 0.2 * i) for i in range(12)])
    first, second = summarise(record), summarise(record)
    assert first == second
    assert first is not None
    rates = metrics(record)[GENERATION].samples
    assert min(rates) < first.low < first.value < first.high < max(rates)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=7))
def test_the_pooled_value_lies_in_its_interval(times: list[tuple[float, float]]) -> None:
    for summary in summaries(make_record(times=times)).values():
        slack = 1e-9 * abs(summary.value)
        if summary.interval is not IntervalKind.BOOTSTRAP:
            assert summary.low - slack <= summary.value <= summary.high + slack
        assert summary.low <= summary.high
        assert math.isfinite(summary.value)


def test_what_samples_do_not_define_is_absent_rather_than_infinite() -> None:
    one_token = Sample(prefill_s=1.0, decode_s=0.0, prompt_tokens=8, generated_tokens=4, decode_tokens=0)
    found = metrics(make_record(samples=(one_token,)))
    assert DECODE not in found
    assert "time_per_later_token_s" not in found
    assert found[GENERATION].samples == (4.0,)
    assert metrics(make_record(samples=())) == {}
    unknown_batch = metrics(make_record(batch_size=None))
    assert "first_token_s" not in unknown_batch
    assert GENERATION in unknown_batch


def test_phases_that_overlap_have_no_figures_of_their_own() -> None:
    """A continuous run's "prefill" was the time until its first sequence decoded, and stood in the tables as its
    prefill throughput."""
    policy = Policy(2, 2, schedule=Schedule.CONTINUOUS)

    def of(policy: Policy) -> dict[str, Metric]:
        record = make_record()
        return metrics(replace(record, report=replace(record.report, requested=to_json(policy))))

    assert set(of(policy)) == {GENERATION, "total_s"}
    at_once = replace(policy, gpu_batch_size=4, num_gpu_batches=1)
    for phases_follow in (at_once, replace(policy, schedule=Schedule.BLOCK)):
        assert list(of(phases_follow)) == list(DEFINITIONS)


def test_link_rate() -> None:
    assert bytes_per_s(LinkUse(100, 4.0)) == 25.0
    assert bytes_per_s(LinkUse(100, 0.0)) is None


def test_make_samples_counts_the_workload() -> None:
    (sample,) = make_samples([(1.0, 2.0)])
    assert (sample.prompt_tokens, sample.generated_tokens, sample.decode_tokens) == (32, 16, 12)
