"""The prompts of a workload as token ids: the same ones for every system."""

from __future__ import annotations

import random
from pathlib import Path

from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.engine.tokenization import TextTokenizer, has_tokenizer

_PASSAGES = Path(__file__).with_name("passages.txt")
# Ids below are special tokens in every family here (begin, pad, end, unknown).
_FIRST_ID = 4


def build_prompts(workload: Workload, checkpoint: Path, shape: ModelShape) -> list[list[int]]:
    """``num_prompts`` lists of token ids, decided by the workload (and, for text, the tokenizer) alone.

    Raises UserError if prompt and answer exceed the model's positions, StoreError if text is asked for and
    the checkpoint has no tokenizer or one for a larger vocabulary.
    """
    longest = workload.prompt_len + workload.gen_len
    if longest > shape.max_positions:
        raise UserError(
            "workload.prompt_len + workload.gen_len",
            longest,
            f"at most the {shape.max_positions} positions of {shape.name}",
            "Shorten either.",
        )
    if workload.kind is PromptKind.SYNTHETIC:
        return _synthetic(workload, shape)
    return _text(workload, checkpoint, shape)


def _synthetic(workload: Workload, shape: ModelShape) -> list[list[int]]:
    """Distinct random prompts of exact length."""
    first = _FIRST_ID if shape.vocab_size > 2 * _FIRST_ID else 0
    rng = random.Random(workload.seed)
    if (shape.vocab_size - first) ** workload.prompt_len < workload.num_prompts:
        raise UserError("workload.num_prompts", workload.num_prompts, "no more than there are distinct prompts")
    seen: set[tuple[int, ...]] = set()
    prompts: list[list[int]] = []
    while len(prompts) < workload.num_prompts:
        ids = [rng.randrange(first, shape.vocab_size) for _ in range(workload.prompt_len)]
        if tuple(ids) not in seen:
            seen.add(tuple(ids))
            prompts.append(ids)
    return prompts


def _text(workload: Workload, checkpoint: Path, shape: ModelShape) -> list[list[int]]:
    """Passages cut to lengths spread evenly from min_prompt_len to prompt_len, in a seeded order."""
    tokenizer = TextTokenizer(_with_tokenizer(checkpoint))
    count, low = workload.num_prompts, workload.min_prompt_len
    step = (workload.prompt_len - low) / max(1, count - 1)
    lengths = [low + round(step * i) for i in range(count)] if count > 1 else [workload.prompt_len]
    random.Random(workload.seed).shuffle(lengths)
    prompts = []
    for index, length in enumerate(lengths):
        ids = _encode(tokenizer, index, length)
        if max(ids) >= shape.vocab_size:
            raise StoreError(
                f"the tokenizer in {checkpoint} gives id {max(ids)}, outside the {shape.vocab_size} of {shape.name}"
            )
        prompts.append(ids)
    return prompts


def _encode(tokenizer: TextTokenizer, index: int, length: int) -> list[int]:
    """Prompt ``index``: the passage of that number; in later rounds from a later word on, to stay distinct.

    What a passage lacks in length is taken from those after it.
    """
    passages = read_passages()
    turn, number = divmod(index, len(passages))
    words = passages[number].split()
    text = " ".join(words[11 * turn % (len(words) // 2) :])
    while True:
        ids = tokenizer.encode(text, f"passage {number}")
        if len(ids) >= length:
            return ids[:length]
        number = (number + 1) % len(passages)
        text += f"\n\n{passages[number]}"


def read_passages() -> list[str]:
    """The passages of ``passages.txt``, one a paragraph; lines that start with # name their sources."""
    paragraphs = _PASSAGES.read_text(encoding="utf-8").split("\n\n")
    bodies = (" ".join(line.strip() for line in text.splitlines() if not line.startswith("#")) for text in paragraphs)
    return [body.strip() for body in bodies if body.strip()]


def _with_tokenizer(checkpoint: Path) -> Path:
    if not has_tokenizer(checkpoint):
        raise StoreError(
            f"{checkpoint} holds no tokenizer, so it cannot take text: use a workload of token ids such as "
            "workload=32-32, or weights that come with a tokenizer (model=smollm2-135m, or weights=hub)"
        )
    return checkpoint
