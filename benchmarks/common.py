"""What the benchmarks share: options, bars and verdicts, the table that is printed and the file that is written."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.status import Evidence
from flexgen_bench.machine.environment import describe_environment

FULL_MODEL, QUICK_MODEL = "opt-1.3b", "opt-125m"


@dataclass(frozen=True)
class Options:
    """The command line. quick: a small model and one round, to see that everything works; nothing is judged.

    small_model: what a benchmark that needs many passes runs instead of the full model.
    """

    quick: bool
    rounds: int
    threads: int
    out: Path | None
    cache: Path
    small_model: str = ""

    @property
    def model(self) -> str:
        return QUICK_MODEL if self.quick else self.small_model or FULL_MODEL


def options(doc: str | None, rounds: int = 3, arguments: Sequence[str] | None = None) -> Options:
    """The options every benchmark takes. ``rounds``: how often each figure is taken, unless told otherwise."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, one round, no verdict")
    parser.add_argument("--rounds", type=int, default=None, help=f"default {rounds}")
    parser.add_argument("--threads", type=int, default=2, help="of the compute lane (default 2)")
    parser.add_argument("--out", type=Path, help="e.g. results/benchmarks/<name>.json")
    parser.add_argument("--cache", type=Path, default=default_cache_dir())
    given = parser.parse_args(arguments)
    return Options(given.quick, given.rounds or (1 if given.quick else rounds), given.threads, given.out, given.cache)


@dataclass(frozen=True)
class Bar:
    """One figure next to what it must reach.

    ratios: one per round, what is judged is their median. at_most: whether the ratio must stay below ``limit`` (else
    above). bound, achieved: the two quantities behind the ratio, as text with units.
    """

    what: str
    bound: str
    achieved: str
    ratios: tuple[float, ...]
    limit: float
    at_most: bool

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool:
        return self.ratio <= self.limit if self.at_most else self.ratio >= self.limit

    @property
    def spread(self) -> str:
        return f"{min(self.ratios):.2f}-{max(self.ratios):.2f}" if len(self.ratios) > 1 else "one round"


@dataclass
class Report:
    """What a benchmark found. rounds: raw figures; where_time_goes: lines for a bar that was missed."""

    name: str
    evidence: Evidence
    options: Options
    bars: list[Bar] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: list[Mapping[str, Any]] = field(default_factory=list)
    where_time_goes: list[str] = field(default_factory=list)

    def finish(self) -> int:
        """Print the table, write the file if one was asked for. Always 0: a missed bar is a finding, not a failure."""
        self._print()
        if self.options.out:
            self.options.out.parent.mkdir(parents=True, exist_ok=True)
            self.options.out.write_text(json.dumps(self._document(), indent=1) + "\n")
        return 0

    def _verdict(self, bar: Bar) -> str:
        if self.options.quick:
            return "not judged (quick)"
        return "met" if bar.met else "MISSED"

    def _print(self) -> None:
        header = ("", "bound", "achieved", "ratio", "rounds", "bar", "verdict")
        rows = [
            (
                bar.what,
                bar.bound,
                bar.achieved,
                f"{bar.ratio:.3f}",
                bar.spread,
                f"{'<=' if bar.at_most else '>='} {bar.limit:g}",
                self._verdict(bar),
            )
            for bar in self.bars
        ]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        print(f"\n{self.name} ({self.evidence.value}, {self.options.rounds} rounds, median judged)")
        for row in (header, *rows):
            print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))
        for line in self.where_time_goes:
            print(f"  {line}")

    def _document(self) -> dict[str, Any]:
        cache = self.options.cache
        return {
            "benchmark": self.name,
            "evidence": self.evidence.value,
            "command": f"python {' '.join(sys.argv)}",
            "model": self.options.model,
            "quick": self.options.quick,
            "threads": self.options.threads,
            "bars": [asdict(bar) | {"ratio": bar.ratio, "verdict": self._verdict(bar)} for bar in self.bars],
            "where_time_goes": self.where_time_goes,
            "settings": self.settings,
            "rounds": self.rounds,
            "environment": describe_environment(cache, Path(__file__).parent, dict(os.environ)),
        }


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
