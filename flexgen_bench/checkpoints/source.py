"""A checkpoint folder as a model of a family here: its shape as the stored tensors have it, and where each tensor is.

Everything that reads a folder of the user's does it through ``open_source``: a tensor that is missing, that has no
place in the model, or whose numbers are not its values is an error for all of them alike.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexgen_bench.checkpoints.reader import FLOAT_DTYPES, NOTE, Checkpoint
from flexgen_bench.checkpoints.weight_files import shown
from flexgen_bench.core.closing import Closing
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.family import ModelFamily
from flexgen_bench.models.registry import family, shape_from_config
from flexgen_bench.models.stored_names import StoredNames, expected_sources, locate, other_sources

_log = logging.getLogger("flexgen_bench.stage")
_ADVICE = "Fetch the checkpoint again."
_NO_HEAD = (
    "If the head is the embedding, set tie_word_embeddings to true in config.json; else this is a "
    "model without a head, which cannot generate."
)


@dataclass(frozen=True)
class Source(Closing):
    """names: of each tensor in the checkpoint, by the family's own. Use as a context manager, or call ``close``."""

    checkpoint: Checkpoint
    family: ModelFamily
    shape: ModelShape
    names: Mapping[str, str]

    @property
    def note(self) -> str:
        """How the weights were read, in words; empty if as they are."""
        return self.checkpoint.note

    def tensor(self, source: str) -> Tensor:
        """A tensor by the family's own name, in the checkpoint's dtype."""
        return self.checkpoint.tensor(self.names[source])

    def is_standard(self, names: Collection[str], dtype: str, single: Collection[str] = ()) -> bool:
        """Whether every program can read the folder as it is: safetensors of this dtype under exactly these names,
        those in ``single`` of float32, and a config that says what the tensors do."""
        checkpoint = self.checkpoint
        return (
            checkpoint.is_safetensors
            and checkpoint.is_as_stored
            and checkpoint.names() >= set(names)
            and all(checkpoint.header(name)[1] == ("float32" if name in single else dtype) for name in names)
            and self._config_is_usual()
        )

    def unquantized_config(self) -> dict[str, Any]:
        """config.json for these tensors once they are written as plain numbers, under the full names."""
        left_out = ("torch_dtype", "quantization_config", "compression_config", "quantization")
        config = {k: v for k, v in self.checkpoint.config.items() if k not in left_out}
        if str(config.get("model_type")).lower() in self.family.other_types:
            tokens = {k: v for k, v in config.items() if k.endswith("_token_id")}
            config = self.family.config_from_shape(self.shape) | tokens
        config |= {
            "architectures": [self.family.architecture],
            "model_type": self.family.model_type,
            "tie_word_embeddings": self.shape.tied_embeddings,
        }
        return config | ({NOTE: self.note} if self.note else {})

    def _config_is_usual(self) -> bool:
        """Whether transformers builds this model from config.json as it is."""
        folder, config = self.checkpoint.folder, self.checkpoint.config
        files = [folder / name for name in ("config.json", "generation_config.json")]
        return (
            not any(f.exists() and f.read_bytes().startswith(codecs.BOM_UTF8) for f in files)
            and self.family.architecture in (config.get("architectures") or ())
            and config.get("model_type") == self.family.model_type
            and shape_from_config(config, folder.name) == self.shape
        )

    def close(self) -> None:
        self.checkpoint.close()


def open_source(folder: Path) -> Source:
    """Open a checkpoint folder and compare its tensors with what its config says. Nothing large is read, unless it has
    a head that may be the embedding again.

    Raises UserError for a model that no family here can be, StoreError for a checkpoint that is damaged, incomplete,
    quantized in a way that is not known, or holds tensors that the model has no place for.
    """
    checkpoint = Checkpoint(folder)
    try:
        shape = shape_from_config(checkpoint.config, folder.name)
        kind = family(shape.family)
        _use_other_names(checkpoint, kind, shape)
        shape = replace(shape, tied_embeddings=_is_tied(checkpoint, kind, shape))
        expected = expected_sources(kind.inventory(shape))
        stored = locate(expected, kind.prefixes, checkpoint.names())
        if shape.tied_embeddings:
            stored = _without_head(stored, kind, shape)
        _check_names(checkpoint, kind, shape, stored)
        _check_headers(checkpoint, expected, stored.found)
    except BaseException:
        checkpoint.close()
        raise
    return Source(checkpoint, kind, shape, stored.found)


def _use_other_names(checkpoint: Checkpoint, kind: ModelFamily, shape: ModelShape) -> None:
    """Let tensors that are stored under other names that the family knows be found under its own."""
    if not kind.other_names:
        return
    untied = replace(shape, tied_embeddings=False)
    own, names = kind.inventory(untied), checkpoint.names()
    missing = set(locate(expected_sources(own), kind.prefixes, names).missing)
    for other in kind.other_names if missing else ():
        elsewhere = other_sources(own, kind.inventory(untied, other))
        needed_names = {elsewhere[source][0] for source in missing if source in elsewhere}
        stored_name_of = locate(needed_names, kind.other_prefixes, names).found
        for source in missing & elsewhere.keys():
            name, first, last = elsewhere[source]
            if name in stored_name_of:
                checkpoint.rename(kind.prefixes[-1] + source, stored_name_of[name], first, last)


def _is_tied(checkpoint: Checkpoint, kind: ModelFamily, shape: ModelShape) -> bool:
    """Whether head and embedding are one matrix: the stored tensors decide, as in transformers 5 (``tie_weights``).

    A config that says so is right where only one of the two is stored (either one stands for both), or both are equal.
    """
    if not shape.tied_embeddings:
        return False
    tokens, head = _vocabulary(kind, shape)
    both = locate((tokens, head), kind.prefixes, checkpoint.names()).found
    if head not in both:
        return True
    if tokens not in both:
        checkpoint.alias(kind.prefixes[0] + tokens, both[head])
        return True
    if _equal(checkpoint.tensor(both[tokens]), checkpoint.tensor(both[head])):
        return True
    _log.warning(
        "%s: config.json ties the head to the embedding, but a different %s is stored; the stored one is used",
        checkpoint.folder,
        both[head],
    )
    return False


def _vocabulary(kind: ModelFamily, shape: ModelShape) -> tuple[str, str]:
    """The family's own names of the token table and of a head of its own."""
    tokens, *heads = kind.inventory(replace(shape, tied_embeddings=False, num_layers=1)).vocabulary
    return tokens.sources[0], heads[0].sources[0]


def _equal(one: Tensor, two: Tensor) -> bool:
    if one.data_ptr() == two.data_ptr() and one.shape == two.shape and one.dtype == two.dtype:
        return True  # .bin files hold a piece of memory under several names
    return one.dtype == two.dtype and torch.equal(one, two)


def _without_head(stored: StoredNames, kind: ModelFamily, shape: ModelShape) -> StoredNames:
    """A tied head's own copy is not unexpected."""
    _, head = _vocabulary(kind, shape)
    copies = {prefix + head for prefix in kind.prefixes}
    return replace(stored, unexpected=tuple(n for n in stored.unexpected if n not in copies))


def _check_names(checkpoint: Checkpoint, kind: ModelFamily, shape: ModelShape, stored: StoredNames) -> None:
    folder, count = checkpoint.folder, len(stored.found) + len(stored.missing)
    _, head = _vocabulary(kind, shape)
    further = {n for n in stored.unexpected if kind.is_further(n, checkpoint.config, shape)}
    unexpected = [n for n in stored.unexpected if n not in further and not _adds_nothing(checkpoint, n, stored)]
    if stored.missing:
        missing = [n if n == head else kind.prefixes[0] + n for n in stored.missing]
        also = f" It holds {shown(unexpected)}, for which there is no place." if unexpected else ""
        advice = _NO_HEAD if missing == [head] else _ADVICE
        raise StoreError(f"{folder} lacks {len(missing)} of {count} tensors: {shown(missing)}.{also} {advice}")
    if unexpected:
        raise StoreError(
            f"{folder} holds {len(unexpected)} tensors that a {shape.family} model of its config.json has no place "
            "for: "
            f"{shown(unexpected)}. Leaving them out would change results: correct config.json if it "
            "denies them, or use a checkpoint of this family without them."
        )
    unused = [*stored.other_heads, *sorted(further)]
    if unused:
        _log.warning("%s: %s is not used to generate", folder, shown(unused))


def _adds_nothing(checkpoint: Checkpoint, name: str, stored: StoredNames) -> bool:
    """A bias of zeros for a matrix of the model: GPTQ's tools write one for every matrix."""
    matrix = name.removesuffix("bias") + "weight"
    return name.endswith(".bias") and matrix in stored.found.values() and not bool(checkpoint.tensor(name).any())


def _check_headers(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], stored_names: Mapping[str, str]
) -> None:
    """Shapes are those of the config, and all numbers are plain ones."""
    for source, name in stored_names.items():
        shape, dtype = checkpoint.header(name)
        if shape != expected[source]:
            raise StoreError(
                f"{checkpoint.folder}: tensor {name} has shape {shape}, config.json implies "
                f"{expected[source]}. {_ADVICE}"
            )
        if dtype not in FLOAT_DTYPES:
            raise StoreError(
                f"{checkpoint.folder}: tensor {name} is {dtype}, which are codes of a quantization that "
                "nothing in the checkpoint explains. Use the checkpoint without quantization."
            )
