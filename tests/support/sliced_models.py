"""Tiny models whose layers two and four ranks can share, and engines of all ranks in threads of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flexgen_bench.core.compression import Compression
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.slices import Slice
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import Engine
from flexgen_bench.engine.generation import Running
from flexgen_bench.engine.local_wire import LocalWire
from tests.support.rank_engines import Rank, all_well, in_threads
from tests.support.tiny_models import _GPT, _MIXTURE, _ODD, VOCAB, _llama, _of, _opt

_FOUR = _ODD | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 92}
_ONE_WIDTH = {k: v for k, v in _FOUR.items() if k not in ("head_dim", "num_key_value_heads")} | {"hidden_size": 96}
_EXPERTS = _FOUR | _MIXTURE | {"intermediate_size": 44}
# Every form that a layer has: one or two sums, norms before, behind and around, biases, one matrix of q, k and v in
# each of its orders, one of gate and up, neighbours that take turns, experts with and without shared ones.
MODELS: dict[str, Callable[[], Any]] = {
    "opt": lambda: _opt(num_attention_heads=4),
    "opt-350m-like": lambda: _opt(num_attention_heads=4, do_layer_norm_before=False, word_embed_proj_dim=20),
    "llama": lambda: _llama(
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=92,
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama-even": lambda: _llama(
        hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96, tie_word_embeddings=True
    ),
    "qwen3": lambda: _of("Qwen3", **_FOUR),
    "phi3": lambda: _of(
        "Phi3", **_FOUR, sliding_window=9, rope_parameters={"rope_theta": 700.0, "partial_rotary_factor": 0.5}
    ),
    "gemma2": lambda: _of("Gemma2", **_FOUR, sliding_window=5, query_pre_attn_scalar=20, attn_logit_softcapping=3.0),
    "glm": lambda: _of("Glm", **_FOUR),
    "glm4": lambda: _of("Glm4", **_FOUR),
    "gptj": lambda: _of("GPTJ", **_GPT, rotary_dim=4),
    "codegen": lambda: _of("CodeGen", **_GPT | {"n_embd": 80, "n_head": 8}, rotary_dim=6),
    "gpt-neox": lambda: _of(
        "GPTNeoX", **_ONE_WIDTH, rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ),
    "gpt-neox-serial": lambda: _of(
        "GPTNeoX",
        **_ONE_WIDTH,
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters={"rope_theta": 300.0, "partial_rotary_factor": 1.0},
    ),
    "bloom": lambda: _of("Bloom", hidden_size=96, n_layer=3, n_head=8, vocab_size=VOCAB),
    "mixtral": lambda: _of("Mixtral", **_EXPERTS, sliding_window=6, num_local_experts=5),
    "gpt-oss": lambda: _of(
        "GptOss",
        **_EXPERTS,
        num_local_experts=5,
        sliding_window=5,
        swiglu_limit=0.6,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0},
    ),
    "qwen2-moe": lambda: _of(
        "Qwen2Moe",
        **_EXPERTS,
        num_experts=6,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=52,
        decoder_sparse_step=2,
    ),
    "glm4-moe": lambda: _of(
        "Glm4Moe",
        **_EXPERTS,
        n_routed_experts=6,
        moe_intermediate_size=20,
        n_group=3,
        topk_group=2,
        n_shared_experts=2,
        routed_scaling_factor=1.6,
        use_qk_norm=True,
        attention_bias=True,
    ),
}


def slices_of(
    checkpoint: Path, ranks: int, cache: Path, compression: Compression | None = None, dtype: DType = DType.FLOAT32
) -> list[PackedWeights]:
    """The packed weights of every rank."""
    parts = [Slice(rank, ranks) for rank in range(ranks)]
    return [PackedWeights.from_checkpoint(checkpoint, dtype, cache, compression=compression, part=p) for p in parts]


def on_slices(
    slices: Sequence[PackedWeights],
    policy: Policy,
    hardware: HardwareProfile,
    folder: Path,
    sequences: Callable[[], list[Running]],
) -> list[Rank]:
    """A job on all ranks; every rank has sequences of its own. Raises what a rank has failed with."""

    def engine(number: int, wire: LocalWire) -> Engine:
        return slices[number].engine(policy, Device.open(hardware, 1), folder, wire=wire)

    return all_well(in_threads(len(slices), engine, sequences, str(policy)))
