"""transformers with every weight resident on the compute device: the reference for tokens and for speed."""

from __future__ import annotations

from typing import ClassVar

from baselines import hf_generate as hf
from baselines.hf_system import HFSystem
from flexgen_bench.core.record import SystemReport
from flexgen_bench.systems.contract import Capabilities


class TransformersSystem(HFSystem):
    """``model.generate`` of transformers, greedy, in batches."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs=("torch", "transformers"), reference=True, scores=True)

    def check(self) -> None:
        self._device = hf.compute_device(self.spec)
        if self._device.type == "cpu":
            hf.check_weights_fit(self.spec, self.files.checkpoint, "transformers")

    def load(self, batch_size: int) -> None:
        self._batch_size = batch_size
        if self._model is None:
            model = hf.load_model(self.files.checkpoint, hf.torch_dtype(self.spec))
            hf.make_resident(model)
            self._model = hf.prepare_model(model.to(self._device))

    def report(self) -> SystemReport:
        tier = "gpu" if self._device.type == "cuda" else "cpu"
        held = hf.bytes_per_tier(hf.parameter_sizes(self._model), lambda _: tier)
        return SystemReport(
            requested={"weights": {tier: 1.0}},
            realised={"weights": hf.shares(held), "weight_bytes": held},
            peak_bytes=hf.peak_gpu_bytes(self._device),
            lowest_tier=tier,
            notes=("all weights resident; prompts of similar length are batched together",),
        )
