"""One block from its prompts to its last token, alone or in a pipeline."""

from __future__ import annotations

from dataclasses import dataclass, replace

from baselines.flexgen_original import memory, schedule
from baselines.flexgen_original.block import Block
from baselines.flexgen_original.costs import Costs
from baselines.flexgen_original.parts import Phase
from flexgen_bench.core.tiers import Tier


@dataclass(frozen=True)
class Outcome:
    """What a job's block takes. In a pipeline: all blocks in flight, one for each machine."""

    block: Block
    prefill: Phase
    decode: Phase
    bytes: dict[Tier, memory.Parts]

    @property
    def prompts(self) -> int:
        return self.block.settings.block_size * self.block.stages

    @property
    def tok_per_s(self) -> float:
        return self.prompts * self.block.gen_len / (self.prefill.seconds + self.decode.seconds)


def outcome(block: Block) -> Outcome:
    """Raises DoesNotFit."""
    needed = memory.check(block)
    costs = Costs(block, needed)
    prefill, step = schedule.prefill(costs), schedule.decode_step(costs)
    if block.stages > 1:
        before = Costs(replace(block, is_last=False), needed)
        prefill = _through_stages(prefill, block, block.prompt_len, schedule.prefill(before).seconds)
        step = _through_stages(step, block, 1)
    decode = Phase()
    decode.add_phase(step, block.gen_len - 1)
    return Outcome(block, prefill, decode, needed)


def _through_stages(last: Phase, block: Block, tokens: int, before_s: float | None = None) -> Phase:
    """As many blocks as stages, one after the other through all of them, at the pace of the last stage.

    before_s: seconds of the stages that the first block passes before it gets there; None if they have work anyway:
    every block's next token follows its last one without a gap. What leaves a stage goes over the network.
    """
    settings, shape = block.settings, block.size.shape
    moved = block.size.bytes_of(settings.block_size * tokens * shape.hidden_size)
    sent_s = moved / block.constants.network
    whole = Phase()
    whole.add_phase(last, block.stages)
    whole.seconds += block.stages * sent_s
    if before_s is not None:
        whole.seconds += (block.stages - 1) * (before_s + sent_s)
    whole.parts["network: hidden states"] += block.stages * sent_s
    return whole
