"""Reports are the same bytes on every machine. Another processor adds in another order, so its figures differ in their
last digits: here all figures of all records are moved by as much."""

from __future__ import annotations

import gzip
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexgen_bench.accuracy.compare.statistics import on_grid, paired_difference, score
from flexgen_bench.cli.report import main
from flexgen_bench.config.table import ConfiguredSystem

ROOT = Path(__file__).resolve().parents[2]
# What was asked for, not what came out: a share of 0.5 is 0.5 on every machine.
ASKED = ("spec", "subject", "requested", "settings")
STEPS = 3


def moved(value: float, random_: random.Random) -> float:
    """A float64 up to ``STEPS`` units in the last place away; a sum of nothing is 0 everywhere."""
    end = random_.choice((-math.inf, math.inf))
    for _ in range(random_.randint(1, STEPS) if value else 0):
        value = float(np.nextafter(value, end))
    return value


def perturbed(data: Any, random_: random.Random) -> Any:
    """A document of JSON with every float moved, but for those that were asked for."""
    if isinstance(data, dict):
        return {k: v if k in ASKED else perturbed(v, random_) for k, v in data.items()}
    if isinstance(data, list):
        return [perturbed(value, random_) for value in data]
    return moved(data, random_) if isinstance(data, float) and math.isfinite(data) else data


def perturb(folder: Path, seed: int) -> int:
    """Every record below ``folder``, and the predictions that are kept there; how many files."""
    random_, count = random.Random(seed), 0
    for path in sorted(folder.rglob("*.json*")):
        zipped = path.suffix == ".gz"
        text = path.read_bytes()
        data = json.loads(gzip.decompress(text) if zipped else text)
        new = json.dumps(perturbed(data, random_)).encode()
        assert new != text
        path.write_bytes(gzip.compress(new) if zipped else new)
        count += 1
    return count


def pages(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert {Path(name).suffix for name in found} >= {".md", ".csv", ".tex", ".svg"}
    return found


@pytest.mark.parametrize("seed", [1])
def test_the_last_digits_of_figures_are_not_printed(
    seed: int, tmp_path: Path, fake_systems: list[ConfiguredSystem]
) -> None:
    """On another processor 65 lines of accuracy/tasks.csv differed in the 13th digit."""
    results = tmp_path / "results"
    shutil.copytree(ROOT / "results", results, ignore=shutil.ignore_patterns("predictions.json"))
    assert main([str(results), str(tmp_path / "one"), "--workers", "1"]) == 0
    kept = (results / "predictions.json").read_bytes()
    assert perturb(results, seed) > 100
    assert main([str(results), str(tmp_path / "two"), "--workers", "1"]) == 0
    assert (results / "predictions.json").read_bytes() != kept, "predictions were moved, too"
    one, two = pages(tmp_path / "one"), pages(tmp_path / "two")
    assert sorted(one) == sorted(two)
    for name, text in one.items():
        lines = zip(text.decode().splitlines(), two[name].decode().splitlines(), strict=True)
        assert [pair for pair in lines if pair[0] != pair[1]] == [], name


def addends(seed: int, n: int = 300) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    random_ = np.random.default_rng(seed)
    bytes_ = random_.integers(1, 200, n).astype(float)
    losses = random_.gamma(2.0, 30.0, (2, n))
    return np.stack([losses[0], bytes_], 1), np.stack([losses[1], bytes_], 1)


def in_reverse(table: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return table[::-1].copy()


@pytest.mark.parametrize("change", [in_reverse, np.asfortranarray], ids=["reversed", "by columns"])
def test_sums_of_items_do_not_depend_on_their_order(
    change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
) -> None:
    for seed in range(20):
        first, _ = addends(seed)
        assert score(first, "bits") == score(change(first), "bits")
        (grid,) = on_grid(first)
        assert grid.sum(0).tolist() == [math.fsum(column) for column in grid.T], "exact"


def test_items_that_are_alike_stay_alike() -> None:
    """Two runs of equal losses differ by nothing, whatever their last digits: their bootstrap is all zeros, and its p
    value 1."""
    random_ = random.Random(5)
    first, _ = addends(5)
    second = np.vectorize(lambda v: moved(v, random_))(first)
    assert (first != second).any()
    found = paired_difference(first, second, "bits")
    assert not found.draws.any()
    assert found.value == 0


def test_a_grid_changes_nothing_that_counts() -> None:
    for seed in range(5):
        first, second = addends(seed)
        found = paired_difference(first, second, "bits")
        plain = [math.fsum(t[:, 0]) / math.fsum(t[:, 1]) / math.log(2) for t in (first, second)]
        assert found.value == pytest.approx(plain[1] - plain[0], abs=1e-9)
    (ones,) = on_grid(np.array([[1 - 2.0**-53, 0.0], [1 + 2.0**-52, 5e-324], [0.25, 0.0]]))
    assert ones.tolist() == [[1, 0], [1, 0], [0.25, 0]]
