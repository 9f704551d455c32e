"""What is asked of a system: prompts, lengths, seed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from flexgen_bench.core.errors import UserError


class PromptKind(StrEnum):
    SYNTHETIC = "synthetic"  # distinct random token ids of exact length; end-of-sequence ignored
    TEXT = "text"  # real text, cut by the model's own tokenizer; mixed lengths


@dataclass(frozen=True)
class Workload:
    """``num_prompts`` prompts and ``gen_len`` new tokens each; every system gets the same token ids.

    For SYNTHETIC, every prompt has ``prompt_len`` tokens. For TEXT, prompts come from the project's text
    passages (``runner/prompts.py``), cut to lengths spread between ``min_prompt_len`` and ``prompt_len``.
    """

    name: str
    kind: PromptKind
    num_prompts: int
    prompt_len: int
    gen_len: int
    min_prompt_len: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "prompt_len", "gen_len", "min_prompt_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"workload.{name}", value, "an integer of at least 1")
        if self.min_prompt_len > self.prompt_len:
            raise UserError("workload.min_prompt_len", self.min_prompt_len, f"at most prompt_len = {self.prompt_len}")
        object.__setattr__(self, "kind", PromptKind(self.kind))
