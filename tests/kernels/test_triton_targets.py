"""What Triton makes of the kernels for devices that are not here: it compiles for any of them without one."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch

from flexgen_bench.core.compression import Compression
from flexgen_bench.kernels.packed_cache import PackedKernels, check
from flexgen_bench.kernels.trial import WrongNumbers
from tests.kernels.test_packed_cache import append, attend


def compiled(function: Any, kinds: dict[str, str], fixed: dict[str, Any], capability: int) -> Any:
    """kinds: of those arguments that are not int32; fixed: those that are known when it is compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in names}
    known = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=known)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_kernels_compile_without_tensor_cores(capability: int) -> None:
    """A T4 (7.5) is none of the devices that Triton promises to support, and it has lost the way to that one's tensor
    cores. No kernel asks for them."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton: pip install triton")
    from flexgen_bench.kernels import packed_triton, quantized_triton

    half = dict.fromkeys(("k", "v", "q", "mask", "out", "params", "numbers"), "*fp16")
    kinds = half | {"codes": "*u8", "sinks": "*fp32", "scale": "fp32"}
    of_cache = {"bits": 4, "size": 64}
    of_attention = of_cache | {"columns": 64, "block": 32, "has_mask": True, "has_sinks": True}
    unpacking = {"bits": 4, "group_size": 64, "is_micro": False, "block": 1024}
    made = [
        compiled(quantized_triton._dequantize, kinds, unpacking, capability),
        compiled(quantized_triton._dequantize, kinds | {"numbers": "*u8"}, unpacking | {"is_micro": True}, capability),
        compiled(packed_triton._append, kinds, of_cache | {"block": 64}, capability),
        compiled(packed_triton._attend, kinds, of_attention, capability),
    ]
    for kernel in made:
        assert kernel.asm["cubin"].startswith(b"\x7fELF")
        assert f".target sm_{capability}" in kernel.asm["ptx"]
        assert not re.search(r"\b(wg)?mma\.", kernel.asm["ptx"])


def test_kernels_of_a_cache_are_looked_at_before_they_are_used() -> None:
    """On two tokens: what is appended has the bits of quantizing, and attention over it is that over its values."""
    cpu, four = torch.device("cpu"), Compression(4, 16)
    check(PackedKernels(append, attend), cpu, four, torch.float32)
    check(PackedKernels(append, attend), cpu, Compression(8, 64), torch.float16)

    def off_by_one(k: Any, v: Any, codes: Any, params: Any, compression: Any) -> None:
        append(k, v, codes, params, compression)
        codes[1, ..., -1] ^= 1

    def swapped(q: Any, codes: Any, params: Any, *others: Any) -> Any:
        return attend(q, codes.flip(0), params.flip(0), *others)

    for kernels in (PackedKernels(off_by_one, attend), PackedKernels(append, swapped)):
        with pytest.raises(WrongNumbers):
            check(kernels, cpu, four, torch.float32)
