"""SVG of pictures, and the command that writes it."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_bench.cli.main import main
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.pictures.draw import CannotDraw, svg
from flexgen_bench.pictures.picture import Axis, Better, Failure, Guide, Panel, Picture, Series, Source, point
from flexgen_bench.pictures.style import COLOURS, styles_of
from flexgen_bench.store.writer import write_record
from tests.support.record_factory import make_record

HREF = "{http://www.w3.org/1999/xlink}href"
SOURCE = Source("run", "hash", "default/a.json")


def series(system: str, lossy: str, evidence: Evidence, y: float) -> Series:
    made = [point(x, y * x, f"batch {x}", SOURCE, x_range=(0.9 * x, 1.1 * x), y_range=None) for x in (1, 2, 40)]
    failed = (Failure(2.0, Status.OOM.value, "too large", SOURCE),)
    return Series(system, lossy, evidence, tuple(made), True, failed)


def picture(*shown: Series, log: bool = True) -> Picture:
    x, y = Axis("time", "s", log, Better.LOWER), Axis("speed & <more>", "tokens/s", log, Better.HIGHER)
    guides = (Guide("the front", ((1, 1), (2, 2))), Guide("here", ((1, 1),)))
    facts = {"machine": "Some CPU", "hardware": "cpu", "model": "tiny", "workload": "8-4"}
    panels = (Panel("one", x, y, shown, guides), Panel("two", x, y, shown[:1]))
    return Picture("memory", "memory--tiny", "Speed against time", facts, panels, ("A note. " * 30,))


def texts(drawn: str) -> list[str]:
    """What can be read in a picture, in order."""
    return ["".join(e.itertext()).strip() for e in ET.fromstring(drawn).iter() if e.tag.endswith("}text")]


EVERY = [series("a", "", kind, 1 + i) for i, kind in enumerate(Evidence)]


@pytest.mark.parametrize("log", [True, False])
def test_the_same_picture_is_the_same_bytes_and_says_everything(log: bool) -> None:
    shown = picture(*EVERY, series("b", "4-bit weights", Evidence.MEASURED, 9), log=log)
    drawn = svg(shown)
    assert drawn == svg(shown)
    read = texts(drawn)
    for kind in Evidence:
        assert f"a: {kind.value}" in read, "evidence in words"
    assert {"b (4-bit weights): MEASURED", "the front", "here", "one", "two"} <= set(read)
    assert "speed & <more> (tokens/s) → better" in read
    whole = " ".join(read)
    for fact in shown.facts.values():
        assert fact in whole
    assert "20" not in (ET.fromstring(drawn).findtext(".//{*}date") or ""), "no date"
    assert read.count("×") == 7, "a failure of each series in each panel"


def test_kinds_of_evidence_are_told_apart_without_colour() -> None:
    """Every kind fills its marker in another way."""
    forms = set()
    for one in EVERY:
        root = ET.fromstring(svg(picture(one)))
        shapes = {e.get("id"): e.get("d") for e in root.iterfind(".//{*}defs/{*}path")}
        uses = [e for e in root.iter() if e.tag.endswith("}use")]
        forms.add(frozenset((shapes[e.get(HREF, "")[1:]], e.get("style")) for e in uses))
    assert len(forms) == len(Evidence)


def test_one_point_and_none_at_all_are_drawn() -> None:
    """A ladder on which nobody got anywhere has crosses alone."""
    one = Series("a", "", Evidence.MEASURED, (point(3, 5, "", SOURCE, x_range=None, y_range=None),))
    dead = Series("b", "", Evidence.MEASURED, (), failures=(Failure(50.0, "oom", "", SOURCE),))
    assert "a: MEASURED" in texts(svg(picture(one)))
    assert "b: MEASURED" in texts(svg(picture(dead, log=False)))


def test_texts_from_anywhere_are_drawn() -> None:
    """Dollars are no formulas, and what XML cannot hold does not end the drawing."""
    strange = "a $x_{$ 模型 <b>&amp;\x1b[0m\ud800"
    one = Series(strange, strange, Evidence.MEASURED, (point(3, 5, strange, SOURCE, x_range=None, y_range=None),))
    shown = replace(picture(one), title=strange, facts=dict.fromkeys(picture().facts, strange), notes=(strange,))
    read = texts(svg(shown))
    assert "a $x_{$ 模型 <b>&amp; [0m" in read


def test_more_systems_than_colours_are_told_apart() -> None:
    many = [Series(f"s{i}", lossy, kind, ()) for i in range(9) for lossy in ("", "4-bit") for kind in Evidence]
    assert len(set(styles_of(many, ()).values())) == len(many)
    first, *_ = styles_of(many[:1], ["another", "s0"]).values()
    assert first.colour == COLOURS[1], "as in the other pictures"


def test_without_matplotlib_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CannotDraw, match="Install it with: pip install"):
        svg(picture(*EVERY))


class TestCommand:
    @pytest.fixture
    def results(self, tmp_path: Path) -> str:
        for name in "ab":
            write_record(make_record(name), tmp_path / "results")
        return str(tmp_path / "results")

    def test_one_picture_into_a_file(self, results: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "new" / "out.svg"
        assert main(["picture", "throughput-latency", "--results", results, "-o", str(out)]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        assert "a: MEASURED" in texts(out.read_text())

    def test_all_as_json_and_what_is_missing(
        self, results: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out.json"
        assert main(["picture", "all", "--results", results, "--price", "cpu=0.5", "-o", str(out)]) == 0
        names = [one["name"] for one in json.loads(out.read_text())]
        assert names == ["throughput-latency", "throughput-first-token", "throughput-later-token", "price"]
        said = capsys.readouterr().err
        assert said.count("missing: ") == 2

    @pytest.mark.parametrize(
        ("arguments", "status", "said"),
        [
            (["memory"], 1, "missing: Some CPU"),
            (["memori"], 2, "Did you mean 'memory'?"),
            (["all", "-o", "x.svg"], 2, "a folder, since there are 3 pictures"),
            (["throughput-latency", "-o", "x.png"], 2, "a folder, or a file that ends with .svg or .json"),
            (["price", "--price", "cpu"], 2, "US dollars per hour"),
            (["memory", "--model", "tini"], 2, "Did you mean 'tiny'?"),
            (["memory", "--predictions", "absent"], 2, "a readable file"),
            (["lanes", "run0"], 2, "the beginning of one hash only"),
        ],
    )
    def test_bad_input(
        self, arguments: list[str], status: int, said: str, results: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["picture", *arguments, "--results", results]) == status
        assert said in capsys.readouterr().err

    def test_predictions_of_another_machine(self, results: str, tmp_path: Path) -> None:
        """A file as json=true prints it, below the tables for people."""
        row = {
            "evidence": "SIMULATED",
            "system": "a",
            "lossy": "",
            "model": "tiny",
            "dtype": "float16",
            "hardware": "t4",
            "capacity_bytes_by_tier": {"gpu": 2**30, "cpu": None, "disk": None},
            "price_per_hour": 3.6,
            "weight_bytes": 2**31,
            "workload": "8-4",
            "prompt_len": 8,
            "gen_len": 4,
            "prompts_asked_for": 4,
            "spec_hash": "h",
            "status": "ok",
            "reason": "",
            "num_prompts": 4,
            "batch_size": 2,
            "tok_per_s": 4.0,
            "prefill_s": 1.0,
            "decode_s": 3.0,
            "block_latency_s": 2.0,
        }
        quick = row | {"system": "b", "tok_per_s": 8.0, "capacity_bytes_by_tier": {"gpu": 2**31, "cpu": None}}
        file = tmp_path / "t4.json"
        file.write_text("a table\n" + json.dumps({"records": [], "simulated": [row, quick]}) + "\n")
        out = tmp_path / "out.json"
        words = ["price", "memory", "--machine", "t4", "--predictions", str(file), "--results", results]
        assert main(["picture", *words, "-o", str(out)]) == 0
        cost, ladder = json.loads(out.read_text())
        a, _ = cost["panels"][0]["series"]
        assert (a["evidence"], a["points"][0]["x"]) == ("SIMULATED", pytest.approx(1.0 * 0.001 / 32 * 1e6))
        assert [s["points"][0]["x"] for s in ladder["panels"][0]["series"]] == [50, 100]
        assert cost["facts"]["machine"] == "t4, from stated constants"
