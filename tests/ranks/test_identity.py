"""Ranks that differ are named, and an error keeps what it is on its way to rank 0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_bench.core.errors import CannotRun, DoesNotFit, NotFinite, OutOfMemory, RankLost, StoreError, UserError
from flexgen_bench.core.model import DType
from flexgen_bench.core.status import Status
from flexgen_bench.ranks.commands import Failed
from flexgen_bench.ranks.identity import Hello, check_alike, hello
from tests.support.tiny_models import random_model, save


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Hello:
    return hello(0, save(random_model("opt"), tmp_path_factory.mktemp("own")), DType.FLOAT32, None)


def other(own: Hello, **changes: str) -> Hello:
    return replace(own, rank=2, host="node2", identity=replace(own.identity, **changes))


def test_equal_ranks_pass(own: Hello) -> None:
    check_alike(own, {1: other(own), 2: other(own)})


@pytest.mark.parametrize("name", ["flexgen_bench", "code", "torch", "python", "model", "dtype", "compression"])
def test_a_difference_is_named_with_its_rank_and_machine(own: Hello, name: str) -> None:
    with pytest.raises(UserError) as raised:
        check_alike(own, {1: other(own), 2: other(own, **{name: "another"})})
    assert f"rank 2 (node2) has {name} 'another'" in str(raised.value)
    assert f"{name} {getattr(own.identity, name)!r}" in str(raised.value)
    assert "rank 1" not in str(raised.value)


@pytest.mark.parametrize(("name", "value"), [("device", "another"), ("threads", 99)])
def test_ranks_that_share_layers_compute_on_alike_machines(own: Hello, name: str, value: str | int) -> None:
    """Each chooses the tokens for itself: of two kinds of devices they could differ, and the ranks would go apart."""
    unlike = replace(own, rank=1, host="node2", **{name: value})  # type: ignore[arg-type]
    check_alike(own, {1: unlike})
    check_alike(own, {1: replace(own, rank=1)}, shared=True)
    with pytest.raises(UserError, match=rf"rank 1 \(node2\) has {name} {value!r}.* all like rank 0 .*: {name} "):
        check_alike(own, {1: unlike}, shared=True)


def test_another_model_is_another_identity(own: Hello, tmp_path: Path) -> None:
    folder = save(random_model("opt-no-bias"), tmp_path / "other")
    with pytest.raises(UserError, match="has model"):
        check_alike(own, {1: hello(1, folder, DType.FLOAT32, None)})


@pytest.mark.parametrize(
    "error",
    [
        UserError("policy.prefetch", 3, "at most 2", "Lower it."),
        DoesNotFit("cpu", 5, 3, "weights 5", "Use less."),
        StoreError("damaged"),
        CannotRun("no CUDA", Status.UNAVAILABLE),
        OutOfMemory("gpu", "step compute", "cause", "free it."),
        NotFinite(3, "hidden states"),
    ],
)
def test_an_error_of_ours_is_raised_as_what_it_is_and_says_which_rank(error: Exception) -> None:
    """Errors made from several fields cannot be pickled as they are: what rank 0 once got was a TypeError."""
    came = Failed.of(3, error).error()
    assert (type(came), str(came)) == (type(error), str(error))
    assert vars(error).items() <= vars(came).items()
    assert came.__notes__ == ["on rank 3"]


def test_any_other_error_is_told_as_text() -> None:
    came = Failed.of(1, ZeroDivisionError("division by zero")).error()
    assert isinstance(came, RankLost)
    assert came.rank == 1
    assert "ZeroDivisionError: division by zero" in str(came)
