"""Batched greedy generation with llama.cpp, and its own clock beside ours."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from baselines.llama_cpp.model import Context, rows_of
from flexgen_bench.core.progress import Progress
from flexgen_bench.systems.contract import Generation

# By how much llama.cpp's counters may differ from the clock before a record says so. Between them lie the choice of
# tokens (the largest of a vocabulary's logits) and the making of rows.
TOLERATED = 0.05


@dataclass
class Clocks:
    """Seconds since a load: by the clock, and by llama.cpp's own counters."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    own_prefill_s: float = 0.0
    own_decode_s: float = 0.0

    def warnings(self) -> list[str]:
        """What a reader must know: phases in which the two differ by more than ``TOLERATED`` of the clock."""
        found = []
        for phase, clock, own in (
            ("prefill", self.prefill_s, self.own_prefill_s),
            ("decode", self.decode_s, self.own_decode_s),
        ):
            if clock and abs(clock - own) > TOLERATED * clock:
                found.append(
                    f"{phase}: llama.cpp's own counters say {own:.3f} s, the clock {clock:.3f} s "
                    f"(more than {TOLERATED:.0%} apart); the clock counts"
                )
        return found


def generate(
    context: Context,
    prompts: Sequence[Sequence[int]],
    gen_len: int,
    *,
    batch_size: int,
    clocks: Clocks,
    progress: Progress,
) -> Generation:
    """Exactly ``gen_len`` tokens per prompt, batch after batch in the order asked. Nothing is padded: rows of prompts
    of any length are computed together."""
    prompt_tokens, decode_tokens = sum(map(len, prompts)), len(prompts) * (gen_len - 1)
    answers: list[tuple[int, ...]] = []
    prefill_s = decode_s = 0.0
    prefilled = decoded = 0
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        context.clear()
        begin = time.perf_counter()
        chosen = [context.compute(*rows_of(batch))]
        end = time.perf_counter()
        prefill_s += end - begin
        own = context.own_seconds()
        clocks.own_prefill_s += own
        prefilled += sum(map(len, batch))
        progress("prefill", prefilled, prompt_tokens)
        positions = np.array([len(prompt) for prompt in batch], np.int32)
        sequences, wanted = np.arange(len(batch), dtype=np.int32), np.ones(len(batch), np.int8)
        begin = time.perf_counter()
        for step in range(gen_len - 1):
            tokens = chosen[-1].astype(np.int32)
            chosen.append(context.compute(tokens, positions + np.int32(step), sequences, wanted))
            decoded += len(batch)
            progress("decode", decoded, decode_tokens)
        decode_s += time.perf_counter() - begin
        clocks.own_decode_s += context.own_seconds() - own
        answers += [tuple(int(token) for token in row) for row in np.stack(chosen, axis=1)]
    clocks.prefill_s += prefill_s
    clocks.decode_s += decode_s
    return Generation(tuple(answers), prefill_s, decode_s)
