"""All pictures that records suffice for, as files, with a page that shows them and says what the others lack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from flexgen_bench.pictures.draw import svg
from flexgen_bench.pictures.gallery import NAMES, Wanted, pictures
from flexgen_bench.pictures.gather import Material
from flexgen_bench.pictures.picture import Found, Picture
from flexgen_bench.report.page import problem_lines
from flexgen_bench.report.table import escape

FOLDER = "pictures"
Write = Callable[[Path, str], Path]


def build_pictures(material: Material, results_dir: Path, out: Path, write: Write) -> list[Path]:
    """``<key>.svg`` of every picture and ``index.md``; returns the paths. Raises CannotDraw where matplotlib is not
    installed."""
    found = {name: pictures(name, material, Wanted()) for name in NAMES}
    written = write_pictures([p for one in found.values() for p in one.pictures], out, write)
    return [*written, write(out / "index.md", _index(found, material, results_dir))]


def write_pictures(chosen: Sequence[Picture], out: Path, write: Write) -> list[Path]:
    """``<key>.svg`` of each. A system has one colour in all of them."""
    systems = systems_of(chosen)
    return [write(out / f"{picture.key}.svg", svg(picture, systems)) for picture in chosen]


def systems_of(chosen: Iterable[Picture]) -> list[str]:
    return sorted({one.system for picture in chosen for panel in picture.panels for one in panel.series})


def _index(found: Mapping[str, Found], material: Material, results_dir: Path) -> str:
    lines = [
        "# Pictures",
        "",
        "Made from the records alone by `python -m flexgen_bench report`; `python -m flexgen_bench picture` makes one "
        "of them, of other records or with other prices. What every lane did in a run: "
        "`python -m flexgen_bench trace`.",
        "",
    ]
    for name, one in found.items():
        lines += [f"## {name}", ""]
        for picture in one.pictures:
            lines += [f"![{escape(f'{picture.title}: {_words(picture)}')}]({picture.key}.svg)", ""]
        if one.missing:
            lines += ["Not made, for want of records:", "", *(f"- {escape(line)}" for line in one.missing), ""]
    return "\n".join([*lines, *problem_lines(material.problems, results_dir)]).rstrip() + "\n"


def _words(picture: Picture) -> str:
    return "; ".join(picture.facts.values())
