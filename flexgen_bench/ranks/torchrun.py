"""Whether ``torchrun`` has started this process as one of several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexgen_bench.core.errors import UserError


@dataclass(frozen=True)
class Torchrun:
    """What torchrun (or whoever sets the same variables) says about this process. restart: how often it has started
    all of them again; agent_store: the launcher has the store, not rank 0."""

    rank: int
    ranks: int
    here: int
    local_rank: int
    host: str
    port: int
    agent_store: bool = False
    restart: int = 0

    @staticmethod
    def of(environment: Mapping[str, str]) -> Torchrun | None:
        """None where nobody has started several processes."""
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if any(name not in environment for name in names) or environment["WORLD_SIZE"] == "1":
            return None
        ranks = _integer(environment, "WORLD_SIZE", 1, 2**16)
        rank = _integer(environment, "RANK", 0, ranks - 1)
        return Torchrun(
            rank=rank,
            ranks=ranks,
            here=_integer(environment, "LOCAL_WORLD_SIZE", 1, ranks, 1),
            local_rank=_integer(environment, "LOCAL_RANK", 0, ranks - 1, 0),
            host=environment["MASTER_ADDR"],
            port=_integer(environment, "MASTER_PORT", 1, 65535),
            agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() in ("1", "true"),
            restart=_integer(environment, "TORCHELASTIC_RESTART_COUNT", 0, 2**31, 0),
        )


def _integer(environment: Mapping[str, str], name: str, least: int, most: int, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or not least <= int(text) <= most:
        raise UserError(name, text, f"an integer from {least} to {most}")
    return int(text)
