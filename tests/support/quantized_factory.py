"""Checkpoints quantized as the tools of each scheme write them, beside the weights that they stand for.

Written from the formats' descriptions, value by value and without the product's code: packing here, unpacking there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Tensors of one matrix by the last part of their names, and what the matrix is.
Quantized = tuple[dict[str, Tensor], Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def write(folder: Path, quantize: Callable[[Tensor], Quantized], config: dict[str, Any] | None) -> dict[str, Tensor]:
    """Quantize every matrix of the layers of a checkpoint in place; returns what all of its tensors stand for."""
    state, stored, meant = load_file(folder / "model.safetensors"), {}, {}
    for name, tensor in state.items():
        if "layers" in name and tensor.ndim == 2:
            parts, meant[name] = quantize(tensor)
            base = name.removesuffix(".weight")
            stored |= {f"{base}.{role}": part.contiguous() for role, part in parts.items()}
        else:
            stored[name] = meant[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, quantization_config=config)
    return meant


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def generator(w: Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(w.numel())


def words(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Rows of codes as 32-bit words, the lowest bits first; the last word of a row may be filled with zeros."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    packed = []
    fill = [0] * (-codes.shape[1] % per_word)
    for row in ([*own, *fill] for own in codes.tolist()):
        packed_row = []
        for start in range(0, len(row), per_word):
            word = sum(row[start + column] << (bits * place) for place, column in enumerate(order))
            packed_row.append(word - (1 << 32) if word >= 1 << 31 else word)
        packed.append(packed_row)
    return torch.tensor(packed, dtype=torch.int32)


def int8_channels(w: Tensor) -> Quantized:
    scale = w.abs().amax(1, keepdim=True) / 127
    codes = (w / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def int8_asymmetric(w: Tensor) -> Quantized:
    scale = (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / 255
    zero = (-128 - w.amin(1, keepdim=True) / scale).round().to(torch.int8)
    codes = (w / scale + zero).round().clamp(-128, 127).to(torch.int8)
    parts = {"weight": codes, "weight_scale": scale, "weight_zero_point": zero}
    return parts, (codes.float() - zero.float()) * scale


def fp8_tensor(w: Tensor) -> Quantized:
    """One scale for the matrix, and a static one for activations beside it."""
    scale = w.abs().max() / 448
    codes = (w / scale).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.7)}
    return parts, codes.float() * scale


def fp8_channels(w: Tensor) -> Quantized:
    scale = (w.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (w / scale.float()).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def fp8_blocks(size: tuple[int, int]) -> Callable[[Tensor], Quantized]:
    """DeepSeek-V3: blocks at the right and lower edges are smaller."""

    def quantize(w: Tensor) -> Quantized:
        rows, columns = (-(-n // s) for n, s in zip(w.shape, size, strict=True))
        scale = torch.rand((rows, columns), generator=generator(w)) / 100 + 1e-3
        spread = torch.empty_like(w)
        for i in range(w.shape[0]):
            for j in range(w.shape[1]):
                spread[i, j] = scale[i // size[0], j // size[1]]
        codes = (w / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scale}, codes.float() * spread

    return quantize


def packed(bits: int, group: int, asymmetric: bool = False, order: bool = False) -> Callable[[Tensor], Quantized]:
    """compressed-tensors' pack-quantized: signed codes with half the range added, in words along inputs."""

    def quantize(w: Tensor) -> Quantized:
        g, (out, inp), half = generator(w), w.shape, 1 << (bits - 1)
        count = -(-inp // group)
        codes = torch.randint(-half, half, (out, inp), generator=g)
        scale = torch.rand((out, count), generator=g) * 0.2 / half + 1e-3
        zero = torch.zeros((out, count), dtype=torch.int64)
        if asymmetric:
            zero = torch.randint(-half, half, (out, count), generator=g)
        index = torch.arange(inp) // group
        if order:
            index = index[torch.randperm(inp, generator=g)]
        parts = {
            "weight_packed": words(codes + half, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([out, inp]),
        }
        if asymmetric:
            parts["weight_zero_point"] = words((zero + half).T, bits).T
        if order:
            parts["weight_g_idx"] = index.int()
        return parts, (codes - zero[:, index]).float() * scale[:, index]

    return quantize


def gptq(bits: int, group: int, order: bool = False, second: bool = False) -> Callable[[Tensor], Quantized]:
    """AutoGPTQ's form; ``second``: zero points as they are, not one less. Every matrix comes with a bias of zeros."""

    def quantize(w: Tensor) -> Quantized:
        g, (out, inp) = generator(w), w.shape
        count = 1 if group == -1 else -(-inp // group)
        codes = torch.randint(0, 1 << bits, (inp, out), generator=g)
        zero = torch.randint(0, 1 << bits, (count, out), generator=g)
        scale = (torch.rand((count, out), generator=g) * 0.4 / (1 << bits) + 1e-3).half()
        index = torch.arange(inp) // (inp if group == -1 else group)
        if order:
            index = index[torch.randperm(inp, generator=g)]
        kept = zero if second else (zero - 1) % (1 << bits)
        parts = {
            "qweight": words(codes.T, bits).T,
            "qzeros": words(kept, bits),
            "scales": scale,
            "g_idx": index.int(),
            "bias": torch.zeros(out, dtype=torch.float16),
        }
        return parts, ((codes - zero[index]).float() * scale.float()[index]).T.contiguous()

    return quantize


def awq(group: int) -> Callable[[Tensor], Quantized]:
    """AutoAWQ's gemm form: eight outputs of an input in a word, in an order of its own."""

    def quantize(w: Tensor) -> Quantized:
        g, (out, inp) = generator(w), w.shape
        count = -(-inp // group)
        codes = torch.randint(0, 16, (inp, out), generator=g)
        zero = torch.randint(0, 16, (count, out), generator=g)
        scale = (torch.rand((count, out), generator=g) * 0.02 + 1e-3).half()
        index = torch.arange(inp) // group
        parts = {"qweight": words(codes, 4, AWQ_ORDER), "qzeros": words(zero, 4, AWQ_ORDER), "scales": scale}
        return parts, ((codes - zero[index]).float() * scale.float()[index]).T.contiguous()

    return quantize
