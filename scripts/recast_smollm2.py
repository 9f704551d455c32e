"""Trained weights for families that no package carries: SmolLM2 as a checkpoint of another of Llama's form.

``python scripts/recast_smollm2.py mixtral FOLDER [--experts 8] [--window 4096] [--perturbed] [--dtype bfloat16]``

As it is, the new model computes what SmolLM2 does: Qwen2 with biases of zero, Mistral with a window that no text
leaves, Mixtral with copies of the one MLP as experts, whichever of them a random router chooses. ``--perturbed`` moves
biases and experts away from that, each of them by numbers of its own, so that one that is left out or mistaken for
another shows; a window that texts leave does the same for Mistral.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from flexgen_bench.checkpoints.hf_config import hf_config
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.checkpoints.source import Source, open_source
from flexgen_bench.checkpoints.writer import needed_bytes, new_folder, write_weights
from flexgen_bench.config.build import model_spec
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.progress import Progress
from flexgen_bench.models.registry import family
from flexgen_bench.models.stored_names import expected_sources

MODEL = "smollm2-135m"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_KEPT = ("rope_theta", "rope_scaling", "norm_eps", "activation")
_EXPERT = re.compile(r"block_sparse_moe\.experts\.\d+\.(w[123])")
_MLP = {"w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
# Standard deviations: of a router's weights, of biases, and of what is added to an expert, of its weights' own.
_ROUTER, _BIAS, _SHARE = 0.5, 0.1, 0.3


@dataclass(frozen=True)
class Recast:
    """kind: the family. window: tokens; None for none. experts, per_token: of a mixture. layers, vocab: of the trained
    ones, how many are kept, the first; None for all."""

    kind: str
    window: int | None = None
    experts: int = 8
    per_token: int = 2
    perturbed: bool = False
    layers: int | None = None
    vocab: int | None = None

    def shape(self, trained: ModelShape) -> ModelShape:
        options: dict[str, Any] = {key: trained.options[key] for key in _KEPT} | {"window": self.window}
        if self.kind == "mixtral":
            options |= {"experts": self.experts, "experts_per_token": self.per_token}
        if self.kind == "qwen2":
            options["full_layers"] = []
        return replace(
            trained,
            name=f"{trained.name}-as-{self.kind}",
            family=self.kind,
            num_layers=self.layers or trained.num_layers,
            vocab_size=self.vocab or trained.vocab_size,
            options=options,
        )


def recast(source: Path, target: Path, wanted: Recast, dtype: DType, progress: Progress) -> Path:
    """Write ``target``, a complete folder, from the checkpoint folder of a Llama without biases, tensor by tensor.
    UserError for a family that is not known, StoreError where something cannot be read or written."""
    with open_source(source) as trained:
        shape = wanted.shape(trained.shape)
        kind = family(shape.family)
        shapes = {_full(name): each for name, each in expected_sources(kind.inventory(shape)).items()}
        config = hf_config(shape, dtype)
        for key, token in trained.checkpoint.config.items():
            if key.endswith("_token_id"):
                setattr(config, key, token)

        def tensor(name: str) -> Tensor:
            return _tensor(trained, name.removeprefix("model."), shapes[name], wanted)

        with new_folder(target, needed_bytes(shapes, dtype)) as folder:
            config.save_pretrained(folder)
            for file in _TOKENIZER:
                if (source / file).is_file():
                    shutil.copyfile(source / file, folder / file)
            write_weights(folder, shapes, dtype, tensor, progress)
    return target


def _full(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def _tensor(trained: Source, name: str, shape: tuple[int, ...], wanted: Recast) -> Tensor:
    expert = _EXPERT.search(name)
    if name in trained.names:
        return trained.tensor(name)[: shape[0]]  # a table of fewer tokens
    if name.endswith(".bias"):
        return _noise(name, shape, _BIAS) if wanted.perturbed else torch.zeros(shape)
    if expert is None:  # the router
        return _noise(name, shape, _ROUTER)
    copied = trained.tensor(_EXPERT.sub(_MLP[expert[1]], name)).float()
    return copied + _noise(name, shape, _SHARE * float(copied.std())) if wanted.perturbed else copied


def _noise(name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """The same for the same name."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * std


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["qwen2", "mistral", "mixtral"])
    parser.add_argument("folder", type=Path, help="that is written; must not be there yet")
    parser.add_argument("--window", type=int)
    parser.add_argument("--experts", type=int, default=Recast.experts)
    parser.add_argument("--per-token", type=int, default=Recast.per_token)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--perturbed", action="store_true")
    parser.add_argument("--dtype", choices=[d.value for d in DType], default=DType.BFLOAT16.value)
    given = parser.parse_args()
    options: Mapping[str, Any] = {
        key: getattr(given, key) for key in ("kind", "window", "experts", "per_token", "layers", "perturbed")
    }
    dtype = DType(given.dtype)
    source = prepare_checkpoint(model_spec(MODEL), dtype, default_cache_dir(), _quiet)
    print(recast(source, given.folder, Recast(**options), dtype, _quiet))
    return 0


def _quiet(what: str, done: int, total: int) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
