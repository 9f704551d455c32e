"""``python -m flexgen_bench picture NAME``: pictures made from records, as SVG or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flexgen_bench.cli.ending import FAILED, status_of
from flexgen_bench.core.errors import StoreError, UserError, unknown_choice
from flexgen_bench.core.folders import make_writable, path_argument
from flexgen_bench.pictures.build import systems_of
from flexgen_bench.pictures.draw import svg
from flexgen_bench.pictures.gallery import NAMES, Wanted, picture_json, pictures
from flexgen_bench.pictures.gather import gather
from flexgen_bench.pictures.picture import Picture
from flexgen_bench.store.whole_file import write_text
from flexgen_bench.trace.chart import chart
from flexgen_bench.trace.runs import LATEST, find_run

LANES, ALL = "lanes", "all"
FORMATS = (".svg", ".json")


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where the records suffice for none of the pictures; 2 for bad input. What is missing stands on standard
    error."""
    options = _parser().parse_args(arguments)
    return status_of(lambda: _main(options), (StoreError,))


def _main(options: argparse.Namespace) -> int:
    if options.out.suffix not in ("", *FORMATS) and not options.out.is_dir():
        raise UserError("-o", str(options.out), "a folder, or a file that ends with .svg or .json")
    first, *rest = options.names
    if first == LANES:
        run = find_run(rest[0] if rest else LATEST, options.results)
        print(write_text(_file(options.out, f"lanes--{run.path.stem}"), chart(run)))
        return 0
    names = NAMES if options.names == [ALL] else tuple(options.names)
    for name in names:
        if name not in NAMES:
            raise unknown_choice("picture", name, (*NAMES, LANES, ALL))
    everything = gather(options.results, options.predictions, dict(map(_price, options.price)))
    wanted = Wanted(options.machine, options.model, options.workload, options.system)
    found = [pictures(name, everything, wanted) for name in names]
    for one in found:
        for line in one.missing:
            print(f"missing: {line}", file=sys.stderr)
    for problem in everything.problems:
        print(f"not used: {problem.message}", file=sys.stderr)
    made = [picture for one in found for picture in one.pictures]
    for path in _written(made, options.out):
        print(path)
    return 0 if made else FAILED


def _written(made: Sequence[Picture], out: Path) -> list[Path]:
    """Into a file if ``out`` is one: of a format, which for SVG holds one picture; else one file each in the folder."""
    if out.suffix == ".json":
        return [write_text(out, json.dumps([picture_json(one) for one in made], indent=1, allow_nan=False) + "\n")]
    if out.suffix == ".svg" and len(made) > 1:
        names = "\n  ".join(f"{one.name}: {'; '.join(one.facts.values())}" for one in made)
        raise UserError(
            "-o",
            str(out),
            f"a folder, since there are {len(made)} pictures",
            f"Or ask for one with --machine, --model, --workload:\n  {names}",
        )
    systems = systems_of(made)
    return [write_text(_file(out, one.key), svg(one, systems)) for one in made]


def _file(out: Path, name: str) -> Path:
    return out if out.suffix == ".svg" else make_writable(out, "-o") / f"{name}.svg"


def _price(text: str) -> tuple[str, float]:
    name, _, usd = text.partition("=")
    try:
        value = float(usd)
    except ValueError:
        value = 0.0
    if not name or not 0 < value < 1e4:
        raise UserError("--price", text, "a hardware's name and US dollars per hour, above 0: t4=0.35")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexgen-bench picture",
        description="Draw what records say. One picture for each machine, model and workload: these are never mixed.",
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(NAMES)}; {ALL}: all of these; or {LANES}, followed by a run as for the command trace",
    )
    parser.add_argument(
        "-o", "--out", type=path_argument, default=Path("pictures"), help="a folder, or a file .svg or .json"
    )
    parser.add_argument("--results", type=path_argument, default=Path("results"), help="folder of records")
    parser.add_argument("--machine", default="", help="of these machines alone: part of a name, or the hardware's")
    parser.add_argument("--model", default="", help="of this model alone")
    parser.add_argument("--workload", default="", help="of this workload alone")
    parser.add_argument("--system", default="", help="of this system alone")
    parser.add_argument(
        "--price",
        action="append",
        default=[],
        metavar="NAME=USD",
        help="what an hour of a hardware costs, where its records do not say it, or otherwise; may be repeated",
    )
    parser.add_argument(
        "--predictions",
        action="append",
        default=[],
        type=path_argument,
        metavar="FILE",
        help="also what is predicted: the output of python -m flexgen_bench ... json=true; may be repeated",
    )
    return parser
