"""Lanes and sites are values that know their device."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.tiers import Lane, LaneKind, Site, Tier

DEVICES = st.integers(0, 20)
VALUES = st.one_of(
    st.builds(Lane, st.sampled_from(LaneKind), DEVICES), st.builds(Site, st.sampled_from(list(Tier)), DEVICES)
)


@given(VALUES)
def test_a_value_is_one_object_however_it_is_come_by(value: Lane | Site) -> None:
    kind = type(value)
    assert kind.parse(str(value)) is value
    assert kind(value.kind, value.device) is value  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(value)) is value
    assert copy.deepcopy(value) is value
    assert {value: 1}[kind.parse(str(value))] == 1


def test_two_threads_get_the_same_object() -> None:
    start, made = threading.Barrier(4, timeout=20), []

    def make() -> None:
        start.wait()
        made.extend(Lane(LaneKind.H2D_WEIGHTS, device) for device in range(100, 200))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len({id(lane) for lane in made}) == len({str(lane) for lane in made}) == 100
    assert all(lane.link is Lane(LaneKind.H2D, lane.device) for lane in made)


def test_of_the_first_device_nothing_is_said() -> None:
    """Records, traces and predictions hold these names."""
    assert [str(lane) for lane in Site.GPU.lanes] == [
        "disk_read",
        "disk_write",
        "h2d",
        "h2d_weights",
        "d2h",
        "gpu",
        "cpu",
    ]
    assert [str(site) for site in (Site.GPU, Site.CPU, Site.DISK)] == ["gpu", "cpu", "disk"]
    assert str(Lane(LaneKind.H2D_WEIGHTS, 1)) == "h2d_weights:1"
    assert f"{Site(Tier.GPU, 12)}" == "gpu:12"


@pytest.mark.parametrize("text", ["", "gpu:", "gpu:0", "gpu:01", "gpu:-1", "gpu:a", "gpu:²", "gpu:1:1", "GPU", ":1"])
def test_what_is_no_lane_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="disk_read, disk_write, h2d") as error:
        Lane.parse(text)
    assert error.value.value == text
    with pytest.raises(UserError, match="gpu, cpu, disk"):
        Site.parse(text)


def test_a_device_has_a_number_and_a_value_does_not_change() -> None:
    with pytest.raises(ValueError, match="device = -1"):
        Lane(LaneKind.GPU, -1)
    with pytest.raises(AttributeError, match="a Site does not change"):
        Site.GPU.device = 1


def test_order_is_by_device_then_as_listed() -> None:
    second = Lane(LaneKind.DISK_READ, 1)
    assert sorted([second, Lane.CPU, Lane.GPU, Lane.DISK_READ]) == [Lane.DISK_READ, Lane.GPU, Lane.CPU, second]
    assert Site.GPU < Site.CPU <= Site.DISK < Site(Tier.GPU, 1)


def test_accelerators_of_a_machine_share_its_host() -> None:
    second, other_host = Site(Tier.GPU, 1), Site(Tier.CPU, 1)
    assert second.host is Site.GPU.host is Site.CPU
    assert set(second.lanes) & set(Site.GPU.lanes) == set(Site.CPU.lanes)
    assert not set(other_host.lanes) & set(Site.CPU.lanes)
    assert other_host.host is other_host
    assert second.lane is Lane(LaneKind.GPU, 1)
    assert second.cpu is Site.CPU.lane is Lane.CPU
    assert {str(lane) for lane in second.lanes if lane.of_accelerator} == {"gpu:1", "h2d:1", "h2d_weights:1", "d2h:1"}


def test_lanes_of_two_devices_share_no_link() -> None:
    second = Site(Tier.GPU, 1)
    assert second.h2d_weights.link is second.h2d is not Lane.H2D
    assert second.h2d.ends == Lane.H2D.ends == (Tier.CPU, Tier.GPU)
    assert [lane for lane in second.lanes if lane.computes] == [second.lane, Lane.CPU]
