"""``flexgen-bench compare`` as it is used: folders, records, commits, and cells measured again."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_bench.cli.compare import main
from flexgen_bench.store.writer import to_bytes, write_record
from tests.support.record_factory import make_record


def write(folder: Path, *times: tuple[float, float], system: str = "flexgen", run: int = 0) -> Path:
    return write_record(make_record(system, times=times, run=run), folder)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, (1, 3.0), (1, 3.01), (1, 3.02))
    write(b, (1, 1.0), (1, 1.01), (1, 1.02), run=1)
    write(a, (1, 3.0), (1, 3.01), system="accelerate", run=2)
    return a, b


def test_folders_in_words_and_as_a_status(sides: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    a, b = map(str, sides)
    assert main([a, b]) == 0
    text = capsys.readouterr().out
    assert "better: default: flexgen, tiny, 8-4, bfloat16, cpu" in text
    assert "only in A: default: accelerate" in text
    assert main([b, a]) == 1
    assert "1 worse" in capsys.readouterr().out


def test_json_holds_the_interval_and_the_runs(sides: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    assert main([*map(str, sides), "--json"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    value, low, high = cell["ratio"]
    assert 1 < low < value < high
    assert cell["records"] == [["run0"], ["run1"]]


def test_single_records_are_a_pair_whatever_they_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a = write(tmp_path, (1, 3.0), (1, 3.01), (1, 3.02))
    b = write(tmp_path, (1, 1.0), (1, 1.01), (1, 1.02), system="accelerate", run=1)
    assert main([str(a), str(b)]) == 0
    assert 'system: "flexgen" | "accelerate"' in capsys.readouterr().out


def test_undecided_can_fail(tmp_path: Path):
    a, b = write(tmp_path / "a", (1, 3.0)), write(tmp_path / "b", (1, 3.0), run=1)
    assert main([str(a), str(b)]) == 0
    assert main([str(a), str(b), "--fail-on", "undecided"]) == 1


def test_a_broken_record_is_named_and_hides_nothing(sides: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    a, b = sides
    (b / "default" / "flexgen--x--y--z--w.json").write_text('{"half": ')
    assert main([str(a), str(b)]) == 1, "what B cannot show is no success"
    assert "not usable in B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{a}", "no-such-commit"], "a folder with records, a record, or a commit"),
        (["{a}", "{a}/../empty"], "a folder with records"),
        (["{a}", "{b}", "--metric", "speed"], "generation_tok_per_s"),
        (["{a}", "{b}", "--margin", "3"], "0.03 for three percent"),
        (["{a}", "{b}", "--rerun", "1"], "at least 2 rounds"),
        (["{a}", "{b}", "--", "suite=tiny"], "left out without --rerun"),
        (["{a}", "{b}", "--suite", "other"], "a cell in common"),
    ],
)
def test_bad_input_is_named(
    sides: tuple[Path, Path], arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    a, b = sides
    (a.parent / "empty").mkdir()
    assert main([word.format(a=a, b=b) for word in arguments]) == 2
    assert says in capsys.readouterr().err


def test_two_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def git(*words: str) -> None:
        who = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "init.defaultBranch=main"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    for number, decode in enumerate((1.0, 3.0)):
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        write(tmp_path / "results", (1, decode), (1, decode + 0.01), (1, decode + 0.02), run=number)
        git("add", "-A")
        git("commit", "-m", "records")
    monkeypatch.chdir(tmp_path)
    assert main(["HEAD~1", "HEAD"]) == 1
    assert "worse: default: flexgen" in capsys.readouterr().out
    assert main(["HEAD", "HEAD~1"]) == 0


PROGRAM = """
import json, sys
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:])
here = Path(__file__).parent
number = len(list(Path(words["results_dir"]).parents[1].rglob("*.json")))
path = Path(words["results_dir"]) / "default" / f"{number}.json"
path.parent.mkdir(parents=True)
record = json.loads((here / "record.json").read_text())
record["run_id"] = f"run{number}"
path.write_text(json.dumps(record))
print(json.dumps({"records": [str(path)]}))
"""


def checkout(folder: Path, decode_s: float) -> Path:
    """A project whose program takes so long, in a process of its own like the real one."""
    package = folder / "flexgen_bench"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(PROGRAM)
    (package / "record.json").write_bytes(to_bytes(make_record(times=[(1.0, decode_s)])))
    return folder


def test_both_checkouts_run_their_own_code_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b, out = checkout(tmp_path / "a", 3.0), checkout(tmp_path / "b", 1.0), tmp_path / "out"
    command = [str(a), str(b), "--rerun", "3", "--out", str(out), "--json", "--", "suite=tiny"]
    assert main(command) == 0
    captured = capsys.readouterr()
    (cell,) = json.loads(captured.out)["cells"]
    assert (cell["verdict"], cell["of"], cell["counts"]) == ("better", "rounds", [3, 3])
    assert cell["ratio"][0] == pytest.approx(2.0)
    assert cell["records"] == [["run0", "run3", "run4"], ["run1", "run2", "run5"]]


@pytest.mark.slow
def test_cells_are_measured_again_with_the_real_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The same program on both sides: nothing may come out worse by a factor."""
    command = (
        "python -m flexgen_bench model=opt-4m system=flexgen gpu=cpu weights=dummy workload=32-32 "
        "workload.num_prompts=2 workload.gen_len=4 measure.repetitions=1 measure.warmup=0 calibrate=false"
    )
    path = write_record(replace(make_record(), rerun_command=command), tmp_path / "a")
    out = tmp_path / "out"
    status = main([str(path), str(path), "--rerun", "2", "--out", str(out), "--json", "--margin", "0.9"])
    captured = capsys.readouterr()
    assert status == 0, captured
    (cell,) = json.loads(captured.out)["cells"]
    assert (cell["of"], cell["counts"]) == ("rounds", [2, 2])
    assert len(list(out.rglob("*.json"))) == 4
