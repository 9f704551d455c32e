"""Pictures of the rows, a function a picture, as documents of panels, series and points.

The form is that of docs/notes/pictures.md: numbers and words, no drawing. ``compact`` makes of any such document what
the page reads; a point then names its row, so that the page can filter it and open its cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flexgen_bench.core.units import GIB
from flexgen_bench.page.columns import latency_s
from flexgen_bench.page.gather import PageRow
from flexgen_bench.report.cells import heading

Losses = Mapping[str, Sequence[Mapping[str, Any]]]  # by run, as page.accuracy tells them
Json = dict[str, Any]
_SPEED: Json = {"title": "Generation throughput", "unit": "tok/s", "log": True, "better": "higher"}
_HOUR_S, _MILLION = 3600, 1e6
_NO_ROW = -1


def document(rows: Sequence[PageRow], losses: Losses) -> Json:
    """Every picture that these rows give, and for the others what is missing."""
    made = {
        "throughput-latency": _by_group(rows, latency),
        "memory": _by_group(rows, memory),
        "price": _by_group(rows, price),
        "accuracy-speed": accuracy_speed(rows, losses),
        "predicted-measured": predicted_measured(rows),
    }
    missing = {
        "throughput-latency": "No run has both a throughput and a batch size.",
        "memory": "No run was limited in host memory: python -m flexgen_bench model=... gpu.cpu_memory=4GiB",
        "price": "No record knows what its machine costs an hour (price_per_hour in conf/gpu).",
        "accuracy-speed": "No compressed run has an exact one beside it and records of accuracy: "
        "python -m flexgen_bench accuracy",
        "predicted-measured": "No run has a prediction.",
    }
    pictures = [{"name": name, **one} for name, several in made.items() for one in several]
    return {"pictures": pictures, "missing": {n: [missing[n]] for n, several in made.items() if not several}}


def latency(rows: Sequence[PageRow]) -> Json | None:
    """Throughput against latency, of comparable runs."""
    points = [_point(of, latency_s(of)) for of in rows]
    x = {"title": "Latency of a batch, first to last token", "unit": "s", "log": True, "better": "lower"}
    note = "A batch's latency is the time from its start to its last token, mean over batches and repetitions."
    return _picture("Throughput against latency", x, rows, points, note, front=True)


def memory(rows: Sequence[PageRow]) -> Json | None:
    """Throughput against the limit of host memory."""
    limits = [of.row.memory.host_limit for of in rows]
    points = [_point(of, None if not limit else limit / GIB) for of, limit in zip(rows, limits, strict=True)]
    x = {"title": "Limit of host memory", "unit": "GiB", "log": True, "better": "lower"}
    return _picture("Throughput against memory", x, rows, points, "The runs of a system are joined.", joined=True)


def price(rows: Sequence[PageRow]) -> Json | None:
    """Throughput against the price of generated tokens."""
    points = [_point(of, _usd_per_million(of)) for of in rows]
    x = {"title": "Price of a million generated tokens", "unit": "USD", "log": True, "better": "lower"}
    note = "The machine's price for the time that the tokens take, prompts included."
    return _picture("Price of tokens", x, rows, points, note, front=True)


def accuracy_speed(rows: Sequence[PageRow], losses: Losses) -> list[Json]:
    """Change of scores against speed over the same system's exact run, all models in one picture."""
    exact = _exact_speeds(rows)
    points: list[Json | None] = []
    for of in rows:
        base, speed = exact.get((of.row.group, of.row.system)), of.row.generation
        loss = next(iter(losses.get(of.row.stored.record.run_id, ())), None)
        known = base and speed is not None and loss is not None and None not in (loss["change"], loss["low"])
        points.append(None)
        if known and base and speed is not None and loss is not None:
            ends = [100 * loss["low"], 100 * loss["high"]]
            points[-1] = _told(of, speed.value / base, 100 * loss["change"], None, ends)
    x = {"title": "Speed over the exact run's", "unit": "times", "log": False, "better": "higher"}
    y = {"title": "Change of score", "unit": "points", "log": False, "better": "higher"}
    note = "Changes with their 95 % intervals; a system's speed over its own fastest exact run of the same work."
    made = _picture("Accuracy lost, speed gained", x, rows, points, note, y=y, facts={})
    return [made] if made else []


def predicted_measured(rows: Sequence[PageRow]) -> list[Json]:
    """What was predicted of runs against what they did."""
    points = [_point(of, of.row.predicted) for of in rows]
    x = {"title": "Predicted (SIMULATED)", "unit": "tok/s", "log": True, "better": ""}
    made = _picture("Predicted against measured", x, rows, points, "On the line both are the same.", facts={})
    if made is None:
        return []
    both = [v for p in points if p is not None for v in (p["x"], p["y"])]
    made["panels"][0]["guides"] = [{"label": "the same", "points": [[min(both)] * 2, [max(both)] * 2]}]
    return [made]


def compact(document: Json, rows: Sequence[PageRow]) -> Json:
    """The document with points as [row, x, y, x low, x high, y low, y high, label]: a tenth of the size."""
    places = {of.row.stored.record.run_id: place for place, of in reversed(list(enumerate(rows)))}

    def point(p: Mapping[str, Any]) -> list[Any]:
        ends = [*(p["x_range"] or (None, None)), *(p["y_range"] or (None, None))]
        place = places.get(p["run_id"], _NO_ROW)
        return [place, *map(_short, (p["x"], p["y"], *ends)), *([p["label"]] if p["label"] else [])]

    def failure(f: Mapping[str, Any]) -> list[Any]:
        return [places.get(f["run_id"], _NO_ROW), _short(f["x"]), f["status"], f["reason"]]

    pictures = [
        picture
        | {
            "panels": [
                panel
                | {
                    "series": [
                        one
                        | {"points": list(map(point, one["points"]))}
                        | {"failures": list(map(failure, one.get("failures", ())))}
                        for one in panel["series"]
                    ],
                    "guides": [g | {"points": [list(map(_short, at)) for at in g["points"]]} for g in panel["guides"]],
                }
                for panel in picture["panels"]
            ]
        }
        for picture in document["pictures"]
    ]
    return {"pictures": pictures, "missing": document["missing"]}


def _by_group(rows: Sequence[PageRow], make: Callable[[Sequence[PageRow]], Json | None]) -> list[Json]:
    """A picture for each group of comparable rows, those with most points first."""
    groups: dict[str, list[PageRow]] = {}
    for of in rows:
        groups.setdefault(of.row.group, []).append(of)
    made = [picture for members in groups.values() if (picture := make(members)) is not None]
    return sorted(made, key=lambda p: -sum(len(s["points"]) for s in p["panels"][0]["series"]))


def _picture(
    title: str,
    x: Json,
    rows: Sequence[PageRow],
    points: Sequence[Json | None],
    note: str,
    *,
    y: Json = _SPEED,
    joined: bool = False,
    front: bool = False,
    facts: Json | None = None,
) -> Json | None:
    """None where no row has a point."""
    series: dict[tuple[str, str], Json] = {}
    for of, point in zip(rows, points, strict=True):
        if point is not None:
            evidence = of.row.evidence.value
            words = {"label": of.row.label, "system": of.row.system, "lossy": of.row.lossy, "evidence": evidence}
            series.setdefault((of.row.label, evidence), words | {"joined": joined, "points": []})["points"].append(
                point
            )
    if not series:
        return None
    guides = [{"label": "front: no run is better in both", "points": list(_front(points))}] if front else []
    panel = {"title": "", "x": x, "y": y, "series": list(series.values()), "guides": guides}
    work = heading(rows[0].row)
    known = {"work": work} if facts is None else facts
    key = work if known else title
    return {"key": key, "title": title, "facts": known, "panels": [panel], "notes": [note]}


def _front(points: Sequence[Json | None]) -> Iterator[list[float]]:
    """The places that nobody beats in both axes, less being better of x and more of y."""
    best = -math.inf
    for x, y in sorted(((p["x"], p["y"]) for p in points if p is not None), key=lambda at: (at[0], -at[1])):
        if y > best:
            best = y
            yield [x, y]


def _point(of: PageRow, x: float | None) -> Json | None:
    """A row's throughput at ``x``, with its interval; None where one of them is not known."""
    speed = of.row.generation
    if x is None or not (math.isfinite(x) and x > 0) or speed is None or not speed.value > 0:
        return None
    return _told(of, x, speed.value, None, [speed.low, speed.high] if speed.n > 1 else None)


def _told(of: PageRow, x: float, y: float, x_range: list[float] | None, y_range: list[float] | None) -> Json:
    run = of.row.stored.record.run_id
    return {"x": x, "y": y, "x_range": x_range, "y_range": y_range, "label": "", "run_id": run}


def _usd_per_million(of: PageRow) -> float | None:
    hardware = of.row.stored.record.spec.get("hardware")
    rates = hardware.get("rates") if isinstance(hardware, Mapping) else None
    usd = rates.get("price_per_hour") if isinstance(rates, Mapping) else None
    speed = of.row.generation
    if not isinstance(usd, int | float) or isinstance(usd, bool) or speed is None or not speed.value > 0:
        return None
    return usd / _HOUR_S / speed.value * _MILLION


def _exact_speeds(rows: Sequence[PageRow]) -> dict[tuple[str, str], float]:
    """The fastest exact run of each comparable group and system, tok/s."""
    best: dict[tuple[str, str], float] = {}
    for of in rows:
        if of.row.generation is not None and not of.row.lossy:
            key = (of.row.group, of.row.system)
            best[key] = max(best.get(key, 0.0), of.row.generation.value)
    return best


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
