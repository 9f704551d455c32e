"""A process that runs the original: ``python -m baselines.flexgen_original.driver``, its package on the path.

One JSON object a line. The first on standard input says what to build (``Build``); each further one is ``{"prompts":
[[id, ...], ...], "gen_len": n}`` with exactly one block of prompts. Each gets an answer on standard output: the tokens
and the seconds of each token step as the original's own timer has them, or what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any, TextIO

WARM_UP_TOKENS = 32  # the original's own program warms up with prompts of this length, and one new token


class Original:
    """The original's model and its devices."""

    def __init__(self, build: dict[str, Any]) -> None:
        import torch
        from flexgen.compression import CompressionConfig
        from flexgen.flex_opt import OptLM, Policy, get_opt_config
        from flexgen.pytorch_backend import TorchDevice, TorchDisk, TorchMixedDevice
        from flexgen.utils import ExecutionEnv

        torch.set_num_threads(build["threads"])
        limit_gpu_memory(build["gpu_memory_bytes"])
        config = get_opt_config(build["model"])
        check_shape(config, build["shape"])
        gpu, cpu, disk = TorchDevice("cuda:0"), TorchDevice("cpu"), TorchDisk(build["offload_dir"])
        self._env = ExecutionEnv(gpu=gpu, cpu=cpu, disk=disk, mixed=TorchMixedDevice([gpu, cpu, disk]))
        chosen = build["settings"]
        # Groups along the output channel for weights, along the head for the cache, as its program has them.
        weights, cache = (
            CompressionConfig(num_bits=4, group_size=64, group_dim=dim, symmetric=False) for dim in (0, 2)
        )
        policy = Policy(
            chosen["gpu_batch_size"],
            chosen["num_gpu_batches"],
            *chosen["percent"],
            overlap=chosen["overlap"],
            sep_layer=chosen["sep_layer"],
            pin_weight=chosen["pin_weight"],
            cpu_cache_compute=chosen["cpu_cache_compute"],
            attn_sparsity=1.0,
            compress_weight=chosen["compress_weight"],
            comp_weight_config=weights,
            compress_cache=chosen["compress_cache"],
            comp_cache_config=cache,
        )
        self._model = OptLM(config, self._env, "_DUMMY_", policy)
        block = chosen["gpu_batch_size"] * chosen["num_gpu_batches"]
        self.generate([[2] * WARM_UP_TOKENS] * block, 1)

    def generate(self, prompts: list[list[int]], gen_len: int) -> dict[str, Any]:
        """New tokens per prompt, and seconds per token step: the first is the prefill."""
        import torch
        from flexgen.timer import timers

        timers("generate").reset()
        output = self._model.generate(prompts, max_new_tokens=gen_len)
        return {
            "token_ids": [[int(t) for t in row[len(prompts[0]) :]] for row in output],
            "costs_s": [float(cost) for cost in timers("generate").costs],
            "peak_gpu_bytes": int(torch.cuda.max_memory_allocated()),
        }

    def close(self) -> None:
        self._env.close_copy_threads()


def limit_gpu_memory(limit: int | None) -> None:
    """The cell's cap, for this process too: the one that started it cannot set it here."""
    import torch

    if limit is None:
        return
    total = torch.cuda.get_device_properties(0).total_memory
    if limit < total:
        torch.cuda.set_per_process_memory_fraction(limit / total, 0)


def check_shape(config: Any, shape: dict[str, int]) -> None:
    """The original knows models by name; a name that means another shape here must not be measured under it."""
    names = {
        "num_layers": "num_hidden_layers",
        "hidden_size": "input_dim",
        "num_heads": "n_head",
        "ffn_size": "ffn_embed_dim",
        "vocab_size": "vocab_size",
    }
    for ours, theirs in names.items():
        if getattr(config, theirs) != shape[ours]:
            raise ValueError(
                f"{config.name} of the original has {theirs}={getattr(config, theirs)}, this cell {shape[ours]}"
            )


def failure(error: BaseException) -> dict[str, Any]:
    """An error as an answer. A refused page-lock is memory that has run out, too."""
    import torch

    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory")
    )
    where = "".join(traceback.format_exception(error)).strip().splitlines()[-8:]
    return {"error": f"{type(error).__name__}: {error}", "out_of_memory": memory, "traceback": where}


def serve(source: TextIO, sink: TextIO, kind: type[Original] = Original) -> None:
    """Build what the first line says, then answer line by line until the input ends or something fails."""

    def answer(data: dict[str, Any]) -> None:
        sink.write(json.dumps(data) + "\n")
        sink.flush()

    original = None
    try:
        original = kind(json.loads(source.readline()))
        answer({"ready": True})
        for line in source:
            question = json.loads(line)
            answer(original.generate(question["prompts"], question["gen_len"]))
    except Exception as error:
        answer(failure(error))
    finally:
        if original is not None:
            original.close()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the original prints is not an answer
    serve(sys.stdin, answers)
    # Its copy threads and pinned memory must not hold the process up.
    os._exit(0)
