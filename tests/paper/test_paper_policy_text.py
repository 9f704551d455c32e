"""Policies as the paper prints them, read into options of the systems."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_bench.config.table import ConfiguredSystem, configured_systems
from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.paper.simulate import policy_options
from flexgen_bench.published.policy_text import parse_policy
from tests.support.paper_report import FOUR, PRINTED


def test_every_printed_policy_can_be_read() -> None:
    for row in PRINTED:
        policy = parse_policy(row.policy)
        if "bs=" in row.policy:
            assert policy.is_whole == ("pct=" in row.policy or "total batch" in row.policy)
            assert f"bs={policy.gpu_batch_size}x{policy.num_gpu_batches}" in row.policy
        if row.table == "T15":
            assert policy.block_size == row.number, "the printed block is the policy's"
        if row.table == "T9" and row.quantity == "sequences run":
            assert policy.block_size is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "bs=48x3; pct=20 80 0 100 0 100; cpu attention",
            {"percent": (20, 80, 0, 100, 0, 100), "cpu_attention": True, "block_size": 144},
        ),
        (
            "bs=32x8; pct=0 50 0 0 0 100; gpu attention; pin 0; overlap off",
            {"pin_weight": False, "overlap": False, "weights_on": "disk", "cpu_attention": False},
        ),
        ("bs=72x1; compress w+kv; overlap off in repo", {"lossy": Lossy(FOUR, FOUR), "overlap": False}),
        ("compress kv only; bs=16x20", {"lossy": Lossy(kv_cache=FOUR), "block_size": 320}),
        (
            "bs=40x1; pipeline 4x1; inner 4 [repo scripts, not confirmed]",
            {"stages": 4, "num_prompts": 160, "origin": "repo scripts, not confirmed"},
        ),
        ("bs=24x1; pipeline 4x1; comm gpu", {"num_prompts": 96, "remarks": ("comm gpu",)}),
        ("total batch 48; cpu offload", {"block_size": 48, "weights_on": "cpu", "is_whole": True}),
        ("bs=96x3; eval instances=850; 3 train trials", {"num_prompts": 2592}),
        ("bs=20x3; tested samples=189; executed=180", {"num_prompts": 180, "tested": 189}),
        ("effective batch=144", {"block_size": 144, "is_whole": False}),
        ("", {"is_whole": False, "remarks": (), "lossy": None, "overlap": None}),
        ("not found", {"is_whole": False, "remarks": ("not found",), "gpu_batch_size": None}),
    ],
)
def test_a_policy_text_means(text: str, expected: dict[str, Any]) -> None:
    policy = parse_policy(text)
    assert {name: getattr(policy, name) for name in expected} == expected


def test_words_that_a_whole_policy_leaves_out_have_a_meaning() -> None:
    whole = parse_policy("bs=48x3; pct=20 80 0 100 0 100").completed
    assert (whole.cpu_attention, whole.overlap, whole.pin_weight) == (False, True, True)
    assert whole.unsaid == ""


def test_what_no_text_says_is_not_told_to_a_system() -> None:
    """``bs=7x1`` alone became attention on the GPU, overlap on and page-locked weights, as if the paper had printed it;
    without any policy nothing was asked."""
    original = configured("flexgen_original")
    batch = parse_policy("bs=7x1")
    assert policy_options(batch, original) == {"gpu_batch_size": 7, "num_gpu_batches": 1}
    assert "in part" in batch.unsaid
    assert policy_options(parse_policy("not found"), original) == {}
    assert "no policy" in parse_policy("not found").unsaid
    assert policy_options(parse_policy("bs=5x1"), configured("accelerate")) == {"batch_size": 5}
    told = policy_options(parse_policy("bs=48x3; pct=20 80 0 100 0 100"), original)
    assert told["overlap"] is True
    assert told["cpu_cache_compute"] is False


def configured(name: str) -> ConfiguredSystem:
    return next(system for system in configured_systems() if system.name == name)


PARTS = {
    "cpu attention": ("cpu_attention", True),
    "overlap off": ("overlap", False),
    "pin 0": ("pin_weight", False),
    "compress w+kv": ("lossy", Lossy(FOUR, FOUR)),
    "pct=0 50 0 0 0 100": ("percent", (0, 50, 0, 0, 0, 100)),
    "inner 4": ("inner", 4),
    "some remark": ("remarks", ("some remark",)),
}


@given(
    st.integers(1, 999),
    st.integers(1, 99),
    st.lists(st.sampled_from(sorted(PARTS)), unique=True).flatmap(st.permutations),
    st.sampled_from([";", "; ", " ;  "]),
)
def test_parts_of_a_policy_mean_the_same_in_any_order(
    gpu_batch: int, batches: int, parts: list[str], separator: str
) -> None:
    policy = parse_policy(separator.join([f"bs={gpu_batch}x{batches}", *parts]))
    assert policy == parse_policy("; ".join([*reversed(parts), f"bs={gpu_batch}x{batches}"]))
    assert policy.block_size == gpu_batch * batches
    default = parse_policy("")
    for part, (name, value) in PARTS.items():
        assert getattr(policy, name) == (value if part in parts else getattr(default, name))


@pytest.mark.parametrize(
    "text",
    [
        "bs=48",
        "bs=0x3",
        "bs=4 x 3",
        "pct=1 2 3",
        "pct=a b c d e f",
        "pct=60 50 0 0 0 0",
        "overlap maybe",
        "pin 1x",
        "compress everything",
        "executed=none",
        "executed=0",
        "pipeline four",
        "inner -1",
        "bs=1x1; bs=2x2",
        "cpu attention; gpu attention",
    ],
)
def test_a_slip_in_a_policy_is_no_remark(text: str) -> None:
    with pytest.raises(UserError, match="policy"):
        parse_policy(text)


@given(st.text(max_size=40))
def test_any_other_text_is_kept_or_refused(text: str) -> None:
    try:
        policy = parse_policy(text)
    except UserError:
        return
    kept = "".join((*policy.remarks, policy.origin))
    if not policy.is_whole and policy == parse_policy("; ".join(policy.remarks)):
        assert all(word in kept for word in text.replace(";", " ").split() if word.isalpha())
