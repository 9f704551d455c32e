"""A calibration as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from flexgen_bench.calibrate.stable import Reading
from flexgen_bench.core.units import GB, format_bytes

Readings = Mapping[str, Reading]


def print_tables(readings: Readings, console: Console) -> None:
    """Products by rows, attention, and the rest. A star marks what was not stable."""
    tiers = [tier for tier in ("gpu", "cpu") if any(n.startswith(f"{tier}.") for n in readings)]
    for tier in tiers:
        console.print(
            _grid(f"{tier}: matrix products, GFLOP/s by rows", readings, f"{tier}.matrix.", ("format", "width"))
        )
        title = f"{tier}: torch's own matrix products, GFLOP/s by rows"
        of_torch = _grid(title, readings, f"{tier}.torch_matrix.", ("format", "width"))
        if of_torch.rows:
            console.print(of_torch)
        console.print(
            _grid(f"{tier}: prefill attention, GFLOP/s by tokens", readings, f"{tier}.prefill_attention.", ())
        )
        console.print(
            _grid(
                f"{tier}: decode attention, GB/s by query heads per KV head",
                readings,
                f"{tier}.decode_attention.",
                ("format",),
            )
        )
    console.print(_rest(readings))


def _grid(title: str, readings: Readings, prefix: str, labels: tuple[str, ...]) -> Table:
    """Lines by all parts of a name but the last, columns by that one, and the largest spread of each line."""
    lines: dict[tuple[str, ...], dict[int, Reading]] = {}
    for name, reading in readings.items():
        if name.startswith(prefix):
            *label, size = name.removeprefix(prefix).split(".")
            lines.setdefault(tuple(label), {})[int(size)] = reading
    columns = sorted({column for line in lines.values() for column in line})
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1))
    for head in (*labels, *map(str, columns), "spread"):
        table.add_column(head, justify="left" if head == "format" else "right", no_wrap=True)
    for line, cells in lines.items():
        shown = [_number(cells.get(column)) for column in columns]
        table.add_row(*line, *shown, _percent(cells.values()))
    return table


def _rest(readings: Readings) -> Table:
    table = Table(title="memory, links, steps", title_justify="left", box=box.SIMPLE, padding=(0, 1))
    for label in ("", "rate", "spread"):
        table.add_column(label, justify="left" if not label else "right", no_wrap=True)
    for name, reading in readings.items():
        if "matrix." in name or "_attention." in name:
            continue
        star = "" if reading.stable else "*"
        if name.endswith((".step", ".operator")):
            rate = f"{1e6 / reading.rate:.1f} us"
        elif ".attend" in name:
            rate = f"{1e6 * reading.seconds:.1f} us"
        else:
            rate = f"{reading.rate / GB:.2f} GB/s"
        table.add_row(_readable(name), rate + star, f"{reading.spread:.1%}")
    return table


def _readable(name: str) -> str:
    """``also.links.h2d.1048576`` -> ``links.h2d, 1.00 MiB``."""
    base, _, size = name.removeprefix("also.").rpartition(".")
    return f"{base}, {format_bytes(int(size))}" if size.isdigit() else name


def _number(reading: Reading | None) -> str:
    if reading is None:
        return ""
    return f"{reading.rate / GB:.3g}" + ("" if reading.stable else "*")


def _percent(readings: Iterable[Reading]) -> str:
    return f"{max(reading.spread for reading in readings):.1%}"
