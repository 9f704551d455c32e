"""Runs of a --multirun that a Hydra launcher puts into other processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_bench.cli.run import Outcome, _swept
from flexgen_bench.cli.sweeps import Elsewhere
from flexgen_bench.core.errors import UserError
from tests.support.command import run_command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def away(tmp_path: Path) -> Elsewhere:
    """As a launcher's process sees it: somebody else asks."""
    return Elsewhere(folder=tmp_path / "handed-in", asker=("another-host", 1))


def test_what_other_processes_leave_is_gathered_once(away: Elsewhere) -> None:
    assert away.is_away
    assert not Elsewhere().is_away
    away.hand_in(Outcome(records=[Path("a.json")], why={"no GPU": None}))
    away.hand_in(Outcome(records=[Path("b.json")], bad_input=True))
    outcome = Outcome()
    _swept(lambda: None, ["-m"], away, outcome)
    assert outcome.records == [Path("a.json"), Path("b.json")]
    assert outcome.bad_input
    assert list(outcome.why) == ["no GPU"]
    assert not away.folder.exists()
    assert list(away.gather()) == []


def test_a_lost_run_is_told_and_the_others_stand(away: Elsewhere, capsys: pytest.CaptureFixture[str]) -> None:
    """A job killed by its batch system leaves nothing; its launcher raises an error of its own kind, which ended the
    command with a traceback and without the table of what had been measured."""

    def start() -> None:
        away.hand_in(Outcome(records=[Path("a.json")]))
        raise RuntimeError("a worker process was terminated\nlong story")

    outcome = Outcome()
    _swept(start, ["-m", "hydra/launcher=submitit_slurm"], away, outcome)
    assert outcome.broken
    assert outcome.records == [Path("a.json")]
    assert "a worker process was terminated. The same command runs what is missing." in capsys.readouterr().err


def test_outcomes_that_do_not_arrive_are_no_success(away: Elsewhere, capsys: pytest.CaptureFixture[str]) -> None:
    """Hosts that do not share the folder left a status of 0 and no word."""
    outcome = Outcome()
    _swept(lambda: None, ["-m", "hydra/launcher=submitit_slurm"], away, outcome)
    assert outcome.broken
    assert "do all hosts share this folder?" in capsys.readouterr().err


def test_mistakes_of_this_process_are_raised_as_ever(away: Elsewhere) -> None:
    def wrong() -> None:
        raise UserError("model", "x", "one of a, b")

    with pytest.raises(UserError):
        _swept(wrong, ["-m", "hydra/launcher=joblib"], away, Outcome())
    with pytest.raises(ZeroDivisionError):
        _swept(lambda: 1 // 0, ["-m"], replace(away), Outcome())


def test_joblib_runs_cells_in_processes_and_one_table_comes_of_it(tmp_path: Path) -> None:
    words = ["-m", "model=opt-125m,opt-350m", "gpu=t4", "system=accelerate", "json=true", "hydra/launcher=joblib"]
    done = run_command(tmp_path, *words, "hydra.launcher.n_jobs=2", "cache_dir=cache", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.strip().splitlines()[-1])["simulated"]
    assert sorted(row["model"] for row in rows) == ["opt-125m", "opt-350m"]
    assert not list(tmp_path.glob(".flexgen-bench-sweep-*"))
