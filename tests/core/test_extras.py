"""What this package requires, and which part of it brings a module, installed or run from a checkout."""

from __future__ import annotations

from importlib import metadata

import pytest

from flexgen_bench.core import extras


def test_a_checkout_that_is_not_installed_knows_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records made on a machine where nothing can be installed once listed no versions at all."""

    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extras.metadata, "requires", missing)
    found = extras.requirements()
    assert found["torch"] is None
    assert found["hydra-core"] is None
    assert found["deepspeed"] == "baselines"
    assert "flexgen-bench[baselines]" in extras.how_to_install("deepspeed.ops")
