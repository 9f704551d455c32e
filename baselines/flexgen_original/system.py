"""The original FlexGen, release 0.1.8 of its authors' package, in a process and a folder of its own.

Known of it: it computes in float16, knows the OPT models by name, and always takes 8 GiB of page-locked host memory for
its copy threads; with attention on the cpu, two or more batches and overlap its tokens are wrong
(``Settings.is_known_wrong``).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from baselines.common.machine import Machine
from baselines.common.model_size import ModelSize
from baselines.flexgen_original import package, settings
from baselines.flexgen_original.block import NO_CONSTANTS, Block
from baselines.flexgen_original.memory import LARGEST_GPU_BATCH, in_largest_batches
from baselines.flexgen_original.settings import Settings
from flexgen_bench.core.cell import WeightSource
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.model import DType
from flexgen_bench.core.progress import Progress
from flexgen_bench.core.record import SystemReport
from flexgen_bench.systems.contract import Capabilities, Generation, System

ROOT = Path(__file__).resolve().parent.parent.parent
MODELS = ("opt-125m", "opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b", "opt-175b")


class FlexGenOriginal(System):
    """Options: those of its command line (``settings.Settings``); None takes what its authors published."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        mixed_lengths=False, accelerators=("cuda",), needs=("torch", "transformers"), lossy=("weights", "kv_cache")
    )

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._process: subprocess.Popen[str] | None = None
        self._peak_gpu_bytes = 0

    def check(self) -> None:
        spec = self.spec
        if spec.hardware.accelerator.value not in self.capabilities.accelerators:
            raise CannotRun("the original FlexGen needs a CUDA device; it has no way to run without")
        if spec.model.shape.name not in MODELS:
            raise CannotRun(f"the original FlexGen does not know {spec.model.shape.name}; it knows {', '.join(MODELS)}")
        if spec.model.weights is not WeightSource.DUMMY:
            raise CannotRun("the original FlexGen is measured with its own dummy weights; weights=dummy")
        if spec.dtype is not DType.FLOAT16:
            raise CannotRun(f"the original FlexGen computes in float16, not in {spec.dtype}")
        self._chosen = self._choose()

    def _choose(self) -> Settings:
        spec, options = self.spec, dict(self.spec.system_options)
        largest = options.get("gpu_batch_size") == settings.LARGEST
        if largest:
            del options["gpu_batch_size"]
        chosen = settings.choose(spec.model.shape.name, options, spec.lossy)
        if not largest:
            return chosen
        size, work = ModelSize(spec.model.shape, spec.dtype), spec.workload
        block = Block(chosen, size, Machine(spec.hardware), NO_CONSTANTS, work.prompt_len, work.gen_len)
        return in_largest_batches(block, min(LARGEST_GPU_BATCH, work.num_prompts)).settings

    def is_prepared(self) -> bool:
        return package.PACKAGE.is_installed(self.files.cache)

    def prepare(self) -> None:
        """Install the package into a folder of its own."""
        package.PACKAGE.install(self.files.cache)

    def default_batch_size(self) -> int:
        """The block the settings describe, or the whole batches that the job fills."""
        prompts, chosen = self.spec.workload.num_prompts, self._chosen
        batch = min(chosen.gpu_batch_size, prompts)
        return batch * min(chosen.num_gpu_batches, prompts // batch)

    def load(self, batch_size: int) -> None:
        self.close()
        self._settings = self._chosen.for_block(batch_size)
        # Its folder comes last: what this environment has stays what it is.
        paths = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(package.PACKAGE.folder(self.files.cache))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "baselines.flexgen_original.driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        shape = self.spec.model.shape
        self._ask(
            {
                "model": shape.name,
                "shape": to_json(shape),
                "settings": self._settings.to_dict(),
                "threads": self.spec.threads,
                "gpu_memory_bytes": self.spec.hardware.gpu_memory_bytes,
                "offload_dir": str(self.files.scratch / "offload"),
            }
        )

    def generate(self, prompts: Sequence[Sequence[int]], gen_len: int, progress: Progress) -> Generation:
        """Block by block. A last block that is not full is filled up with its last prompt: the original takes no
        less."""
        size, answers = self._settings.block_size, []
        prefill_s = decode_s = 0.0
        prompt_total = sum(map(len, prompts))
        for start in range(0, len(prompts), size):
            block = [list(prompt) for prompt in prompts[start : start + size]]
            filled = block + [block[-1]] * (size - len(block))
            answer = self._ask({"prompts": filled, "gen_len": gen_len})
            answers += answer["token_ids"][: len(block)]
            first, *later = answer["costs_s"]
            prefill_s += first
            decode_s += sum(later)
            self._peak_gpu_bytes = max(self._peak_gpu_bytes, answer["peak_gpu_bytes"])
            done = start + len(block)
            progress("prefill", sum(map(len, prompts[:done])), prompt_total)
            progress("decode", done * (gen_len - 1), len(prompts) * (gen_len - 1))
        return Generation(tuple(map(tuple, answers)), prefill_s, decode_s)

    def report(self) -> SystemReport:
        notes = [
            "times are of the original's own timer, which does not count the making of its KV cache",
            "weights are the original's own dummies",
        ]
        if self._settings.is_known_wrong:
            notes.append(
                "its tokens are known to be wrong with these settings (attention on the cpu, two or more batches, "
                "overlap)"
            )
        chosen = self._settings.to_dict()
        return SystemReport(
            requested=chosen,
            realised=chosen,
            peak_bytes={"gpu": self._peak_gpu_bytes},
            lowest_tier=self._settings.lowest_tier,
            notes=tuple(notes),
        )

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # the end of its input ends it
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One line there, one line back. MemoryError or RuntimeError for what went wrong there."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; how, comes next
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the original's process ended with status {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            if answer["out_of_memory"]:
                raise MemoryError(answer["error"])
            raise RuntimeError("\n".join([answer["error"], *answer["traceback"]]))
        return answer
