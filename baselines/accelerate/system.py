"""Hugging Face Accelerate: weights offloaded to host memory or disk, brought in layer by layer by its hooks."""

from __future__ import annotations

from typing import Any, ClassVar

from baselines import hf_generate as hf
from baselines.hf_system import HFSystem
from flexgen_bench.core.errors import unknown_choice
from flexgen_bench.core.record import SystemReport
from flexgen_bench.systems.contract import Capabilities

MODES = ("auto", "cpu", "disk")


class AccelerateSystem(HFSystem):
    """Option ``offload``: where the transformer layers lie when they are not computing.

    cpu: host memory. disk: the checkpoint's own files, which Accelerate maps. auto: Accelerate's own device
    map fills the device, then host memory, and leaves the rest on disk.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(needs=("torch", "transformers", "accelerate"), scores=True)

    def check(self) -> None:
        self._mode = str(self.spec.system_options.get("offload", "auto"))
        if self._mode not in MODES:
            raise unknown_choice("system.options.offload", self._mode, MODES)
        self._device = hf.compute_device(self.spec)
        if self._mode == "cpu":
            hf.check_weights_fit(self.spec, self.files.checkpoint, "accelerate with offload=cpu")

    def load(self, batch_size: int) -> None:
        self._batch_size = batch_size
        if self._model is not None and self._mode != "auto":
            return
        self._model = None  # the automatic map depends on the batch: room must be left for its KV cache
        if self._mode == "cpu" and self._device.type == "cpu":
            self._load_with_cpu_hooks()
        else:
            self._load_with_map(batch_size)

    def _load_with_cpu_hooks(self) -> None:
        """Host memory to a device that is the host: a device map has no word for it, ``cpu_offload`` has."""
        from accelerate import cpu_offload

        model = hf.load_model(self.files.checkpoint, hf.torch_dtype(self.spec))
        hf.make_resident(model)
        # Hooks move the parameters to the meta device: their sizes are asked before.
        self._held = hf.bytes_per_tier(hf.parameter_sizes(model), lambda _: "cpu")
        cpu_offload(model, execution_device=self._device)
        self._model = hf.prepare_model(model)

    def _load_with_map(self, batch_size: int) -> None:
        from baselines.accelerate import placement

        dtype = hf.torch_dtype(self.spec)
        empty = placement.empty_model(self.files.checkpoint, dtype)
        options: dict[str, Any] = {"offload_folder": str(self.files.scratch)}
        rest: str | int = 0 if self._device.type == "cuda" else "cpu"
        if self._mode == "auto":
            limits: dict[str | int, int] = {"cpu": placement.cpu_budget_bytes(self.spec, batch_size, empty)}
            if rest == 0:
                limits[0] = placement.gpu_budget_bytes(self.spec, batch_size)
            options |= {"device_map": "auto", "max_memory": limits}
        else:
            options["device_map"] = placement.layers_on(empty, self._mode, rest)
        model = hf.load_model(self.files.checkpoint, dtype, **options)
        # A model that lies on one device altogether carries no map.
        realised = getattr(model, "hf_device_map", {"": rest})
        self._held = hf.bytes_per_tier(hf.parameter_sizes(empty), lambda name: placement.tier_of(name, realised))
        hf.make_resident(model)
        self._model = hf.prepare_model(model)

    def report(self) -> SystemReport:
        lowest = next(tier for tier in ("disk", "cpu", "gpu") if self._held.get(tier))
        notes = ["prompts of similar length are batched together"]
        if self._held.get("disk"):
            notes.append("disk weights are read through the page cache, which the memory cap, if enforced, includes")
        return SystemReport(
            requested={"offload": self._mode},
            realised={"weights": hf.shares(self._held), "weight_bytes": self._held},
            peak_bytes=hf.peak_gpu_bytes(self._device),
            lowest_tier=lowest,
            notes=tuple(notes),
        )
