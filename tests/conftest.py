"""What every test shares: no hub, quiet threads, and one cache for the checkpoints that take long to make."""

from __future__ import annotations

import os
import signal

# A shell starts what it puts into the background with SIGINT ignored, Python leaves it so, and every process started from here
# inherits it: tests that interrupt something would wait for ever.
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
from paper_fakes import FakePredictor
from paper_report import ORIGINAL_OPTIONS, system

from flexgen_bench.config import model_spec
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.report.paper import build
from flexgen_bench.runner.checkpoints import prepare_checkpoint
from flexgen_bench.table_conf import ConfiguredSystem

ROOT = Path(__file__).resolve().parent.parent


def opt_shape(name: str = "opt-tiny", **changes: object) -> ModelShape:
    """A small OPT; keys of ``options`` may be given like the others."""
    options = {
        "norm_before": True,
        "embed_dim": 24,
        "activation": "relu",
        "bias": True,
        "norm_affine": True,
    }
    values: dict[str, object] = {
        "num_layers": 2, "hidden_size": 24, "num_heads": 3, "num_kv_heads": 3, "head_dim": 8, "ffn_size": 40,
        "vocab_size": 64, "max_positions": 48, "tied_embeddings": True,
    }  # fmt: skip
    return _shape(name, "opt", values, options, changes)


def llama_shape(name: str = "llama-tiny", **changes: object) -> ModelShape:
    """A small Llama with grouped-query attention."""
    options = {"rope_theta": 10000.0, "rope_scaling": None, "norm_eps": 1e-5, "attention_bias": False,
               "mlp_bias": False, "activation": "silu"}  # fmt: skip
    values: dict[str, object] = {
        "num_layers": 2, "hidden_size": 24, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "ffn_size": 40,
        "vocab_size": 64, "max_positions": 48, "tied_embeddings": False,
    }  # fmt: skip
    return _shape(name, "llama", values, options, changes)


def _shape(
    name: str,
    family: str,
    values: dict[str, object],
    options: dict[str, object],
    changes: dict[str, object],
) -> ModelShape:
    options |= {key: value for key, value in changes.items() if key in options}
    values |= {key: value for key, value in changes.items() if key not in options}
    return ModelShape(name=name, family=family, options=options, **values)  # type: ignore[arg-type]


def no_progress(what: str, done: int, total: int) -> None:
    """For functions that want to tell somebody."""


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
    """Systems under the paper's names whose predictions are known; ``flexgen`` is this engine, and ten times as fast."""
    systems = [
        system(
            "one", "Accelerate", {"offload": "auto"}, choices={"offload": ["auto", "cpu", "disk"]}
        ),
        system("flexgen", "FlexGen", {"policy": None}, constants={"slow": 0.1}),
        system("two", "FlexGen", dict.fromkeys(ORIGINAL_OPTIONS)),
        system("three", "DeepSpeed ZeRO-Inference", {"offload": "cpu"}, predictor=None),
    ]
    monkeypatch.setattr(build, "configured_systems", lambda: systems)
    FakePredictor.asked.clear()
    yield systems
    FakePredictor.asked.clear()
