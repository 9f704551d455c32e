"""DeepSpeed ZeRO-Inference: ZeRO stage 3 with the parameters in host memory or on an NVMe drive."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any, ClassVar

from baselines import hf_generate as hf
from baselines.deepspeed import jit
from baselines.hf_system import HFSystem
from flexgen_bench.core.errors import CannotRun, unknown_choice
from flexgen_bench.core.model import DType
from flexgen_bench.core.record import SystemReport
from flexgen_bench.systems.contract import Capabilities

MODES = ("cpu", "nvme")
# What DeepSpeed compiles for nvme, by the names of torch's extension folders.
OPERATORS = ("pin_memory", "async_io")
_stage = logging.getLogger("flexgen_bench.stage")


class DeepSpeedSystem(HFSystem):
    """Option ``offload``: cpu or nvme (a swap folder, read and written with asynchronous direct I/O)."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        needs=("torch", "transformers", "accelerate", "deepspeed"), scores=True
    )
    _engine: Any = None

    def check(self) -> None:
        self._mode = str(self.spec.system_options.get("offload", "cpu"))
        if self._mode not in MODES:
            raise unknown_choice("system.options.offload", self._mode, MODES)
        self._device = hf.compute_device(self.spec)
        if self._device.type == "cpu" and self.spec.dtype is DType.FLOAT16:
            raise CannotRun("DeepSpeed refuses float16 on a CPU; use dtype=bfloat16 or float32")
        if self._mode == "cpu":
            hf.check_weights_fit(self.spec, self.files.checkpoint, "deepspeed with offload=cpu")
        else:
            jit.check_async_io_buildable()

    def is_prepared(self) -> bool:
        return self._mode != "nvme" or all(map(jit.is_built, OPERATORS))

    def prepare(self) -> None:
        """Compile the operators of offload=nvme."""
        _stage.info("compiling DeepSpeed's asynchronous I/O operator: some minutes, only once")
        jit.use_own_programs()
        jit.delete_stale_locks()
        from deepspeed.accelerator import get_accelerator

        get_accelerator().create_op_builder("AsyncIOBuilder").load()

    def load(self, batch_size: int) -> None:
        self._batch_size = batch_size
        if self._engine is not None:
            return
        jit.use_own_programs()
        jit.delete_stale_locks()
        import deepspeed

        self._join_alone()
        from transformers.integrations import HfDeepSpeedConfig

        config = self._config()
        # transformers looks for this object while it builds the model: it must stay alive.
        self._keep = HfDeepSpeedConfig(config)
        model = hf.load_model(self.files.checkpoint, hf.torch_dtype(self.spec))
        self._engine = deepspeed.initialize(model=hf.prepare_model(model), config=config)[0]
        self._model = self._engine.module.eval()

    def _join_alone(self) -> None:
        """A process group of one, without a launcher."""
        import deepspeed
        import deepspeed.ops

        # Shared-memory collectives: of no use to one rank, and compiled for the better part of a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        deepspeed.init_distributed("nccl" if self._device.type == "cuda" else "gloo")

    def _config(self) -> dict[str, Any]:
        shape = self.spec.model.shape
        layer_values = 2 * shape.hidden_size * max(shape.hidden_size, shape.ffn_size // 2)
        offload: dict[str, Any] = {
            "device": self._mode,
            # Page-locked memory speeds up copies to a GPU; on a plain host there are none.
            "pin_memory": self._device.type == "cuda",
        }
        if self._mode == "nvme":
            offload |= {
                "nvme_path": str(self.files.scratch),
                "buffer_count": 5,
                # Must hold the largest parameter: an embedding or a feed-forward matrix.
                "buffer_size": max(
                    (shape.vocab_size + 8) * shape.hidden_size,
                    (shape.max_positions + 8) * shape.hidden_size,
                    shape.ffn_size * shape.hidden_size,
                    shape.num_heads * shape.head_dim * shape.hidden_size,
                ),
            }
        return {
            "fp16": {"enabled": self.spec.dtype is DType.FLOAT16},
            "bf16": {"enabled": self.spec.dtype is DType.BFLOAT16},
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": self._device.type == "cuda",
                "stage3_prefetch_bucket_size": layer_values,
                "stage3_param_persistence_threshold": shape.hidden_size,
                "stage3_max_live_parameters": layer_values,
                "offload_param": offload,
            },
            "aio": {
                "block_size": 2**20,
                "queue_depth": 16,
                "intra_op_parallelism": 1,
                "single_submit": False,
                "overlap_events": True,
            },
        }

    def report(self) -> SystemReport:
        away = "disk" if self._mode == "nvme" else "cpu"
        here = "gpu" if self._device.type == "cuda" else "cpu"
        held: dict[str, int] = {}
        for parameter in self._model.parameters():
            # Small parameters "persist" on the compute device.
            tier = here if parameter.ds_persist else away
            held[tier] = held.get(tier, 0) + parameter.ds_numel * parameter.element_size()
        return SystemReport(
            requested={"offload": self._mode},
            realised={"weights": hf.shares(held), "weight_bytes": held},
            peak_bytes=hf.peak_gpu_bytes(self._device),
            lowest_tier=away,
            notes=(
                "prompts of similar length are batched together",
                *(["disk is read with direct I/O, past the page cache"] if away == "disk" else []),
            ),
        )

    def close(self) -> None:
        import torch

        super().close()
        self._engine = None
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
