"""A policy chosen by another process: the same one, and whatever becomes of that process."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.rates import Rates
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner import choose as chooser
from flexgen_bench.planner.auto_policy import auto_policy
from flexgen_bench.planner.choose import choose
from flexgen_bench.planner.default_policy import default_policy
from flexgen_bench.planner.search_space import SearchSpace
from tests.support.planner_machines import DTYPE, FOUR_BITS, MIB, accelerator, host, site, small_opt
from tests.support.tiny_models import random_model, save

ROOT = Path(__file__).resolve().parents[2]
SHAPE = small_opt(layers=4, hidden=128)
TIGHT = accelerator(3 * MIB, 4 * MIB, gpu=site(2e10, 1e11), cpu=site(2e9, 2e10))
STAGE = "flexgen_bench.stage"


@pytest.fixture(autouse=True)
def _this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process is to find the code that is tested."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def asked(hardware: HardwareProfile = TIGHT, max_latency_s: float | None = None, **more: Any) -> SearchSpace:
    job = Job(SHAPE, DTYPE, hardware, 32, 4, 8, max_latency_s=max_latency_s)
    return SearchSpace(job, **{"lossies": (EXACT,)} | more)


@pytest.mark.parametrize(
    "more",
    [
        {"available": {Tier.CPU: 3 * MIB, Tier.GPU: 2 * MIB}, "block_size": 4},
        {"hardware": host(3 * MIB), "scored_rows": 40},
        {"lossies": (Lossy(FOUR_BITS, FOUR_BITS), Lossy(FOUR_BITS))},
    ],
)
def test_the_other_process_finds_what_this_one_would(more: Mapping[str, Any]) -> None:
    space = asked(**more)
    assert choose(space) == auto_policy(space)
    assert from_json(SearchSpace, json.loads(json.dumps(to_json(space))), "space") == space


def test_a_latency_is_kept_or_refused() -> None:
    """By the other process too; the rule, which knows of no time, never stands in for it."""
    free = choose(asked())
    quick = choose(asked(max_latency_s=0.01))
    assert quick != free
    with pytest.raises(UserError, match=r"policy\.max_latency_s.*single sequence takes"):
        choose(asked(max_latency_s=1e-9))
    with pytest.raises(UserError, match="calibrate"):
        choose(asked(max_latency_s=1.0, hardware=replace(TIGHT, rates=None)))


def test_without_rates_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser, "_command", lambda: ["/there/is/no/such/program"])
    space = asked(hardware=replace(TIGHT, rates=None))
    assert choose(space) == default_policy(space)


def program(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Something else answers."""
    monkeypatch.setattr(chooser, "_command", lambda: [sys.executable, "-c", source])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed, most likely as memory ran out"),
        ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
        ("raise MemoryError('no room')", "ended with exit status 1 (MemoryError: no room)"),
        ("raise SystemExit(3)", "ended with exit status 3 (no message)"),
        ("print('hello')", "gave no answer, but 'hello"),
        ("print('[]')", "gave no answer"),
        ('print(\'{"policy": {"speed": 3}, "refused": null}\')', "gave no answer"),
    ],
)
def test_a_process_that_dies_leaves_it_to_the_rule(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, source: str, reason: str
) -> None:
    program(monkeypatch, source)
    with caplog.at_level(logging.WARNING, STAGE):
        assert choose(asked()) == default_policy(asked())
    [warning] = caplog.records
    assert reason in warning.getMessage()
    assert "plain rule's policy is used" in warning.getMessage()


def test_a_process_that_cannot_start_leaves_it_to_the_rule(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chooser, "_command", lambda: ["/there/is/no/such/program"])
    assert choose(asked()) == default_policy(asked())
    assert "did not start (No such file or directory)" in caplog.text


def test_where_the_search_finds_nothing_the_rule_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its refusal is the one that is raised; should it find something, that is used."""
    too_small = asked(available={Tier.GPU: MIB // 100})
    with pytest.raises(DoesNotFit) as error:
        choose(too_small)
    with pytest.raises(DoesNotFit) as rules:
        default_policy(too_small)
    assert str(error.value) == str(rules.value)
    program(monkeypatch, 'print(\'{"policy": null, "refused": null}\')')
    assert choose(asked()) == default_policy(asked())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_rates_that_lack_something_are_refused_as_in_this_process() -> None:
    """They are the user's to complete: no rule hides that."""
    rates = TIGHT.rates
    assert rates is not None
    poor = replace(TIGHT, rates=Rates({Tier.GPU: rates.sites[Tier.GPU]}))
    with pytest.raises(UserError) as here:
        auto_policy(asked(hardware=poor))
    with pytest.raises(UserError) as there:
        choose(asked(hardware=poor))
    assert str(there.value) == str(here.value)


def test_an_interrupted_search_leaves_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program(monkeypatch, f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)")

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), 2)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        choose(asked())
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


CHOOSES = """
import sys
from pathlib import Path
from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.schedule.sequence_groups import Request
import json
folder = Path(sys.argv[1])
hardware = from_json(HardwareProfile, json.loads(sys.argv[2]), "gpu")
weights = PackedWeights.from_checkpoint(folder, DType.FLOAT32, folder / "cache")
policy = weights.choose_policy(Device.open(hardware, 1), folder / "offload", [Request(8, 4)] * 8)
assert "scipy" not in sys.modules and "scipy.optimize" not in sys.modules
print(json.dumps(to_json(policy)))
"""


def test_the_process_of_the_engine_never_loads_the_search(tmp_path: Path) -> None:
    folder = save(random_model("opt"), tmp_path)
    hardware = json.dumps(to_json(host(None)))  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-c", CHOOSES, str(folder), hardware], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "policy was searched" not in done.stderr
    assert json.loads(done.stdout)["gpu_batch_size"] >= 1
