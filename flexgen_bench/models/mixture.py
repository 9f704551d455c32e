"""What configs of mixtures of experts have in common, and names of their tensors.

Options of ``ModelShape``: experts and experts_per_token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.models.family import config_value
from flexgen_bench.models.inventory import PartNames

EXPERTS, PER_TOKEN = "experts", "experts_per_token"
_PER_TOKEN_KEY = "num_experts_per_tok"
# As transformers 5 names them in memory, and saves them on request.
STACKED_NAMES: PartNames = {
    "router": "mlp.gate",
    "experts.gate_up": "mlp.experts.gate_up_proj",
    "experts.down": "mlp.experts.down_proj",
}


def expert_counts(config: Mapping[str, Any], key: str, experts: int, per_token: int) -> dict[str, int]:
    """How many experts a layer has, and a token: entries of a config, with transformers' defaults where they are
    missing."""
    given = {key: experts, _PER_TOKEN_KEY: per_token, **config}
    count, chosen = (config_value(given, name, int) for name in (key, _PER_TOKEN_KEY))
    if count < 1:
        raise UserError(f"config.json: {key}", count, "1 or more")
    if not 1 <= chosen <= count:
        raise UserError(f"config.json: {_PER_TOKEN_KEY}", chosen, f"1 to {count}, which is {key}")
    return {EXPERTS: count, PER_TOKEN: chosen}
