"""Reads around the page cache: what arrives when, and what an error leaves behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.units import PAGE
from flexgen_bench.memory import direct_file
from flexgen_bench.memory.direct_file import DirectFile
from flexgen_bench.memory.host import allocate

SIZE = 37 * PAGE


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(direct_file, "CHUNK_BYTES", 4 * PAGE)
    found = os.urandom(SIZE)
    (tmp_path / "file").write_bytes(found)
    return found


@pytest.mark.parametrize("count", [PAGE, 4 * PAGE, 5 * PAGE, SIZE])
def test_what_has_arrived_is_told_in_order_and_is_there(data: bytes, count: int, tmp_path: Path) -> None:
    file, into = DirectFile(tmp_path / "file"), allocate(count)
    seen: list[int] = []

    def arrived(so_far: int) -> None:
        assert bytes(into[:so_far].numpy()) == data[:so_far]
        seen.append(so_far)

    file.read(0, into, arrived)
    file.close()
    assert seen == sorted(set(seen))
    assert seen[-1] == count


def test_a_file_that_ends_early_is_an_error(data: bytes, tmp_path: Path) -> None:
    file, into = DirectFile(tmp_path / "file"), allocate(SIZE)
    with pytest.raises(StoreError, match="too early"):
        file.read(4 * PAGE, into)
    file.close()


def test_an_error_in_the_middle_leaves_no_request_under_way(data: bytes, tmp_path: Path) -> None:
    """Requests that were still running used to write into memory that the caller had already reused."""
    file, into = DirectFile(tmp_path / "file"), allocate(SIZE)

    def refuse(so_far: int) -> None:
        raise ValueError("corrupt")

    with pytest.raises(ValueError, match="corrupt"):
        file.read(0, into, refuse)
    into.zero_()
    file.close()
    assert not into.any()
