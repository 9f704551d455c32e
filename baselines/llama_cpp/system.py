"""llama.cpp in this process, out of the ``xllamacpp`` wheel, on a GGUF file made of the cell's own weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from baselines.llama_cpp.generation import Clocks, generate
from baselines.llama_cpp.layout import check_family
from baselines.llama_cpp.library import CUDA_WHEEL, MAX_SEQUENCES, has_cuda, library
from baselines.llama_cpp.metadata import check_expressible
from baselines.llama_cpp.placement import divided, gpu_layers
from baselines.llama_cpp.settings import KV_TYPES, Load, Settings, chosen_load, context_tokens, footprint
from flexgen_bench.core.device_memory import process_bytes
from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.hardware import Accelerator
from flexgen_bench.core.progress import Progress
from flexgen_bench.core.record import SystemReport
from flexgen_bench.core.status import Status
from flexgen_bench.core.units import format_bytes
from flexgen_bench.machine.host import memory_bytes
from flexgen_bench.machine.probes import drop_cached_pages
from flexgen_bench.memory.host import group_limit
from flexgen_bench.systems.contract import Capabilities, Generation, System

_stage = logging.getLogger("flexgen_bench.stage")


class LlamaCppSystem(System):
    """Options: see ``settings.Settings`` and ``conf/system/llama_cpp.yaml``. There is no prompt cache here: every
    repetition begins with an empty context."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        needs=("torch", "xllamacpp", "gguf"), lossy=("weights",), gpu_cap=False
    )

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._model: Any = None
        self._context: Any = None
        self._load: Load | None = None
        self._gpu_layers = 0
        self._clocks = Clocks()

    def check(self) -> None:
        spec = self.spec
        options = {name: value for name, value in spec.system_options.items() if name != "batch_size"}
        self._settings = Settings.of(options, spec.dtype, spec.lossy)
        self._settings.check_declared(spec.lossy)
        check_family(spec.model.shape)
        check_expressible(spec.model.shape, self._tokens)
        library()
        if self._has_gpu and not has_cuda():
            raise CannotRun(f"the installed xllamacpp computes on processors alone; one with CUDA: {CUDA_WHEEL}")
        if self._settings.load in (Load.RESIDENT, Load.DIRECT) and not self._has_gpu:
            self._check_fits(1, self._settings.load)

    @property
    def _has_gpu(self) -> bool:
        return self.spec.hardware.accelerator is Accelerator.CUDA

    @property
    def _tokens(self) -> int:
        """Of the longest sequence."""
        return self.spec.workload.prompt_len + self.spec.workload.gen_len

    @property
    def file(self) -> Path:
        """The GGUF file, there or not."""
        from baselines.llama_cpp.gguf_file import gguf_path

        return gguf_path(self.files.checkpoint, self._settings.format, self.files.cache)

    def is_prepared(self) -> bool:
        return self.file.exists()

    def prepare(self) -> None:
        """Write the GGUF file, once per checkpoint and format."""
        from baselines.llama_cpp.gguf_file import write_gguf

        def tell(_: str, done: int, total: int) -> None:
            message = f"writing a GGUF file ({self._settings.format})"
            _stage.info(message, extra={"progress": ("convert", done, total, "B")})

        write_gguf(self.files.checkpoint, self._settings.format, self.file, self.spec.threads, tell)

    def load(self, batch_size: int) -> None:
        if batch_size > MAX_SEQUENCES:
            raise CannotRun(f"llama.cpp computes at most {MAX_SEQUENCES} sequences together, not {batch_size}")
        from baselines.llama_cpp.model import Context, Model

        spec, settings = self.spec, self._settings
        self._close_context()
        load = chosen_load(spec.model.shape, settings, batch_size, self._tokens, self._room)
        layers = self._layers_on_gpu(load, batch_size)
        if load is not Load.MMAP and not self._has_gpu:
            self._check_fits(batch_size, load)
        if self._model is None or (load, layers) != (self._load, self._gpu_layers):
            self.close()
            # Pages that another process has cached are nobody's memory here: reading them would look free.
            drop_cached_pages(self.file.parent)
            self._model = Model(self.file, load.mode, settings.repacks(load), layers)
        self._load, self._gpu_layers, self._batch_size, self._clocks = load, layers, batch_size, Clocks()
        self._context = Context(
            self._model,
            sequences=batch_size,
            tokens=context_tokens(self._tokens),
            vocab=spec.model.shape.vocab_size,
            threads=spec.threads,
            ubatch=settings.ubatch_of(load),
            kv_type=KV_TYPES[settings.kv].number,
        )

    @property
    def _room(self) -> int:
        """Bytes for weights and what lies beside them: the cell's, its group's or the machine's, and a GPU's."""
        limits = (self.spec.hardware.cpu_memory_bytes, group_limit(), memory_bytes())
        on_gpu = int(self.spec.hardware.gpu_memory_bytes or 0) if self._has_gpu else 0
        return min(limit for limit in limits if limit is not None) + on_gpu

    def _layers_on_gpu(self, load: Load, batch_size: int) -> int:
        if not self._has_gpu:
            return 0
        whole = self.spec.hardware.gpu_memory_bytes
        free = None if whole is None else whole - process_bytes(self.spec.hardware)
        shape, settings = self.spec.model.shape, self._settings
        layers = gpu_layers(shape, settings, load, batch_size, self._tokens, free)
        fitting = gpu_layers(shape, replace(settings, gpu_layers=None), load, batch_size, self._tokens, free)
        if layers > fitting:
            raise CannotRun(
                f"system.options.gpu_layers={layers}, but the {format_bytes(int(free or 0))} of the GPU hold {fitting} "
                f"layers with batches of {batch_size}; null takes as many as fit",
                Status.OOM,
            )
        return layers

    def _check_fits(self, batch_size: int, load: Load) -> None:
        limit = self._room
        need = footprint(self.spec.model.shape, self._settings, load, batch_size, self._tokens)
        if need.total > limit:
            raise CannotRun(
                f"llama.cpp with load={load} keeps all weights in memory: {format_bytes(need.weights)} and "
                f"{format_bytes(need.besides_weights)} beside them for batches of {batch_size}, more than the "
                f"{format_bytes(limit)} of this cell; system.options.load=mmap leaves weights in their file",
                Status.OOM,
            )

    def generate(self, prompts: Sequence[Sequence[int]], gen_len: int, progress: Progress) -> Generation:
        return generate(
            self._context, prompts, gen_len, batch_size=self._batch_size, clocks=self._clocks, progress=progress
        )

    def report(self) -> SystemReport:
        assert self._load is not None
        settings, load, size = self._settings, self._load, self.file.stat().st_size
        shape = self.spec.model.shape
        parts = divided(shape, settings)
        placed = [parts.head, *reversed(parts.layers)][: self._gpu_layers]
        on_gpu = min(1.0, sum(part.bytes for part in placed) / size)
        below = "disk" if load is Load.MMAP else "cpu"
        shares = {"gpu": on_gpu, below: 1 - on_gpu}
        notes = ["no prompt cache; prompts are not padded", *self._clocks.warnings()]
        realised: dict[str, Any] = {
            "format": settings.format.value,
            "load": load.value,
            "weights": {tier: round(share, 6) for tier, share in shares.items() if share},
            "weight_bytes": {tier: round(size * share) for tier, share in shares.items() if share},
            "ubatch": settings.ubatch_of(load),
            "repack": settings.repacks(load),
            "gpu_layers": self._gpu_layers,
            "clock_s": {"prefill": self._clocks.prefill_s, "decode": self._clocks.decode_s},
            "own_s": {"prefill": self._clocks.own_prefill_s, "decode": self._clocks.own_decode_s},
        }
        if load is Load.MMAP:
            realised["mapped_resident_bytes"] = mapped_resident_bytes(self.file)
            notes.append(
                "weights are pages of a mapped file, which the memory cap, if enforced, includes; "
                "mapped_resident_bytes: those in memory at the end"
            )
        return SystemReport(
            requested=dict(self.spec.system_options),
            realised=realised,
            lowest_tier=below if on_gpu < 1 else "gpu",
            notes=tuple(notes),
        )

    def close(self) -> None:
        self._close_context()
        if self._model is not None:
            self._model.close()
        self._model = None

    def _close_context(self) -> None:
        if self._context is not None:
            self._context.close()
        self._context = None


def mapped_resident_bytes(file: Path) -> int:
    """Of the mappings of ``file`` in this process, what is in memory (/proc/self/smaps); 0 where there is no such
    thing."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return 0
    total, is_ours = 0, False
    for line in smaps.read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = line.endswith(str(file.resolve()))
        elif is_ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total
