"""How large the inputs of each weight matrix were on a text: what calibrated scales are chosen by.

A file beside the checkpoint's weights, written by ``python -m flexgen_bench importance``: for each matrix (by
the name it has in the checkpoint) the mean square of each of its inputs. The error of a product is the sum over inputs
of weight error times input, so a weight's squared error counts as much as the mean square of the input it meets.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexgen_bench.core.compression import Compression, Scales
from flexgen_bench.core.errors import StoreError

IMPORTANCE = "importance.safetensors"
# Of the mean, added to each: what was nearly 0 on that text need not be on another.
FLOOR = 0.01


def is_calibrated(compression: Compression | None) -> bool:
    """Whether a store of this compression needs the file."""
    return compression is not None and compression.scales is Scales.CALIBRATED


def check_importance(folder: Path) -> None:
    """StoreError if a checkpoint folder has no such file."""
    if not (folder / IMPORTANCE).exists():
        raise StoreError(
            f"{folder} holds no {IMPORTANCE}, which calibrated scales are chosen by. Run python -m "
            "flexgen_bench importance MODEL (with the same dtype), or choose scales mse."
        )


def importance_of(folder: Path, name: str, inputs: int) -> Tensor:
    """(inputs,) float32, all above 0, mean about 1. StoreError if the file does not speak of this matrix, or is
    damaged."""
    path = folder / IMPORTANCE
    try:
        with safe_open(path, "pt") as file:
            squares = file.get_tensor(name).float() if name in file.keys() else None  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read ({error}). Delete it and make it again.") from error
    if squares is None or squares.shape != (inputs,) or not bool(squares.isfinite().all()):
        raise StoreError(f"{path} does not fit {name} with its {inputs} inputs. Make it again.")
    least: float = torch.finfo(torch.float32).tiny
    balanced: Tensor = squares / squares.mean().clamp_min(least) + FLOOR
    return balanced
