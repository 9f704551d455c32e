"""Throughput against latency: what each system, batch and compression gives, and the front of those that nothing
beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexgen_bench.core.status import Evidence
from flexgen_bench.pictures.facets import Facet, evidence_note, facets, failure_words, not_shown, series_of
from flexgen_bench.pictures.front import front
from flexgen_bench.pictures.gather import Material
from flexgen_bench.pictures.picture import Axis, Better, Found, Guide, Panel, Picture, Point, Series, point
from flexgen_bench.pictures.run import Quantity, Run


@dataclass(frozen=True)
class Latency:
    """One of several latencies. name: of the picture."""

    name: str
    title: str
    axis: str
    of: Callable[[Run], Quantity | None]
    unknown: str


LATENCIES = (
    Latency(
        "throughput-latency",
        "Throughput against the time of a batch",
        "from a batch's start to its last token, mean",
        lambda run: run.block_s,
        "its batch size is not known",
    ),
    Latency(
        "throughput-first-token",
        "Throughput against the time to the first token",
        "time to the first token, mean over batches",
        lambda run: run.first_token_s,
        "it tells no time to the first token (phases overlap, or its batch size is not known)",
    ),
    Latency(
        "throughput-later-token",
        "Throughput against the time of a token",
        "time of each later token of a prompt, mean",
        lambda run: run.later_token_s,
        "it tells no time of later tokens (phases overlap, or its batch size is not known)",
    ),
)
Y = Axis("generation throughput", "tokens/s", log=True, better=Better.HIGHER)


def throughput_latency(material: Material, latency: Latency) -> Found:
    """A picture for each setting with two points or more."""
    pictures, missing = [], []
    for facet in facets(material.runs):
        series = series_of(facet.runs, lambda run: _point(run, latency))
        count = sum(len(one.points) for one in series)
        if count >= 2:
            pictures.append(_picture(facet, series, latency))
        else:
            what = "one run tells" if count else "no run tells"
            missing.append(
                f"{facet.words}: {what} both throughput and latency, of {len(facet.runs)}; measure other systems, or "
                f"other batch sizes (measure.batch_sizes=[4]): {facet.runs[0].rerun_command}"
            )
    return Found(tuple(pictures), tuple(missing))


def _point(run: Run, latency: Latency) -> Point | None:
    x, y = latency.of(run), run.throughput
    if x is None or y is None:
        return None
    return point(x.value, y.value, run.batch_words, run.source, x_range=x.range, y_range=y.range)


def _picture(facet: Facet, series: Sequence[Series], latency: Latency) -> Picture:
    guides = [guide for kind in Evidence for guide in _fronts([s for s in series if s.evidence is kind], kind)]
    panel = Panel("", Axis(latency.axis, "s", log=True, better=Better.LOWER), Y, series, guides)

    def why(run: Run) -> str:
        return failure_words(run) or (latency.unknown if _point(run, latency) is None else "")

    notes = [*evidence_note(series), *not_shown(facet.runs, why)]
    return Picture(latency.name, facet.key(latency.name), latency.title, facet.facts, (panel,), notes)


def _fronts(series: Sequence[Series], kind: Evidence) -> list[Guide]:
    """Of exact results; and of all, where compressed ones reach further. Kinds of evidence do not compete."""
    exact = front(p for one in series if not one.lossy for p in one.points)
    every = front(p for one in series for p in one.points)
    lines = [(f"front of exact results, {kind.value}", exact)]
    if every != exact:
        lines.append((f"front with compressed ones, {kind.value}", every))
    return [Guide(label, tuple((p.x, p.y) for p in points), stepped=True) for label, points in lines if len(points) > 1]
