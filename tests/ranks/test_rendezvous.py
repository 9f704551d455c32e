"""Rank 0's door: who is let in, and what others can read of the key."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.ranks.rendezvous import LOOPBACK, SECRET, Door, Meeting, go_in


def in_store(meeting: Meeting) -> str:
    return meeting.store.get("control").decode() if meeting.store.check(["control"]) else ""


@pytest.fixture
def meeting() -> Meeting:
    return Meeting(HashStore(), LOOPBACK, 0, LOOPBACK)


def let_in(door: Door, meeting: Meeting, rank: int, way: str | None = None) -> int | None:
    """The rank that has come in, if it has."""
    with ThreadPoolExecutor(1) as pool:
        comes = pool.submit(go_in, meeting, rank, way)
        came = door.next(30)
        try:
            control = comes.result(30)
        except CannotRun:
            assert came is None
            return None
        if came is None:  # sent away after its number
            with pytest.raises((EOFError, OSError)):
                control.recv()
            return None
        came.send({"any": "thing"})
        assert control.recv() == {"any": "thing"}
        return came.rank


def test_ranks_of_this_machine_come_in_by_a_way_that_nobody_else_is_told(meeting: Meeting) -> None:
    """The key once lay in a store that every user of the machine could read."""
    door = Door(meeting, 3, is_open=False)
    port, key = door.way.split(" ")
    assert in_store(meeting) == ""
    assert let_in(door, meeting, 1, f"{port} {key[:-2]}{'00' if key[-2:] != '00' else '11'}") is None
    assert [let_in(door, meeting, rank, door.way) for rank in (2, 2, 0, 3, 1)] == [2, None, None, None, 1]
    door.close()


def test_a_secret_of_all_ranks_keeps_the_key_out_of_the_store(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET, "long and random")
    door = Door(meeting, 2, is_open=True)
    assert in_store(meeting) == door.way.split(" ")[0]
    monkeypatch.setenv(SECRET, "another")
    assert let_in(door, meeting, 1) is None
    monkeypatch.delenv(SECRET)
    with pytest.raises(UserError, match="set on rank 0, not here"):
        go_in(meeting, 1)
    monkeypatch.setenv(SECRET, "long and random")
    assert let_in(door, meeting, 1) == 1
    door.close()


def test_without_a_secret_ranks_of_torchrun_find_the_key_in_the_store(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    door = Door(meeting, 2, is_open=True)
    assert in_store(meeting) == door.way
    monkeypatch.setenv(SECRET, "of this rank alone")
    with pytest.raises(UserError, match="set here, not on rank 0"):
        go_in(meeting, 1)
    monkeypatch.delenv(SECRET)
    assert let_in(door, meeting, 1) == 1
    door.close()
