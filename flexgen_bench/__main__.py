"""The command line: ``python -m flexgen_bench [group=choice ...] [key=value ...]``.

Exit status: 0 if every cell was measured or is known not to fit or not to be possible here, 1 if one failed
(or nothing could be measured), 2 for bad input, 130 after Ctrl-C.
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

from flexgen_bench.compose import CONFIG_NAME, Cell, Plan, check_groups, plan, user_error
from flexgen_bench.conf_schema import AppConf
from flexgen_bench.config import app_conf, conf_dir, default_cache_dir, list_models, model_spec
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.folders import make_writable
from flexgen_bench.core.status import Status
from flexgen_bench.runner.feasibility import Refusal, explain

# How a cell may end without the run having failed: not fitting, or not being possible, is a finding.
_FINDINGS = (Status.OK, Status.OOM, Status.UNAVAILABLE)
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


@dataclass
class Outcome:
    """What the runs of one command (several with --multirun) have left."""

    records: list[Path] = field(default_factory=list)
    explanations: dict[str, None] = field(default_factory=dict)  # in order, each once
    bad_input: bool = False
    broken: bool = False


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
        app(run_composed)()
    except UserError as error:
        return _complain(error)
    except HydraException as error:
        if traceback_wanted:
            raise
        return _complain(user_error(error))
    except KeyboardInterrupt:
        print("interrupted; the records of finished cells are kept", file=sys.stderr)
        _summary(outcome.records)
        return INTERRUPTED
    if outcome.bad_input:
        return BAD_INPUT
    if not outcome.records:  # --cfg and the like
        return FAILED if outcome.broken else 0
    for explanation in outcome.explanations:
        print(f"\n{explanation}")
    statuses = _summary(outcome.records)
    fine = all(status in _FINDINGS for status in statuses) and Status.OK in statuses
    return 0 if fine and not outcome.broken else FAILED


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
    from flexgen_bench.runner.display import ProgressDisplay
    from flexgen_bench.runner.suite import SuiteCell, run_suite
    from flexgen_bench.store.reader import read_record
    from flexgen_bench.trackers.registry import make_tracker

    results = make_writable(Path(conf.results_dir).expanduser(), "results_dir")
    cache = Path(conf.cache_dir).expanduser() if conf.cache_dir else default_cache_dir()
    make_writable(cache, "cache_dir")
    tracker = make_tracker(
        conf.tracker.name, conf.tracker.options(), results.absolute().parent / "wandb"
    )
    refusals = _refusals(wanted.cells, cache)
    cells = []
    for cell in wanted.cells:
        refusal = refusals.get(cell.spec.spec_hash)
        reason = None if refusal is None else refusal.reason
        cells.append(SuiteCell(_label(cell), cell.spec, cell.command, reason))

    def on_record(path: Path) -> None:
        outcome.records.append(path)
        tracker.log_record(read_record(path), path)

    with ProgressDisplay() as display:
        paths = run_suite(
            cells,
            suite=wanted.suite,
            results_dir=results,
            cache_dir=cache,
            rerun=conf.rerun,
            display=display,
            on_record=on_record,
        )
    outcome.records[:] = [path for path in outcome.records if path not in paths] + paths
    tracker.finish()
    outcome.explanations.update(dict.fromkeys(r.text for r in refusals.values()))


def _refusals(cells: Sequence[Cell], cache: Path) -> dict[str, Refusal]:
    """Why cells cannot be measured here, by the hash of their spec."""
    known = [model_spec(name).shape for name in list_models()]
    found = {cell.spec.spec_hash: explain(cell.spec, cache, known) for cell in cells}
    return {key: refusal for key, refusal in found.items() if refusal is not None}


def _label(cell: Cell) -> str:
    spec = cell.spec
    lossy = "" if spec.lossy.is_exact else f"({spec.lossy})"
    parts = [cell.name, spec.system, lossy, spec.model.shape.name, spec.workload.name]
    return " ".join(filter(None, parts))


def _summary(records: Sequence[Path]) -> list[Status]:
    """Print the table and, as the last line, one JSON document that names the records."""
    from flexgen_bench.report.table import print_table
    from flexgen_bench.store.reader import read_paths

    stored, _ = read_paths(records)
    statuses = [item.record.status for item in stored]
    if records:
        print()
        print_table(records)
    counts = Counter(status.value for status in statuses)
    print(json.dumps({"records": [str(path) for path in records], "status": dict(counts)}))
    return statuses


def _complain(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
