"""Rates of a row are of the time since the moment before, within a generation."""

from __future__ import annotations

import pytest

from flexgen_bench.core.moment import JobState, Moment
from flexgen_bench.trackers.live_rows import LiveRows


def moment(generation: int, elapsed_s: float, decode: int, busy_s: float, read: int, passes: int) -> Moment:
    job = JobState(passes, 1, 0, 2, 3, {"cpu": 5}, {"cpu": 9}, {"disk_read": read}, {"disk_read": busy_s})
    time_s = elapsed_s + (generation - 1) * 10
    return Moment("measure", generation, time_s, elapsed_s, 40, decode, 100, read, None, job)


def test_rates_are_of_the_time_between_two_moments() -> None:
    rows = LiveRows()
    first = rows.row(moment(1, 2.0, 100, 0.5, 1000, 4))
    assert first["live/decode_tok_per_s"] == pytest.approx(50)
    assert first["live/prefill_tok_per_s"] == pytest.approx(20)
    assert first["link/disk_read_bytes_per_s"] == pytest.approx(500)
    assert first["lane/disk_read_busy_share"] == pytest.approx(0.25)
    second = rows.row(moment(1, 3.0, 130, 1.4, 4000, 6))
    assert second["live/decode_tok_per_s"] == pytest.approx(30)
    assert second["live/prefill_tok_per_s"] == 0
    assert second["link/disk_read_bytes_per_s"] == pytest.approx(3000)
    assert second["storage/read_bytes_per_s"] == pytest.approx(3000)
    assert second["lane/disk_read_busy_share"] == pytest.approx(0.9)
    assert (second["memory/cpu_used_bytes"], second["memory/cpu_planned_bytes"]) == (5, 9)


def test_a_new_generation_begins_anew_and_passes_go_on() -> None:
    """Counts of a generation begin with zero: the difference to the one before would be negative."""
    rows = LiveRows()
    rows.row(moment(1, 5.0, 500, 4.0, 9000, 10))
    row = rows.row(moment(2, 1.0, 60, 0.5, 800, 3))
    assert row["live/decode_tok_per_s"] == pytest.approx(60)
    assert row["link/disk_read_bytes_per_s"] == pytest.approx(800)
    assert (row["pass"], row["time_s"]) == (13, 11.0)


def test_a_step_that_took_longer_than_the_time_between_is_all_of_it() -> None:
    rows = LiveRows()
    rows.row(moment(1, 1.0, 0, 0.0, 0, 0))
    assert rows.row(moment(1, 2.0, 0, 2.0, 0, 1))["lane/disk_read_busy_share"] == 1.0


def test_a_system_without_a_job_has_phases_and_its_process() -> None:
    row = LiveRows().row(Moment("measure", 1, 1.0, 1.0, 8, 4))
    assert set(row) == {
        *("time_s", "generation", "stage", "live/prefill_tokens", "live/prefill_tok_per_s"),
        *("live/decode_tokens", "live/decode_tok_per_s"),
    }
