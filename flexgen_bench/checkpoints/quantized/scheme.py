"""Which quantization a checkpoint has: by its config, or by the names and types of its tensors. What is not known is
refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexgen_bench.checkpoints.quantized.gptq import AWQ, GPTQ
from flexgen_bench.checkpoints.quantized.microscaled import Microscaled
from flexgen_bench.checkpoints.quantized.scaled import CompressedTensors, Scaled
from flexgen_bench.checkpoints.quantized.view import ADVICE, RUNTIME, DequantizedView
from flexgen_bench.checkpoints.tensors import Tensors
from flexgen_bench.checkpoints.weight_files import read_json, shown
from flexgen_bench.core.errors import StoreError

# Where a folder says how it is quantized: entries of config.json, then files of their own, with the method of those
# that name none.
_ENTRIES = ("quantization_config", "compression_config", "quantization")
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# The last part of a name that only a quantized checkpoint has, and whose it is.
_SIGNS: Mapping[str, str] = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "weight_scale": "fp8 or compressed-tensors",
    "weight_scale_inv": "fp8 in blocks",
    "weight_packed": "compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "weight_scale_2": "NVFP4",
    "weight_global_scale": "NVFP4",
    "weight_shape": "compressed-tensors",
    "SCB": "bitsandbytes",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "nested_absmax": "bitsandbytes",
    "weight_format": "bitsandbytes",
    "bitsandbytes__nf4": "bitsandbytes",
    "bitsandbytes__fp4": "bitsandbytes",
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "codes": "AQLM",
    "weight_scales": "EETQ",
    "_data": "quanto",
    "scales": "MLX, GPTQ or AWQ",
    "Qidxs": "QuIP#",
    "q_perm": "EXL2",
    "q_weight": "EXL2",
    "B": "Marlin",
    "blocks": "MXFP4",
}
# Element types that are never plain weights.
_CODES = ("int", "uint", "float8", "float4", "F4", "F6", "F8")


def quantization_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a folder says about its quantization, with ``quant_method`` filled in; None where it says nothing."""
    for entry in _ENTRIES:
        section = config.get(entry)
        if section:
            if not isinstance(section, Mapping):
                raise StoreError(f"{folder / 'config.json'}: {entry} is not a JSON object.")
            inner = section.get("quantization")
            stated = section if not isinstance(inner, Mapping) else inner
            return {"quant_method": _method(stated, entry), **_stated(stated)}
    for file, method in _FILES.items():
        try:
            section = read_json(folder / file)
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise StoreError(f"{folder / file} is not JSON ({error}).") from error
        if isinstance(section, Mapping) and section:
            inner = section.get("quantization")
            stated = inner if method == "modelopt" and isinstance(inner, Mapping) else section
            return {"quant_method": method, **_stated(stated)}
    return None


def _stated(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is not None}


def _method(section: Mapping[str, Any], entry: str) -> str:
    """Of a config that does not name its method."""
    if entry == "quantization" and "quant_algo" not in section:
        return "mlx"
    if entry == "compression_config":
        return "compressed-tensors"
    if section.get("load_in_8bit") or section.get("load_in_4bit"):
        return "bitsandbytes"
    for key, method in (
        ("config_groups", "compressed-tensors"),
        ("quant_algo", "modelopt"),
        ("desc_act", "gptq"),
        ("w_bit", "awq"),
    ):
        if key in section:
            return method
    return "unknown"


def dequantized(
    stored: Tensors, quantization: Mapping[str, Any] | None, where: Path
) -> DequantizedView | Microscaled | None:
    """The weights behind a checkpoint's tensors; None if they are plain numbers.

    Raises StoreError naming the scheme if it is not read here, or if tensors look quantized and nothing says how.
    """
    if quantization is None:
        _check_unquantized(stored, where)
        return None
    method = str(quantization["quant_method"]).lower().replace("_", "-")
    if method == "gptq":
        return GPTQ(stored, quantization, where)
    if method == "awq":
        return AWQ(stored, quantization, where)
    if method == "compressed-tensors":
        return CompressedTensors(stored, quantization, where)
    if method == "mxfp4":
        return Microscaled(stored, quantization, where)
    algorithm = str(quantization.get("quant_algo"))
    scaled = {"fp8": "fp8", "fbgemm-fp8": "fp8", "modelopt FP8": "fp8 (modelopt)"}
    scheme = f"{method} {algorithm}" if method == "modelopt" else method
    if scheme in scaled:
        return Scaled(stored, quantization, where, scaled[scheme])
    raise StoreError(f"{where}: quantization by {scheme} is not read here. {ADVICE}")


def _check_unquantized(stored: Tensors, where: Path) -> None:
    """Nothing says that the checkpoint is quantized: its tensors must not look like it."""
    for name in sorted(stored.names()):
        role = name.rpartition(".")[2]
        if role in _SIGNS or role in RUNTIME:
            scheme = _SIGNS.get(role, "fp8 or int8")
            raise StoreError(
                f"{where}: tensor {name} belongs to a quantization ({scheme}), but neither config.json nor "
                f"{', '.join(_FILES)} says which. Add the quantization_config, or: {ADVICE}"
            )
    codes = sorted(
        name
        for name in stored.names()
        if name.endswith((".weight", ".bias")) and stored.header(name)[1].startswith(_CODES)
    )
    if codes:
        kind = stored.header(codes[0])[1]
        raise StoreError(
            f"{where}: {len(codes)} tensors are {kind} ({shown(codes)}), and no quantization_config "
            f"says what their numbers mean. {ADVICE}"
        )
