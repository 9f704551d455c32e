"""KTransformers: attention on a GPU, experts on the cpu, behind SGLang's server. Prepared against its documentation; it
has never run here (README.md)."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from baselines.common.constants import only_options, read_count
from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.core.model import DType
from flexgen_bench.core.progress import Progress
from flexgen_bench.core.record import SystemReport
from flexgen_bench.systems.contract import Capabilities, Generation, System

FAMILIES = ("qwen3_moe", "glm4_moe")
INSTALL = (
    "pip install kt-kernel, and SGLang from its branch: "
    "pip install 'git+https://github.com/kvcache-ai/sglang.git#subdirectory=python' (in an environment of their own)"
)
START_S, ANSWER_S = 1800.0, 86_400.0


@dataclass(frozen=True)
class Settings:
    """gpu_experts: of each layer, so many on the GPU; thread_pools: as many as the machine has NUMA nodes;
    prefill_threshold: prompts of so many tokens and more are computed on the GPU layer by layer."""

    gpu_experts: int = 0
    thread_pools: int = 1
    prefill_threshold: int | None = None

    @staticmethod
    def of(options: Mapping[str, Any]) -> Settings:
        """Raises UserError naming an option."""
        only_options(options, ("gpu_experts", "thread_pools", "prefill_threshold"))
        experts = options.get("gpu_experts", 0)
        if not isinstance(experts, int) or isinstance(experts, bool) or experts < 0:
            raise UserError("system.options.gpu_experts", experts, "an integer of at least 0")
        return Settings(experts, read_count(options, "thread_pools") or 1, read_count(options, "prefill_threshold"))

    def command(self, checkpoint: Path, port: int, threads: int, batch: int, tokens: int) -> list[str]:
        """The server's (doc/en/kt-kernel/Native-Precision-Tutorial.md). tokens: of the longest sequence."""
        command = [sys.executable, "-m", "sglang.launch_server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--model", str(checkpoint), "--kt-weight-path", str(checkpoint), "--kt-method", "BF16"]
        command += ["--kt-cpuinfer", str(threads), "--kt-threadpool-count", str(self.thread_pools)]
        command += ["--kt-num-gpu-experts", str(self.gpu_experts), "--max-running-requests", str(batch)]
        command += ["--max-total-tokens", str(batch * tokens), "--skip-tokenizer-init", "--disable-radix-cache"]
        if self.prefill_threshold is not None:
            command += ["--kt-gpu-prefill-token-threshold", str(self.prefill_threshold)]
        return command


class KTransformersSystem(System):
    """Options: ``Settings``."""

    capabilities: ClassVar[Capabilities] = Capabilities(accelerators=("cuda",), needs=("torch",), gpu_cap=False)
    _server: subprocess.Popen[bytes] | None = None

    def check(self) -> None:
        self._settings = Settings.of(self.spec.system_options)
        shape, dtype = self.spec.model.shape, self.spec.dtype
        if shape.family not in FAMILIES:
            raise CannotRun(
                f"KTransformers keeps experts on the cpu; {shape.family} is none of the families it is prepared for "
                f"here: {', '.join(FAMILIES)}"
            )
        if dtype is not DType.BFLOAT16:
            raise CannotRun(f"KTransformers reads plain weights in bfloat16, not in {dtype}; dtype=bfloat16")
        missing = [name for name in ("kt_kernel", "sglang") if find_spec(name) is None]
        if missing:
            raise CannotRun(f"not installed: {', '.join(missing)}. {INSTALL}")
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        if "avx512f" not in flags:
            raise CannotRun("KTransformers computes experts in bfloat16 with AVX-512, which this processor lacks")

    def load(self, batch_size: int) -> None:
        self.close()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        work = self.spec.workload
        command = self._settings.command(
            self.files.checkpoint, self._port, self.spec.threads, batch_size, work.prompt_len + work.gen_len
        )
        self._batch_size = batch_size
        self._server = subprocess.Popen(command, stdout=sys.stderr)
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                self._ask("/health", None, 5.0)
                return
            if self._server.poll() is not None:
                raise RuntimeError(f"SGLang's server ended with status {self._server.returncode}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"SGLang's server is not ready after {START_S:.0f} s")
            time.sleep(1)

    def generate(self, prompts: Sequence[Sequence[int]], gen_len: int, progress: Progress) -> Generation:
        """Batch after batch, each as one request: once for its first token, which is the prefill, once for all."""
        answers: list[tuple[int, ...]] = []
        prefill = decode = 0.0
        for start in range(0, len(prompts), self._batch_size):
            batch = [list(prompt) for prompt in prompts[start : start + self._batch_size]]
            first = self._timed(batch, 1)[1]
            found, whole = self._timed(batch, gen_len)
            prefill += first
            decode += max(0.0, whole - first)
            answers += found
            progress("decode", len(answers) * (gen_len - 1), len(prompts) * (gen_len - 1))
        return Generation(tuple(answers), prefill, decode)

    def _timed(self, batch: list[list[int]], tokens: int) -> tuple[list[tuple[int, ...]], float]:
        asked = {
            "input_ids": batch,
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        }
        begin = time.perf_counter()
        answer = self._ask("/generate", asked, ANSWER_S)
        return [tuple(one["output_ids"]) for one in answer], time.perf_counter() - begin

    def _ask(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def report(self) -> SystemReport:
        return SystemReport(
            requested=dict(self.spec.system_options),
            realised={"gpu_experts": self._settings.gpu_experts},
            lowest_tier="cpu",
            notes=("the first token is timed by a run of its own; no prefix cache",),
        )

    def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.terminate()
            try:
                server.wait(timeout=60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
