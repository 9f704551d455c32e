"""The command line: ``python -m flexgen_bench [group=choice ...] [key=value ...]``.

Cells of this machine are measured; those of another one, whose constants are known, are simulated, and leave no record.

Exit status: 0 if every cell was measured, simulated or is known not to fit or not to be possible here, 1 if one failed
(or nothing could be said of any), 2 for bad input, 130 after Ctrl-C. With dry_run=true: 1 if something cannot fit.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from yaml import YAMLError

from flexgen_bench.compose import (
    CONFIG_NAME,
    Cell,
    Plan,
    check_groups,
    overrides_last,
    plan,
    user_error,
    without_null_groups,
)
from flexgen_bench.conf_schema import AppConf
from flexgen_bench.config import app_conf, conf_dir, default_cache_dir
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.folders import make_writable
from flexgen_bench.core.simulated import Simulated
from flexgen_bench.core.status import Status
from flexgen_bench.local_rates import LocalRates
from flexgen_bench.runner.predictions import simulate
from flexgen_bench.runner.suite import finished_record
from flexgen_bench.work import Work, divide, printed_values

# How a cell may end without the run having failed: not fitting, or not being possible, is a finding.
_FINDINGS = (Status.OK, Status.OOM, Status.UNAVAILABLE)
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


@dataclass
class Outcome:
    """What the runs of one command (several with --multirun) have left."""

    records: list[Path] = field(default_factory=list)
    simulated: list[Simulated] = field(default_factory=list)
    why: dict[str, None] = field(default_factory=dict)  # not measured; in order, each once
    explanations: dict[str, None] = field(default_factory=dict)
    bad_input: bool = False
    broken: bool = False
    is_plan: bool = False
    unfit: bool = False  # in a dry run: something has no room
    json: bool | None = (
        None  # whether the line of JSON is wanted; None: where it is no person who reads
    )


def main() -> int:
    """Run the command in ``sys.argv``; the exit status."""
    outcome = Outcome()
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors to us instead of exiting

    def run_composed(composed: Any) -> None:
        _guarded(outcome, traceback_wanted, composed)

    app = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=CONFIG_NAME)
    try:
        check_groups(sys.argv[1:])
        sys.argv[1:] = overrides_last(without_null_groups(sys.argv[1:]))
        app(run_composed)()
    except UserError as error:
        return _complain(error)
    except (HydraException, YAMLError) as error:
        if traceback_wanted:
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


def _judged(outcome: Outcome, measured: Sequence[Status]) -> int:
    """The exit status of what was measured and simulated."""
    simulated = [row.status for row in outcome.simulated]
    beyond = any(row.is_beyond_its_machine for row in outcome.simulated) and not outcome.is_plan
    if Status.INVALID in simulated or beyond:
        return BAD_INPUT
    broken = outcome.broken or Status.FAILED in simulated
    if broken or outcome.is_plan:
        return FAILED if broken or outcome.unfit else 0
    said = Status.OK in measured or Status.OK in simulated or Status.OOM in simulated
    return 0 if said and all(status in _FINDINGS for status in measured) else FAILED


def _guarded(outcome: Outcome, traceback_wanted: bool, composed: Any) -> None:
    """One run. Bad input ends this run alone, so that the others of a --multirun still happen."""
    try:
        overrides = list(HydraConfig.get().overrides.task)
        suite = str(HydraConfig.get().runtime.choices.get("suite") or "")
        conf = app_conf(composed)
        _run(conf, plan(conf, overrides, suite), outcome)
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


def _run(conf: AppConf, wanted: Plan, outcome: Outcome) -> None:
    outcome.json = conf.json
    cache = Path(conf.cache_dir).expanduser() if conf.cache_dir else default_cache_dir()
    results = Path(conf.results_dir).expanduser()

    def is_worth_measuring(cell: Cell) -> bool:
        wanted_now = conf.rerun or conf.dry_run
        is_new = wanted_now or finished_record(results, cell.spec.spec_hash, wanted.suite) is None
        return conf.calibrate and is_new

    rates = LocalRates(cache, is_worth_measuring, _tell, required=conf.dry_run)
    if conf.dry_run:
        _plan(wanted, results, cache, rates, outcome)
        return
    work = divide(wanted.cells, cache, rates)
    outcome.why.update(dict.fromkeys([work.why] if work.why else []))
    outcome.explanations.update(dict.fromkeys(work.explanations))
    for rows in simulate(work.simulate, cache, _tell):
        outcome.simulated += rows
    if work.measure:
        _measure(conf, work, wanted.suite, results, cache, outcome)


def _plan(wanted: Plan, results: Path, cache: Path, rates: LocalRates, outcome: Outcome) -> None:
    from flexgen_bench.dry_run import cards
    from flexgen_bench.report.plan_card import print_cards

    found = cards(wanted.cells, wanted.suite, results, cache, rates)
    print_cards(found)
    outcome.is_plan = True
    outcome.simulated += [card.row for card in found]
    outcome.unfit |= any(not card.fits or card.row.status is Status.OOM for card in found)


def _measure(
    conf: AppConf, work: Work, suite: str, results: Path, cache: Path, outcome: Outcome
) -> None:
    from flexgen_bench.runner.display import ProgressDisplay
    from flexgen_bench.runner.suite import run_suite
    from flexgen_bench.store.reader import read_record
    from flexgen_bench.trackers.registry import make_tracker

    make_writable(results, "results_dir")
    make_writable(cache, "cache_dir")
    tracker = make_tracker(
        conf.tracker.name, conf.tracker.options(), results.absolute().parent / "wandb"
    )

    def on_record(path: Path) -> None:
        outcome.records.append(path)
        tracker.log_record(read_record(path), path)

    with ProgressDisplay() as display:
        paths = run_suite(
            work.measure,
            suite=suite,
            results_dir=results,
            cache_dir=cache,
            rerun=conf.rerun,
            display=display,
            on_record=on_record,
        )
    outcome.records[:] = [path for path in outcome.records if path not in paths] + paths
    tracker.finish()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _summary(outcome: Outcome) -> list[Status]:
    """Print the tables and, as the last line where a program reads them, one JSON document that names the records and holds what was simulated."""
    from flexgen_bench.report.prediction_table import print_predictions, to_json
    from flexgen_bench.report.table import print_table
    from flexgen_bench.store.reader import read_paths

    records, simulated = outcome.records, outcome.simulated
    stored, _ = read_paths(records)
    statuses = [item.record.status for item in stored]
    tables = printed_values()
    for explanation in outcome.explanations:
        print(f"\n{explanation}")
    if records:
        print()
        print_table(records)
    if simulated and not outcome.is_plan:
        print_predictions(simulated, " ".join(outcome.why), tables)
    counts = Counter(status.value for status in statuses)
    document = {
        "records": [str(path) for path in records],
        "simulated": [to_json(row, tables) for row in simulated],
        "status": dict(counts),
    }
    wanted = not sys.stdout.isatty() if outcome.json is None else outcome.json
    if wanted:
        print(json.dumps(document))
    return statuses


def _complain(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
