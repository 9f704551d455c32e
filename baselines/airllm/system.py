"""AirLLM: transformers computes, hooks bring each layer's weights from a file of its own and let them go again."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any, ClassVar

from baselines import hf_generate as hf
from baselines.airllm.package import PACKAGE
from baselines.hf_system import HFSystem
from flexgen_bench.checkpoints.prepared import files_fingerprint
from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.core.record import SystemReport
from flexgen_bench.machine.probes import drop_cached_pages
from flexgen_bench.systems.contract import Capabilities

# Whose layers its generic class finds by their names (``model.layers``). Tokens of a Llama are compared in
# tests/baselines/test_airllm.py; the others have not been run.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_stage = logging.getLogger("flexgen_bench.stage")
_DONE = "complete"


class AirLLMSystem(HFSystem):
    """Option ``prefetching``: whether the next layer is read while one computes, as it does unless told otherwise."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs=("torch", "transformers", "accelerate"))

    def check(self) -> None:
        family = self.spec.model.shape.family
        if family not in FAMILIES:
            raise CannotRun(
                f"AirLLM splits checkpoints into layers by the names of Llama's form; {family} models are not tried "
                f"with it. Choose a model of one of these families: {', '.join(FAMILIES)}"
            )
        self._prefetching = self.spec.system_options.get("prefetching", True)
        if self._prefetching not in (True, False):
            raise UserError("system.options.prefetching", self._prefetching, "true or false")
        self._device = hf.compute_device(self.spec)

    @property
    def _shards(self) -> Path:
        """The folder that it splits the checkpoint into."""
        identity = [PACKAGE.version, str(self.files.checkpoint.absolute()), files_fingerprint(self.files.checkpoint)]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
        return self.files.cache / "airllm" / f"{self.files.checkpoint.name}-{digest}"

    def is_prepared(self) -> bool:
        return PACKAGE.is_installed(self.files.cache) and (self._shards / _DONE).exists()

    def prepare(self) -> None:
        """Install it, and have it split the checkpoint: a file for each layer."""
        if not PACKAGE.is_installed(self.files.cache):
            PACKAGE.install(self.files.cache)
        _stage.info("AirLLM splits the checkpoint into layers")
        self._shards.mkdir(parents=True, exist_ok=True)
        self._open()
        (self._shards / _DONE).touch()

    def load(self, batch_size: int) -> None:
        self._batch_size = batch_size
        if self._model is None:
            # Pages that another process has cached are nobody's memory here: reading them would look free.
            drop_cached_pages(self._shards)
            self._air = self._open()
            self._model = hf.prepare_model(self._air.model)

    def _open(self) -> Any:
        folder = str(PACKAGE.folder(self.files.cache))
        if not PACKAGE.is_here and folder not in sys.path:
            # Last, so that what this environment has stays what it is; but before another release of the package.
            sys.path.insert(0 if importlib.util.find_spec(PACKAGE.name) else len(sys.path), folder)
        from airllm import AirLLMBaseModel

        class WithoutTokenizer(AirLLMBaseModel):
            """Prompts are ids, and dummy checkpoints have no tokenizer."""

            def get_tokenizer(self, hf_token: str | None = None) -> None:
                return None

        return WithoutTokenizer(
            str(self.files.checkpoint),
            device=str(self._device),
            dtype=hf.torch_dtype(self.spec),
            layer_shards_saving_path=str(self._shards),
            prefetching=bool(self._prefetching),
        )

    def report(self) -> SystemReport:
        sizes = {file.stem: file.stat().st_size for file in self._shards.rglob("*.safetensors")}
        held = {"disk": sum(sizes.values())}
        if self.spec.model.shape.tied_embeddings:  # the table stays where it is computed
            tier = "gpu" if self._device.type == "cuda" else "cpu"
            table = sum(size for name, size in sizes.items() if "embed" in name)
            held = {tier: table, "disk": held["disk"] - table}
        return SystemReport(
            requested={"prefetching": self._prefetching},
            realised={"weights": hf.shares(held), "weight_bytes": held},
            peak_bytes=hf.peak_gpu_bytes(self._device),
            lowest_tier="disk",
            notes=(
                f"AirLLM {PACKAGE.version}; every layer is read from its file in every pass",
                "files are read through the page cache, which the memory cap, if enforced, includes",
            ),
        )

    def close(self) -> None:
        self._air = None
        super().close()
