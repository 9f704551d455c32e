"""Checkpoints as people have them: files, config, and weights as plain numbers, however they are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flexgen_bench.checkpoints.quantized.microscaled import Microscaled
from flexgen_bench.checkpoints.quantized.scheme import dequantized, quantization_of
from flexgen_bench.checkpoints.tensors import Tensors
from flexgen_bench.checkpoints.weight_files import CheckpointFiles, read_json
from flexgen_bench.core.errors import StoreError

# Where the config of a folder that was made of another one says how its weights were read.
NOTE = "flexgen_bench_note"
# Element types that hold plain numbers.
FLOAT_DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Part:
    """Rows ``first .. last-1`` of a tensor ``stored``. Where it has more dimensions than what is wanted (``dims``),
    it is a stack of such, one below the other: of experts' matrices (E, out, in), or of their biases (E, out).

    transposed: matrices are stored (in, out).
    """

    stored: str
    first: int
    last: int
    dims: int
    transposed: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part, from the stored tensor's."""
        if self.transposed:
            stored = (*stored[:-2], stored[-1], stored[-2])
        stack, rest = stored[: 1 - self.dims or None], stored[len(stored) + 1 - self.dims :]
        return max(0, min(self.last, math.prod(stack)) - self.first), *rest

    def of(self, tensor: Tensor) -> Tensor:
        """The part of the stored tensor."""
        tensor = tensor.mT if self.transposed else tensor
        if tensor.ndim == self.dims:
            return tensor[self.first : self.last]
        return self.of_rows(tensor, tensor.shape[-self.dims])

    def of_rows(self, stack: Tensor, rows: int) -> Tensor:
        """The part of a stack of so many rows each; it lies within one of them, so that nothing else is copied."""
        number, first = divmod(self.first, rows)
        return stack[number][first : first + self.last - self.first]


class Checkpoint:
    """The tensors of a checkpoint folder by name. Nothing is read before it is asked for.

    Quantized weights are given dequantized, under the name ``….weight``; what they are made of has no name of its own.
    quantization: what the folder says about it, or None. note: how the weights were read, in words; empty if as they
    are.
    """

    def __init__(self, folder: Path) -> None:
        """Raises StoreError for a folder that is not a checkpoint, is damaged, or is quantized in a way that is not
        known."""
        self.folder = folder
        if not folder.is_dir():
            raise StoreError(f"checkpoint folder {folder} does not exist.")
        self.config = read_config(folder)
        if (folder / "adapter_config.json").exists():
            raise StoreError(
                f"{folder} holds an adapter (adapter_config.json), which changes the weights. Merge "
                "it into them (peft: merge_and_unload) and save the whole model."
            )
        self._files = CheckpointFiles(folder)
        self.files, self.is_safetensors = self._files.files, self._files.is_safetensors
        self.quantization = quantization_of(folder, self.config)
        self._tensors: Tensors = self._files
        self.note = str(self.config.get(NOTE, ""))
        view = dequantized(self._files, self.quantization, folder)
        if view is not None:
            self._tensors, self.note = view, view.note
        self._aliases: dict[str, str] = {}
        self._parts: dict[str, Part] = {}
        self._names: frozenset[str] | None = None  # kept: a mixture has tens of thousands, and asks for each

    def names(self) -> frozenset[str]:
        if self._names is None:
            whole = self._tensors.names() - {part.stored for part in self._parts.values()}
            self._names = whole | self._aliases.keys() | self._parts.keys()
        return self._names

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype (torch's name) of a tensor, without reading it."""
        if name in self._parts:
            part = self._parts[name]
            shape, dtype = self._tensors.header(part.stored)
            return part.shape(shape), dtype
        return self._tensors.header(self._aliases.get(name, name))

    def tensor(self, name: str) -> Tensor:
        """One tensor in the checkpoint's own dtype (float32 if it was quantized); StoreError if it is missing or its
        file is damaged."""
        if name in self._parts:
            part = self._parts[name]
            return part.of(self._tensors.tensor(part.stored))
        return self._tensors.tensor(self._aliases.get(name, name))

    def alias(self, name: str, stored: str) -> None:
        """Let a tensor be found under a second name."""
        self._aliases[name], self._names = stored, None

    def rename(self, name: str, part: Part) -> None:
        """Let a part of a tensor be found under another name, and the tensor no more under its own."""
        self._parts[name], self._names = part, None

    def microscaled(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Blocks (out, in / 32, 16) and scales (out, in / 32) of a matrix that is stored in MXFP4, as they are; None:
        it is not."""
        if not isinstance(self._tensors, Microscaled):
            return None
        part = self._parts.get(name)
        packed = self._tensors.packed(name if part is None else part.stored)
        if packed is None or part is None:
            return packed
        blocks, scales = (part.of_rows(stack, stack.shape[1]) for stack in packed)
        return blocks, scales

    @property
    def stored(self) -> Tensors:
        """The tensors as they are in the files, under their names there."""
        return self._files

    @property
    def keeps_packing(self) -> bool:
        """Whether weights are quantized in a way that they keep."""
        return isinstance(self._tensors, Microscaled)

    @property
    def own_dtype(self) -> str:
        """The element type of the weights: what config.json says, else that of the first plain tensor in the files,
        which is what transformers does (``get_state_dict_dtype``). torch's name, not necessarily one of
        ``core.model.DType``."""
        stated = self.config.get("dtype") or self.config.get("torch_dtype")
        if stated is not None and str(stated).removeprefix("torch.") in FLOAT_DTYPES:
            return str(stated).removeprefix("torch.")
        if stated is not None and not str(stated).removeprefix("torch.").startswith(("float8", "int8")):
            return str(stated)  # for the caller to refuse by its name
        weights = self._tensors.names() & self._files.names()
        for name in self._files.in_order():
            if name in weights and self._files.header(name)[1] in FLOAT_DTYPES:
                return self._files.header(name)[1]
        raise StoreError(
            f"neither config.json nor a tensor of {self.folder} says in what type to compute. "
            "Give dtype=bfloat16, float16 or float32."
        )

    def close(self) -> None:
        self._files.close()


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. StoreError if there is none or it is not one."""
    path = folder / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        raise StoreError(f"{folder} has no config.json, so it is not a checkpoint folder.") from error
    except ValueError as error:
        raise StoreError(f"{path} is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise StoreError(f"{path} does not hold a JSON object.")
    return config


def note_of(folder: Path) -> str:
    """What whoever wrote the folder wants said of its weights; "" for nothing."""
    return str(read_config(folder).get(NOTE) or "") if (folder / "config.json").is_file() else ""
