"""A tiny model with a store to damage, and engines that must leave nothing behind. Used by the tests of failures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_bench.core.errors import UserError
from flexgen_bench.engine.engine import Engine
from tests.support.failing_hardware import RIGS, Leftovers, Tiny


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(shared: Tiny, tmp_path: Path) -> Tiny:
    return shared.own_store(tmp_path)


@pytest.fixture
def offload(tmp_path: Path) -> Path:
    folder = tmp_path / "offload"
    folder.mkdir()
    return folder


@pytest.fixture(params=RIGS)
def engine(request: pytest.FixtureRequest, tiny: Tiny, offload: Path) -> Iterator[Engine]:
    """An open engine; closing it must leave nothing, whatever a test has done to it."""
    before = Leftovers(offload)
    made = tiny.engine(request.param, offload)
    yield made
    made.close()
    made.close()  # a second time does nothing
    before.check()
    with pytest.raises(UserError, match="must be open"):
        made.generate(tiny.sequences())
