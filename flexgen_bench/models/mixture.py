"""Mixtures of experts of Llama's form: what their configs have in common, and names of their tensors.

Options of ``ModelShape`` beside those of ``llama_like.py``: experts, experts_per_token; expert_size (their width, where
it is not ffn_size), renormalised (``parts.Router``), dense_layers (the numbers of layers with an MLP of ffn_size in
their place).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.family import config_flag, config_value
from flexgen_bench.models.inventory import Names, PartNames
from flexgen_bench.models.llama_like import LAYER_NAMES, LlamaLike
from flexgen_bench.models.parts import MLP, Experts, Router, Scoring

_PER_TOKEN, _WIDTH, _RENORMALISED = "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"
_EXPERT = "mlp.experts.{}."
EXPERT_NAMES: PartNames = {
    "router": "mlp.gate",
    "experts.gate_up": (_EXPERT + "gate_proj", _EXPERT + "up_proj"),
    "experts.down": _EXPERT + "down_proj",
}
# As transformers 5 names them in memory, and saves them on request: all experts of a layer in one tensor.
STACKED_NAMES: PartNames = {
    "router": "mlp.gate",
    "experts.gate_up": "mlp.experts.gate_up_proj",
    "experts.down": "mlp.experts.down_proj",
}


class MixtureLike(LlamaLike):
    """What differs is said by class attributes, or by ``router`` and ``shared``."""

    # Entries of a config that hold the number of experts: the family's own, and another that transformers reads, too.
    count_keys: ClassVar[tuple[str, ...]] = ("num_experts", "num_local_experts")
    # transformers' defaults: of the number of experts, of those of a token, of their width (None: that of the MLP).
    experts: ClassVar[int]
    per_token: ClassVar[int]
    expert_size: ClassVar[int | None] = None
    renormalised: ClassVar[bool | None] = None  # None: always, and no config may say otherwise
    names = Names(LAYER_NAMES | EXPERT_NAMES)
    other_names: ClassVar[tuple[Names, ...]] = (Names(LAYER_NAMES | STACKED_NAMES),)
    other_prefixes = ("model.", "")

    def extra_options(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        given = [config[key] for key in self.count_keys if config.get(key) is not None]
        if any(other != given[0] for other in given):
            raise UserError(f"config.json: {self.count_keys[1]}", given[1], f"{given[0]}, as {self.count_keys[0]}")
        entries = {self.count_keys[0]: self.experts, _PER_TOKEN: self.per_token, _WIDTH: self.expert_size, **config}
        if given:
            entries[self.count_keys[0]] = given[0]
        options = {
            "experts": count_of(entries, self.count_keys[0], 1),
            "experts_per_token": count_of(entries, _PER_TOKEN, 1),
        }
        if options["experts_per_token"] > options["experts"]:
            raise UserError(f"config.json: {_PER_TOKEN}", entries[_PER_TOKEN], f"at most {options['experts']}, or all")
        if self.expert_size is not None:
            options["expert_size"] = count_of(entries, _WIDTH, 1)
        if self.renormalised is not None:
            options["renormalised"] = config_flag(config, _RENORMALISED, self.renormalised)
        return options

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        options = shape.options
        config = {self.count_keys[0]: options["experts"], _PER_TOKEN: options["experts_per_token"]}
        if self.expert_size is not None:
            config[_WIDTH] = options["expert_size"]
        if self.renormalised is not None:
            config[_RENORMALISED] = options["renormalised"]
        return super().config_from_shape(shape) | config

    def mlp(self, shape: ModelShape, number: int) -> MLP | Experts:
        options = shape.options
        if number in (options.get("dense_layers") or ()):
            return self.dense_mlp(shape, shape.ffn_size)
        width = int(options.get("expert_size") or shape.ffn_size)
        router, expert = self.router(shape), self.dense_mlp(shape, width)
        return Experts(int(options["experts"]), expert, router, self.shared(shape), self.shared_gate)

    # Whether what the shared MLP adds is multiplied with a gate.
    shared_gate: ClassVar[bool] = False

    def shared(self, shape: ModelShape) -> MLP | None:
        """What all tokens go through, too."""
        return None

    def router(self, shape: ModelShape) -> Router:
        options = shape.options
        return Router(Scoring.SOFTMAX, int(options["experts_per_token"]), bool(options.get("renormalised", True)))


def count_of(config: Mapping[str, Any], key: str, least: int) -> int:
    """A required whole number of a config."""
    count = config_value(config, key, int)
    if count < least:
        raise UserError(f"config.json: {key}", count, f"{least} or more")
    return int(count)
