"""What the host does per layer never rises unnoticed, and the lean path that a GPU gets says what transformers says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import host_counts
import null_device

# Of a layer and micro-batch: steps, operators, kernels and Python calls at most, in prefill and in decode. Who lowers
# one lowers the limit.
LIMITS = {
    "resident": ((3, 47, 17, 165), (1, 20, 12, 40)),
    "resident, ragged prompts": ((3, 126, 29, 240), (1, 21, 12, 41)),
    "weights moved": ((3, 47, 17, 165), (1, 20, 12, 40)),
    "half of the weights moved": ((3, 47, 17, 165), (1, 20, 12, 42)),
    "KV moved": ((4, 51, 18, 183), (6, 121, 31, 363)),
    "half of the KV moved": ((4, 66, 20, 225), (7, 178, 45, 535)),
    "half of the KV, attended by the cpu": ((4, 66, 20, 225), (6, 167, 43, 494)),
    "4-bit weights": ((3, 47, 17, 165), (1, 20, 12, 40)),
    "4-bit KV": ((3, 170, 87, 335), (1, 17, 11, 40)),
}
LLAMA = ((3, 64, 26, 204), (1, 29, 19, 50))
WHAT = ("steps", "operators", "kernels", "calls")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host-cost")


def test_every_case_has_its_limits() -> None:
    assert set(LIMITS) == set(host_counts.CASES)


@pytest.mark.parametrize("case", LIMITS)
def test_no_layer_costs_more_than_it_did(case: str, folder: Path) -> None:
    found = host_counts.count(host_counts.CASES[case], host_counts.tiny_opt(), folder)
    check(found, LIMITS[case])


def test_no_layer_with_rotary_positions_costs_more_than_it_did(folder: Path) -> None:
    check(host_counts.count(host_counts.CASES["resident"], host_counts.tiny_llama(), folder), LLAMA)


def test_experts_apart_cost_a_step_and_no_operators(folder: Path) -> None:
    counts = [
        host_counts.count(host_counts.MIXTURES[f"mixture, {case}"], host_counts.tiny_mixture(), folder)["decode"]
        for case in ("resident", "experts moved")
    ]
    whole, apart = (one.per_layer for one in counts)
    assert (whole["steps"], apart["steps"]) == (1, 2)
    assert apart["operators"] <= whole["operators"] + 0.5
    assert apart["calls"] <= whole["calls"] + 12


def check(found: dict[str, host_counts.Counts], limits: tuple[tuple[int, ...], ...]) -> None:
    for phase, most in zip(("prefill", "decode"), limits, strict=True):
        counted = found[phase].per_layer
        over = {w: counted[w] for w, n in zip(WHAT, most, strict=True) if counted[w] > n + 0.05}
        assert not over, (phase, over, found[phase].names)


@pytest.mark.parametrize(("case", "bars"), [("resident", (25, 12, 40)), ("4-bit KV", (30, 14, 60))])
def test_a_lean_layer_stays_within_what_was_asked_for(case: str, bars: tuple[int, ...]) -> None:
    """It was 67 operators, 22 kernels and 313 Python calls; with 4 bits 284, 129 and 634."""
    assert all(most <= bar for most, bar in zip(LIMITS[case][1][1:], bars, strict=True))


def test_issuing_to_a_device_that_does_nothing_is_timed(folder: Path) -> None:
    """Of a case whose steps take turns between links, the accelerator and the cpu."""
    case = host_counts.CASES["half of the KV, attended by the cpu"]
    found = null_device.issue_time(case, folder)
    assert 0 < found.actions_us < found.lane_us
