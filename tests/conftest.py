"""What every test shares: no hub, quiet threads, and one cache for the checkpoints that take long to make."""

from __future__ import annotations

import os
import signal
from collections import Counter

# A shell starts what it puts into the background with SIGINT ignored, Python leaves it so, and every process started
# from here inherits it: tests that interrupt something would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported anywhere. Spinning threads beside a busy neighbour make tests several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"

from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.config.build import model_spec
from flexgen_bench.config.table import ConfiguredSystem
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.model import DType
from flexgen_bench.paper import build
from tests.support.paper_fakes import FakePredictor
from tests.support.paper_report import ORIGINAL_OPTIONS, system
from tests.support.shapes import no_progress

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that take minutes run where they are asked for: a hundred kills once took all the time that a check had. Of
    a large matrix, so does all but every n-th test; these are others for each of its rows."""
    if "slow" in config.getoption("markexpr"):
        return
    counts: Counter[int] = Counter()
    for item in items:
        thinned = item.get_closest_marker("one_in")
        if thinned is not None:
            counts[thinned.args[0]] += 1
        if "slow" in item.keywords or (thinned is not None and counts[thinned.args[0]] % thinned.args[0]):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m 'slow or one_in'"))


@pytest.fixture(scope="session")
def shared_cache() -> Path:
    """A cache that outlives the test session, for what is downloaded or takes long to convert."""
    return ROOT / ".cache" / "tests"


@pytest.fixture(scope="session")
def smollm2(shared_cache: Path) -> tuple[ModelSpec, Path]:
    """The trained model of the package index, in float32: its spec and its checkpoint folder."""
    spec = model_spec("smollm2-135m")
    return spec, prepare_checkpoint(spec, DType.FLOAT32, shared_cache, no_progress)


@pytest.fixture
def fake_systems(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ConfiguredSystem]]:
    """Systems under the paper's names whose predictions are known; ``flexgen`` is this engine, and ten times as
    fast."""
    systems = [
        system("one", "Accelerate", {"offload": "auto"}, choices={"offload": ["auto", "cpu", "disk"]}),
        system("flexgen", "FlexGen", {"policy": None}, constants={"slow": 0.1}),
        system("two", "FlexGen", dict.fromkeys(ORIGINAL_OPTIONS)),
        system("three", "DeepSpeed ZeRO-Inference", {"offload": "cpu"}, predictor=None),
    ]
    monkeypatch.setattr(build, "configured_systems", lambda: systems)
    FakePredictor.asked.clear()
    yield systems
    FakePredictor.asked.clear()
