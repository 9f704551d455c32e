"""Paths with signs that mean something to Hydra or to the shell: they are what they say, and what cannot be is told in
one line."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from flexgen_bench.accuracy.run.options import AccuracyConf
from flexgen_bench.cells.compose import composed, plan
from flexgen_bench.cells.words import check_groups, prepared
from flexgen_bench.cli.accuracy import main as accuracy
from flexgen_bench.config.overrides import is_text, quoted, readable, text_of
from flexgen_bench.config.paths import conf_dir
from flexgen_bench.config.schema import AppConf
from flexgen_bench.config.typed import app_conf
from flexgen_bench.core.errors import UserError
from tests.support.command import run_command

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "a=b",
    "a b",
    " a ",
    "a (copy)",
    "a#1",
    "a,b",
    "a{b}",
    "[a]",
    "a:b",
    "it's",
    'say "a"',
    "a$b",
    "100%",
    "back\\slash",
    "a\\",
    "größe",
    "モデル",
    "~a",
    "a;b&c|d",
    "a*?!`<>",
    "a\nb",
    "1e3",
    "0x10",
    "1_000",
    "true",
    "null (1)",
    "'",
    "'a",
    "str(5)",
    "a@b+c",
    "-m",
]


def read(word: str) -> object:
    """What becomes of a word for the command line's key ``location``: Hydra's parser, then OmegaConf's."""
    (ready,) = readable([word], AppConf)
    override = OverridesParser.create().parse_override(ready)
    conf = OmegaConf.merge(OmegaConf.structured(AppConf), {"location": override.value()})
    return conf.location


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_what_it_says(name: str) -> None:
    assert read(f"location=/data/{name}") == f"/data/{name}"
    assert read(f"location={name}/x") == f"{name}/x"


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\\\0$")))
def test_any_text_is_read_as_it_is(text: str) -> None:
    assert read(f"location={text}") == (None if text.strip().lower() == "null" else text)
    assert text_of(quoted(text)) == text


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("location='/a, b'", "/a, b"),
        ('location="/a=b"', "/a=b"),
        (r"location=/a\,b", "/a,b"),
        (r"location=/a\ \(b\)", "/a (b)"),
        ("location=null", None),
        ("location=", ""),
        (r"location=a\${b}", "${b}"),
    ],
)
def test_who_knows_hydra_is_understood(word: str, value: str | None) -> None:
    found = read(word)
    assert found == value or (value == "${b}" and found == "a${b}")


def test_interpolations_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/data (1)")
    assert read("location=${oc.env:PLACE}/a, b") == "/data (1)/a, b"


def test_what_is_text() -> None:
    text = ["location", "cache_dir", "results_dir", "dtype", "model.name", "model.locations.hub", "tracker.project"]
    other = [
        "model",
        "suite",
        "threads",
        "gpu.cpu_memory",
        "system.options.offload",
        "policy.weights.disk",
        "no.such",
        "location.x",
    ]
    assert [key for key in [*text, *other] if is_text(key, AppConf)] == text
    assert is_text("checkpoint", AccuracyConf)
    assert not is_text("mode", AccuracyConf)


def test_several_values_of_a_multirun(tmp_path: Path) -> None:
    there = tmp_path / "a, b"
    there.mkdir()
    words = ["-m", "model=opt-125m,opt-350m", "location=/a (1),/b#2", f"results_dir={there}"]
    assert prepared(words) == ["-m", "model=opt-125m,opt-350m", "location='/a (1)','/b#2'", f"results_dir='{there}'"]
    assert prepared(["location=/a,/b"]) == ["location='/a,/b'"], "one run has one value"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("threads=(2", """'threads="(2"'"""),
        ("gpu.cpu_memory=2 (GiB)", """'gpu.cpu_memory="2 (GiB)"'"""),
        ("lócation=3", "Did you mean 'location'?"),
        ("model=/data/x", "weights=path location=/data/x"),
        ("model=~/a (b)", "weights=path 'location=~/a (b)'"),
        ("modle=x y", "modle"),
    ],
)
def test_what_hydra_cannot_read_is_told_with_what_it_could(word: str, message: str) -> None:
    def composed_word() -> None:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed(prepared([word]))

    with pytest.raises(UserError) as error:
        composed_word()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    if "=" in message and message.startswith("'"):
        (corrected,) = shlex.split(message)
        assert prepared([corrected]) == [corrected]


def test_a_name_in_a_subfolder_is_still_a_choice() -> None:
    check_groups(["model=mine/small", "system=null", "model=choice(opt-125m,opt-350m)"])


@pytest.mark.parametrize("name", ["a=b, (copy) [1] {2: 3} #4", 'it\'s "é" ~ $x 100% !', "back\\slash\\", "1e3", "-m"])
def test_the_command_of_a_cell_is_pasted_into_a_shell(name: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    place = tmp_path / name
    place.mkdir()
    given = ["model=opt-125m", "system=transformers", "weights=path", f"location={place}", f"cache_dir={place}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        words = prepared(given)
        conf = app_conf(compose("config", overrides=words))
        (cell,) = plan(conf, words, "").cells
    assert cell.spec.model.location == str(place)
    answer = subprocess.run(
        ["bash", "-c", 'python() { printf "%s\\0" "$@"; }\n' + cell.command],
        capture_output=True,
        check=True,
        timeout=60,
    )
    pasted = answer.stdout.decode().split("\0")[:-1]
    assert pasted == shlex.split(cell.command)[1:]
    assert pasted[:2] == ["-m", "flexgen_bench"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        again = composed(prepared(pasted[2:]))
    assert (again.location, again.cache_dir, again.rerun) == (str(place), str(place), True)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command(folder, *arguments, FLEXGEN_BENCH_CACHE=str(folder / "cache"))


def test_a_records_command_makes_the_record_again(tmp_path: Path) -> None:
    """From the command line to the record and back through bash, in folders with every awkward sign."""
    results = tmp_path / "results = [of] \"1\", 'é' (copy) #2 {a: $b}"
    asked = ["model=opt-30b", "gpu=gpu16", "system=flexgen", f"results_dir={results}"]
    first = run(tmp_path, *asked)
    assert "no NVIDIA GPU here" in first.stdout + first.stderr, first.stderr
    (path,) = results.glob("*/*.json")
    command = json.loads(path.read_text())["rerun_command"]
    environment = os.environ | {"PYTHON": sys.executable, "FLEXGEN_BENCH_CACHE": str(tmp_path / "cache")}
    script = 'python() { "$PYTHON" "$@"; }\n' + command
    again = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    told = json.loads(again.stdout.strip().splitlines()[-1])
    assert told["records"] == [str(path)], again.stderr  # what cannot run here is recorded once
    assert list(tmp_path.glob("results*")) == [results]


WRONG = {
    "list": b"- a\n- b\n",
    "text": b"hello\n",
    "empty": b"",
    "bytes": b"\xff\xfe\x00",
    "open": b"a: [b\n",
    "twice": b"a: 1\na: 2\n",
    "unset": b"name: ${oc.env:NOT_SET_ANYWHERE}\n",
    "defaults": b"defaults:\n  - nothing\n",
}


@pytest.mark.parametrize(
    "arguments",
    [
        ["location=${oc.env:NOT_SET_ANYWHERE}"],
        ["workload.num_prompts=${nothing}"],
        ["dtype=${oc.env"],
        ["results_dir=${a.b.c}"],
        ["hydra.run.dir=${oc.env:NOT_SET_ANYWHERE}"],
        ["--config-name", "nothing"],
        ["--config-dir", "nothing"],
        ["policy.weihts.disk=1"],
        ["results_dir=~nobody-is-called-so/x"],
        [f"results_dir={'x' * 300}"],
        ["location.x=1"],
        ["~nothing"],
    ],
    ids=" ".join,
)
def test_no_traceback(arguments: list[str], tmp_path: Path) -> None:
    """``${oc.env:UNSET}`` gave a screenful of OmegaConf's internals."""
    answer = run(tmp_path, "model=opt-125m", "system=flexgen", "dry_run=true", *arguments)
    assert answer.returncode == 2, answer.stderr
    (line,) = answer.stderr.strip().splitlines()
    assert line.startswith("error: ")


def test_no_traceback_for_files_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "own = (1), é"
    (folder / "model").mkdir(parents=True)
    for name, text in WRONG.items():
        (folder / "model" / f"{name}.yaml").write_bytes(text)
    for name in WRONG:
        answer = run(tmp_path, "--config-dir", str(folder), f"model={name}", "system=flexgen", "dry_run=true")
        assert answer.returncode == 2, (name, answer.stderr)
        assert len(answer.stderr.strip().splitlines()) == 1, (name, answer.stderr)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model=/no such (x)/a=b, c", "checkpoint = '/no such (x)/a=b, c'"),
        ("results_dir=${oc.env:NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE"),
        ("tasks=a(b", """'tasks="a(b"'"""),
        ("mode=[w4", "mode = '[w4'"),
        ("cache_dir=~nobody-is-called-so", "home folder"),
        ("model='/no (x)'", "'/no (x)'"),
    ],
)
def test_accuracy_reads_the_same(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy([word, "dry_run=true"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "trace", "fetch", "calibrate"])
def test_other_commands_know_home_folders(command: str, tmp_path: Path) -> None:
    option = {"report": "--readme", "trace": "--out", "fetch": "--cache-dir", "calibrate": "--out"}
    answer = run(tmp_path, command, f"{option[command]}=~nobody-is-called-so/x")
    assert answer.returncode == 2
    assert "home folder" in answer.stderr
