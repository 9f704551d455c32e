"""What compression does to keys and values: those of real text, as transformers computes them, through the cache's
quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexgen_bench.core.accuracy import LayerError
from flexgen_bench.core.compression import Compression


def kv_errors(folder: Path, windows: Sequence[Sequence[int]], compression: Compression) -> tuple[LayerError, ...]:
    """Relative error of K and V of every layer over all ``windows`` of tokens. Loads the model with transformers, in
    float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from flexgen_bench.kernels.quantization import fake_quantize

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[tuple[int, str], list[float]] = {}
    for window in windows:
        with torch.no_grad():
            cache = model(torch.tensor([list(window)]), use_cache=True).past_key_values
        for number, layer in enumerate(cache.layers):
            for name, x in (("keys", layer.keys), ("values", layer.values)):
                totals = sums.setdefault((number, name), [0.0, 0.0, 0.0])
                totals[0] += x.numel()
                totals[1] += float((fake_quantize(x, compression) - x).norm()) ** 2
                totals[2] += float(x.norm()) ** 2
    return tuple(
        LayerError(number, name, int(count), (change / size) ** 0.5 if size else 0.0)
        for (number, name), (count, change, size) in sorted(sums.items())
    )
