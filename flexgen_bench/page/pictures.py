"""The points of each picture, a function a picture. A point belongs to a row, so that the page can filter it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.units import GIB
from flexgen_bench.page.columns import latency_s
from flexgen_bench.page.gather import PageRow


@dataclass(frozen=True)
class Axis:
    """What an axis counts. better: ``more`` or ``less``."""

    title: str
    log: bool = True
    better: str = "more"


@dataclass(frozen=True)
class Picture:
    """points: [row, x, y], and for a y with an interval [row, x, y, low, high]. joined: points of a system are
    connected. frontier: what nobody beats is marked. diagonal: where both axes agree. of_a_group: points of different
    workloads do not compare. empty: said where there is no point."""

    name: str
    title: str
    about: str
    x: Axis
    y: Axis
    empty: str
    joined: bool = False
    frontier: bool = False
    diagonal: bool = False
    of_a_group: bool = True
    points: list[list[float]] = field(default_factory=list)


SPEED = Axis("Generation, tok/s")
HOUR_S, MILLION = 3600, 1e6


def pareto(rows: Sequence[PageRow]) -> Picture:
    """Throughput against latency."""
    return Picture(
        "pareto",
        "Throughput against latency",
        "Each run by the tokens per second it generates and the seconds a batch takes from its start to its last token. "
        "A ring marks runs that no other run of the picture beats in both.",
        Axis("Latency of a batch, s", better="less"),
        SPEED,
        "No run here has both a throughput and a batch size.",
        frontier=True,
        points=_points(rows, latency_s),
    )


def ladder(rows: Sequence[PageRow]) -> Picture:
    """Throughput against memory."""
    return Picture(
        "ladder",
        "Throughput against memory",
        "Each run by its limit of host memory; the runs of a system are joined.",
        Axis("Limit of host memory, GiB", better="less"),
        SPEED,
        "No run here was limited in host memory.",
        joined=True,
        points=_points(rows, lambda r: None if not r.row.memory.host_limit else r.row.memory.host_limit / GIB),
    )


def price(rows: Sequence[PageRow]) -> Picture:
    """Throughput against price."""
    return Picture(
        "price",
        "Price of tokens",
        "The machine's price for the time that a million generated tokens take, prompts included.",
        Axis("USD for a million generated tokens", better="less"),
        SPEED,
        "No record here knows what its machine costs an hour (price_per_hour in conf/gpu).",
        frontier=True,
        points=_points(rows, _usd_per_million),
    )


def accuracy(rows: Sequence[PageRow], losses: Mapping[str, Sequence[Mapping[str, Any]]]) -> Picture:
    """Accuracy lost against speed gained. losses: by run, as ``page.accuracy`` tells them."""
    exact = _exact_speeds(rows)
    points: list[list[float]] = []
    for place, of in enumerate(rows):
        base, speed = exact.get((of.row.group, of.row.system)), of.row.generation
        for loss in losses.get(of.row.stored.record.run_id, ()):
            if base and speed is not None and None not in (loss["change"], loss["low"], loss["high"]):
                points.append([place, speed.value / base, *(100 * loss[k] for k in ("change", "low", "high"))])
    return Picture(
        "accuracy",
        "Accuracy lost, speed gained",
        "Compressed runs by their speed over the same system's exact one, and the mean change of scores with its 95 % "
        "interval.",
        Axis("Speed, times the exact run's", log=False),
        Axis("Change of score, points", log=False),
        "No compressed run here has both an exact one beside it and records of accuracy (flexgen-bench accuracy).",
        of_a_group=False,
        points=points,
    )


def predicted(rows: Sequence[PageRow]) -> Picture:
    """Predicted against measured."""
    return Picture(
        "predicted",
        "Predicted against measured",
        "What a model of the system said of each run (SIMULATED), and what it did. On the line both are the same.",
        Axis("Predicted, tok/s"),
        SPEED,
        "No run here has a prediction.",
        diagonal=True,
        of_a_group=False,
        points=_points(rows, lambda r: r.row.predicted),
    )


def pictures(rows: Sequence[PageRow], losses: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """All of them as JSON values, in the order of the page."""
    found = (pareto(rows), ladder(rows), price(rows), accuracy(rows, losses), predicted(rows))
    return [to_json(one) | {"points": [[_short(v) for v in point] for point in one.points]} for one in found]


def _points(rows: Sequence[PageRow], x_of: Callable[[PageRow], float | None]) -> list[list[float]]:
    """Of every row that has both, with the interval of its throughput."""
    points = []
    for place, of in enumerate(rows):
        x, speed = x_of(of), of.row.generation
        if x is not None and math.isfinite(x) and x > 0 and speed is not None and speed.value > 0:
            points.append([place, x, speed.value, speed.low, speed.high])
    return points


def _usd_per_million(of: PageRow) -> float | None:
    hardware = of.row.stored.record.spec.get("hardware")
    rates = hardware.get("rates") if isinstance(hardware, Mapping) else None
    usd = rates.get("price_per_hour") if isinstance(rates, Mapping) else None
    speed = of.row.generation
    if not isinstance(usd, int | float) or isinstance(usd, bool) or speed is None or not speed.value > 0:
        return None
    return usd / HOUR_S / speed.value * MILLION


def _exact_speeds(rows: Sequence[PageRow]) -> dict[tuple[str, str], float]:
    """The fastest exact run of each comparable group and system, tok/s."""
    best: dict[tuple[str, str], float] = {}
    for of in rows:
        if of.row.generation is not None and not of.row.lossy:
            key = (of.row.group, of.row.system)
            best[key] = max(best.get(key, 0.0), of.row.generation.value)
    return best


def _short(value: float) -> float:
    return float(f"{value:.6g}")
