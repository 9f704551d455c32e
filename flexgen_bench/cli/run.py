"""The command line: ``python -m flexgen_bench [group=choice ...] [key=value ...]``.

Cells of this machine are measured; those of another one, whose constants are known, are simulated, and leave no record.

Exit status: 0 if every cell was measured, simulated or is known not to fit or not to be possible here, 1 if one failed
(or nothing could be said of any), 2 for bad input, 130 after Ctrl-C. With dry_run=true: 1 if something cannot fit.

Where cells of the system that the benchmark is about are among those of a command (``subject`` in conf/system), its
status tells how these did. Of a system beside it that fails, takes too long or is killed there is a record, a line in
the table and a warning. A command that asks for other systems alone is told about these.

Started with SIGINT ignored, as by nohup or in the background of a script, it goes on at a Ctrl-C that is meant for
others: SIGTERM ends it.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from flexgen_bench.cells.compose import CONFIG_NAME, Plan, plan, suite_of
from flexgen_bench.cells.expected_time import Expected
from flexgen_bench.cells.local_rates import LocalRates
from flexgen_bench.cells.this_machine import ThisMachine
from flexgen_bench.cells.words import key_of, prepared
from flexgen_bench.cells.work import Work, divide, published_tables
from flexgen_bench.cli.ending import BAD_INPUT, FAILED, INTERRUPTED
from flexgen_bench.cli.sweeps import Elsewhere
from flexgen_bench.config.cell import Cell
from flexgen_bench.config.compose_errors import NOT_COMPOSED, user_error
from flexgen_bench.config.overrides import MULTIRUN
from flexgen_bench.config.paths import conf_dir, default_cache_dir
from flexgen_bench.config.schema import AppConf
from flexgen_bench.config.typed import app_conf, as_written
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.folders import expanded, make_writable
from flexgen_bench.core.record import Record
from flexgen_bench.core.simulated import Simulated
from flexgen_bench.core.status import Status
from flexgen_bench.runner.predictions import simulate
from flexgen_bench.runner.suite import finished_record

# How a cell may end without the run having failed: not fitting, or not being possible, is a finding.
_FINDINGS = (Status.OK, Status.OOM, Status.UNAVAILABLE)


@dataclass
class Outcome:
    """What the runs of one command (several with --multirun) have left."""

    records: list[Path] = field(default_factory=list)
    simulated: list[Simulated] = field(default_factory=list)
    why: dict[str, None] = field(default_factory=dict)  # not measured; in order, each once
    explanations: dict[str, None] = field(default_factory=dict)
    running: bool = False  # what goes wrong now is no mistake of the configuration
    bad_input: bool = False
    broken: bool = False
    # Hashes of cells whose failure is only warned of.
    tolerated: set[str] = field(default_factory=set)
    is_plan: bool = False
    unfit: bool = False  # in a dry run: something has no room
    json: bool | None = None  # whether the line of JSON is wanted; None: where it is no person who reads

    @property
    def has_nothing(self) -> bool:
        """Whether nobody has told of anything."""
        return not (self.records or self.simulated or self.bad_input or self.broken)

    def add(self, other: Outcome) -> None:
        """Take over what a run in another process has left."""
        self.records += other.records
        self.simulated += other.simulated
        self.why |= other.why
        self.explanations |= other.explanations
        self.bad_input |= other.bad_input
        self.broken |= other.broken
        self.tolerated |= other.tolerated
        self.is_plan |= other.is_plan
        self.unfit |= other.unfit
        self.json = other.json


def main(arguments: Sequence[str]) -> int:
    """Run a command line; the exit status."""
    outcome = Outcome()
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors to us instead of exiting

    elsewhere = Elsewhere()

    def run_composed(composed: Any) -> None:
        if elsewhere.is_away:  # a launcher's process
            own = Outcome()
            _guarded(own, traceback_wanted, composed)
            elsewhere.hand_in(own)
            return
        outcome.running = True
        _guarded(outcome, traceback_wanted, composed)
        outcome.running = False

    app = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=CONFIG_NAME)
    try:
        sys.argv[1:] = prepared(arguments)
        _swept(app(run_composed), arguments, elsewhere, outcome)
    except UserError as error:
        return _complain(error)
    except NOT_COMPOSED as error:
        if traceback_wanted or outcome.running:
            raise
        return _complain(user_error(error))
    except KeyboardInterrupt:
        print("interrupted; the records of finished cells are kept", file=sys.stderr)
        _summary(outcome)
        return INTERRUPTED
    if outcome.bad_input:
        return BAD_INPUT
    if not (outcome.records or outcome.simulated):  # --cfg and the like
        return FAILED if outcome.broken else 0
    return _judged(outcome, _summary(outcome))


def _swept(start: Callable[[], Any], arguments: Sequence[str], elsewhere: Elsewhere, outcome: Outcome) -> None:
    """Start Hydra's application, and gather what its launcher's processes have left. One that is lost leaves nothing,
    and the launcher ends with an error of its own kind: the others stand."""
    launched = any(key_of(word) == "hydra/launcher" for word in arguments)
    several = any(word in MULTIRUN for word in arguments)
    try:
        start()
    except Exception as error:
        if not launched or isinstance(error, (UserError, *NOT_COMPOSED)):
            raise
        outcome.broken = True
        lines = str(error).strip().splitlines() or ["no reason"]
        _tell(f"error: a run was lost: {type(error).__name__}: {lines[0]}. The same command runs what is missing.")
    finally:
        for left in elsewhere.gather():
            outcome.add(left)
    if launched and several and outcome.has_nothing:
        outcome.broken = True
        _tell(f"error: no run has left its outcome in {elsewhere.folder}: do all hosts share this folder?")


def _judged(outcome: Outcome, records: Sequence[Record]) -> int:
    """The exit status of what was measured and simulated."""
    measured = [r.status for r in records]
    failed = [r for r in records if r.status not in _FINDINGS]
    simulated = [row.status for row in outcome.simulated]
    beyond = any(row.is_beyond_its_machine for row in outcome.simulated) and not outcome.is_plan
    if Status.INVALID in simulated or beyond:
        return BAD_INPUT
    broken = outcome.broken or Status.FAILED in simulated
    if broken or outcome.is_plan:
        return FAILED if broken or outcome.unfit else 0
    said = Status.OK in measured or Status.OK in simulated or Status.OOM in simulated
    return 0 if said and all(r.spec_hash in outcome.tolerated for r in failed) else FAILED


def _guarded(outcome: Outcome, traceback_wanted: bool, composed: Any) -> None:
    """One run. Bad input ends this run alone, so that the others of a --multirun still happen."""
    try:
        # What ${...} stands for may need quotes again.
        overrides = as_written(HydraConfig.get().overrides.task)
        suite = str(HydraConfig.get().runtime.choices.get("suite") or "")
        conf = app_conf(composed)
        _run(conf, overrides, suite, outcome)
    except UserError as error:
        if traceback_wanted:
            raise
        outcome.bad_input = True
        _complain(error)
    except StoreError as error:
        if traceback_wanted:
            raise
        outcome.broken = True
        print(f"error: {error}", file=sys.stderr)


def _run(conf: AppConf, overrides: Sequence[str], suite: str, outcome: Outcome) -> None:
    outcome.json = conf.json
    cache = expanded(conf.cache_dir, "cache_dir") if conf.cache_dir else default_cache_dir()
    results = expanded(conf.results_dir, "results_dir")
    of_suite = suite_of(conf, overrides, suite)

    def is_worth_measuring(cell: Cell) -> bool:
        wanted_now = conf.rerun or conf.dry_run
        is_new = wanted_now or finished_record(results, cell.spec.spec_hash, of_suite) is None
        return conf.calibrate and is_new

    rates = LocalRates(cache, is_worth_measuring, _tell, required=conf.dry_run)
    expected = Expected(rates, cache)
    is_sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    run_plan = plan(conf, overrides, suite, ThisMachine(expected, conf.calibrate, _tell), is_sweep=is_sweep)
    if conf.dry_run:
        _plan(run_plan, results, cache, rates, outcome)
        return
    if any(cell.subject and cell.can_run for cell in run_plan.cells):
        outcome.tolerated |= {c.spec.spec_hash for c in run_plan.cells if not c.subject}
    divided_cells = divide(run_plan.cells, cache, expected)
    outcome.why.update(dict.fromkeys([divided_cells.why] if divided_cells.why else []))
    outcome.explanations.update(dict.fromkeys(divided_cells.explanations))
    for rows in simulate(divided_cells.simulate, cache, _tell):
        outcome.simulated += rows
    if divided_cells.measure:
        _measure(conf, divided_cells, run_plan.suite, results, cache, outcome)


def _plan(run_plan: Plan, results: Path, cache: Path, rates: LocalRates, outcome: Outcome) -> None:
    from flexgen_bench.cells.dry_run import plan_summaries
    from flexgen_bench.report.plan_summary import print_plan

    summaries = plan_summaries(run_plan.cells, run_plan.suite, results, cache, rates)
    print_plan(summaries)
    outcome.is_plan = True
    outcome.simulated += [summary.row for summary in summaries]
    outcome.unfit |= any(not s.fits or s.row.status is Status.OOM for s in summaries)


def _measure(conf: AppConf, divided_cells: Work, suite: str, results: Path, cache: Path, outcome: Outcome) -> None:
    from flexgen_bench.runner.display import ProgressDisplay
    from flexgen_bench.runner.displays import Displays
    from flexgen_bench.runner.events import Display
    from flexgen_bench.runner.progress_file import ProgressFile
    from flexgen_bench.runner.suite import run_suite
    from flexgen_bench.trackers.registry import make_tracker
    from flexgen_bench.trackers.suite import TrackedSuite

    make_writable(results, "results_dir")
    make_writable(cache, "cache_dir")
    tracker = make_tracker(conf.tracker.name, conf.tracker.options(), results)
    with ExitStack() as stack:
        display = stack.enter_context(ProgressDisplay())
        followers: list[Display] = [stack.enter_context(ProgressFile(results, suite))]
        if tracker is not None:
            followers.append(stack.enter_context(TrackedSuite(tracker, results)))
        paths = run_suite(
            divided_cells.measure,
            suite=suite,
            results_dir=results,
            cache_dir=cache,
            rerun=conf.rerun,
            display=Displays(display, *followers),
            on_record=outcome.records.append,
        )
    outcome.records[:] = [path for path in outcome.records if path not in paths] + paths


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _summary(outcome: Outcome) -> list[Record]:
    """Print the tables and, as the last line where a program reads them, one JSON document that names the records and
    holds what was simulated. The records."""
    from flexgen_bench.report.prediction_json import row_json
    from flexgen_bench.report.prediction_table import print_predictions
    from flexgen_bench.report.table import print_table
    from flexgen_bench.store.reader import read_paths

    records, simulated = outcome.records, outcome.simulated
    stored, _ = read_paths(records)
    stored_records = [item.record for item in stored]
    tables = published_tables()
    for explanation in outcome.explanations:
        print(f"\n{explanation}")
    if records:
        print()
        print_table(records)
    if simulated and not outcome.is_plan:
        print_predictions(simulated, " ".join(outcome.why), tables)
    for record in stored_records:
        if record.status not in _FINDINGS and record.spec_hash in outcome.tolerated:
            _tell(_warning(record))
    counts = Counter(record.status.value for record in stored_records)
    document = {
        "records": [str(path) for path in records],
        "simulated": [row_json(row, tables) for row in simulated],
        "status": dict(counts),
    }
    prints_json = not sys.stdout.isatty() if outcome.json is None else outcome.json
    if prints_json:
        print(json.dumps(document))
    return stored_records


def _warning(record: Record) -> str:
    """Of a system beside the one that the benchmark is about."""
    from flexgen_bench.report.cells import cause

    ended = f"{record.spec.get('system')} ended in {record.status.value}: {cause(record.reason)}"
    return (
        f"warning: {ended}. It is recorded and in the table; what the others did stands. Again: {record.rerun_command}"
    )


def _complain(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT
