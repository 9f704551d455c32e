"""Throughput against price: what a million tokens cost, those that are read and those that are generated apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from flexgen_bench.core.digits import significant
from flexgen_bench.core.units import format_bytes
from flexgen_bench.pictures.facets import Facet, evidence_note, failure_words, grouped, not_shown, series_of
from flexgen_bench.pictures.gather import Material
from flexgen_bench.pictures.picture import Axis, Better, Found, Panel, Picture, Point, point
from flexgen_bench.pictures.run import Quantity, Run

NAME = "price"
MILLION, HOUR = 1e6, 3600
Y = Axis("generation throughput", "tokens/s", log=True, better=Better.HIGHER)
# Panel, its axis, and the seconds of a token.
_SIDES: tuple[tuple[str, str, Callable[[Run], Quantity | None]], ...] = (
    ("Input", "price of a million prompt tokens", lambda run: run.input_s),
    ("Output", "price of a million generated tokens", lambda run: run.output_s),
)


def price(material: Material) -> Found:
    """A picture for each model and workload, over all machines that have a price: each point says which."""
    pictures, missing = [], []
    # What a machine is differs on purpose; everything else is the same.
    anywhere = grouped(material.runs, lambda run: replace(run.setting, machine="", hardware="", threads=""))
    for setting, runs in anywhere.items():
        priced = [run for run in runs if run.price_per_hour is not None]
        names = ", ".join(sorted({run.hardware for run in runs if run.price_per_hour is None}))
        advice = f"nobody states what an hour of {names} costs: --price NAME=USD, or rates.price_per_hour in conf/gpu"
        facet = Facet(setting, "", tuple(priced or runs))
        what = f"{setting.model_words}; {setting.workload}"
        if not priced:
            missing.append(f"{what}: {advice}")
            continue
        several = len({_machine(run) for run in priced}) > 1
        panels = [_panel(priced, several, *side) for side in _SIDES]
        if not all(panel.series for panel in panels):
            missing.append(
                f"{what}: no run with a price tells prefill and decoding apart (phases overlap, or it has failed); "
                f"measure one with another policy: {priced[0].rerun_command}"
            )
            continue
        pictures.append(_picture(facet, panels, f"Not shown: {advice}." if names else ""))
    return Found(tuple(pictures), tuple(missing))


def _picture(facet: Facet, panels: Sequence[Panel], unpriced: str) -> Picture:
    machines = sorted({run.setting.machine_words for run in facet.runs})
    facts = facet.facts | {"machine": "; ".join(machines), "hardware": ", ".join(_prices(facet.runs))}
    series = [one for panel in panels for one in panel.series]

    def why(run: Run) -> str:
        apart = run.input_s is not None and run.output_s is not None
        return failure_words(run) or ("" if apart else "prefill and decoding are not told apart")

    notes = [
        "Input costs the price times the seconds of prefill for each prompt token, output the price times the seconds "
        "of decoding for each generated token; both together are the bill.",
        *evidence_note(series),
        *([unpriced] if unpriced else []),
        *not_shown(facet.runs, why),
    ]
    title = "Throughput against price"
    return Picture(NAME, facet.key(NAME), title, facts, panels, notes)


def _panel(
    runs: Sequence[Run], several: bool, title: str, axis: str, seconds: Callable[[Run], Quantity | None]
) -> Panel:
    def at(run: Run) -> Point | None:
        each, y = seconds(run), run.throughput
        if each is None or y is None or run.price_per_hour is None:
            return None
        x = each.times(run.price_per_hour / HOUR * MILLION)
        return point(x.value, y.value, run.batch_words, run.source, x_range=x.range, y_range=y.range)

    x = Axis(axis, "USD", log=True, better=Better.LOWER)
    return Panel(title, x, Y, series_of(runs, at, of=lambda run: _machine(run) if several else ""))


def _machine(run: Run) -> str:
    """The hardware, with what it is held to."""
    caps = (("host memory", run.cpu_cap), ("gpu memory", run.gpu_cap))
    return ", ".join([run.setting.hardware, *(f"{name} {format_bytes(cap)}" for name, cap in caps if cap)])


def _prices(runs: Sequence[Run]) -> list[str]:
    found = {(_machine(run), run.price_per_hour or 0.0, run.price_source) for run in runs}
    return [
        f"{name} at {significant(usd, 4)} USD an hour{f' ({source})' if source else ''}"
        for name, usd, source in sorted(found)
    ]
