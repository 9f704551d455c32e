"""Texts written over what a name stands for: a file, a link to one, a device."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from flexgen_bench.cli.main import main
from flexgen_bench.core.errors import StoreError
from flexgen_bench.store.whole_file import write_text
from flexgen_bench.store.writer import write_record
from tests.support.record_factory import make_record


def test_a_link_stays_one_and_its_file_is_written(tmp_path: Path) -> None:
    """The command picture put a file in the place of the link that it was given."""
    for name in "ab":
        write_record(make_record(name), tmp_path / "results")
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target.svg", tmp_path / "link.svg"
    link.symlink_to(target)
    asked = ["picture", "throughput-latency", "--results", str(tmp_path / "results"), "-o", str(link)]
    for _ in range(2):  # a link to nothing, and to a file
        assert main(asked) == 0
        assert link.is_symlink()
        assert "</svg>" in target.read_text()
    assert os.listdir(target.parent) == [target.name]


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    """As root, a device would have become a file for everybody."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        found: list[str] = []
        reader = threading.Thread(target=lambda found=found: found.append(pipe.read_text()), daemon=True)
        reader.start()
        assert write_text(path, "text") == path
        reader.join(10)
        assert found == ["text"]
    assert pipe.is_fifo()
    assert link.is_symlink()


@pytest.mark.parametrize("refused", [PermissionError(13, "Permission denied"), OSError(16, "Device or resource busy")])
def test_a_file_where_no_other_may_be_made_is_overwritten(
    refused: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be written in a folder that may not, and may be mounted."""
    path = tmp_path / "page.md"
    path.write_text("before, and longer")

    def no_replacing(*_: object) -> None:
        raise refused

    monkeypatch.setattr(Path, "replace", no_replacing)
    write_text(path, "after")
    assert path.read_text() == "after"
    assert os.listdir(tmp_path) == [path.name]


def test_the_longest_name_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    assert write_text(path, "\ud800").read_text() == "\\ud800"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.md"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreError, match=r"No space left on device\. Make room"):
        write_text(path, "after", "Make room.")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == [path.name]
