"""The ring of a window's tokens: wherever its pieces lie and however it is filled, it holds the last tokens of every
sequence, each where its position says."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from flexgen_bench.core.compression import Compression
from flexgen_bench.kernels.attention import PackedSegment, PlainSegment
from flexgen_bench.memory.kv_cache import KVForm
from flexgen_bench.memory.kv_ring import RingRegion
from flexgen_bench.schedule.kv_layout import KVLayout, ring_layout

HEADS, DIM = 2, 8
PLAIN = KVForm(HEADS, DIM, torch.float32, None)
PACKED = KVForm(HEADS, DIM, torch.float32, Compression(8, 8))


def token(sequence: int, position: int) -> Tensor:
    """Keys (G, D) that say whose they are; values are their negatives."""
    return torch.arange(HEADS * DIM).view(HEADS, DIM) / 100 + 10 * position + 1000 * sequence


def stored(form: KVForm, keys: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return form.encode(keys), form.encode(-keys)


def any_layout(draw: random.Random, longest: int, new: int, sequences: int, form: KVForm) -> KVLayout:
    window = draw.randint(1, 12)
    segment = draw.choice([None, window, -(-window // 8), draw.randint(1, window)])
    row = DIM * 4 if form.compression is None else form.compression.row_bytes(DIM)
    return ring_layout(sequences, window, longest, new, segment, 2 * HEADS * row)


@pytest.mark.parametrize("form", [PLAIN, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("seed", range(25))
def test_it_holds_the_last_tokens_of_every_sequence(seed: int, form: KVForm) -> None:
    """Prompts of any lengths in chunks of any lengths, then new tokens, while sequences leave; the memory is full of
    NaN before, of which nothing is left that attention reads for those that run."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 15)] * 3 if draw.random() < 0.3 else [draw.randint(1, 15) for _ in range(3)]
    longest, new = max(lengths), draw.randint(1, 30)
    layout = any_layout(draw, longest, new, len(lengths), form)
    region = RingRegion(layout, form)
    raw = torch.full((layout.region_bytes,), 255, dtype=torch.uint8)
    step = draw.randint(1, 15)
    for start in range(0, longest, step):
        for sequence, length in enumerate(lengths):
            stop = min(start + step, length)
            if start < stop:
                since = max(0, start - layout.tokens)
                before = form.decode(region.recent(raw, since, start)) if start else None
                for position in range(since, start):
                    assert before is not None
                    assert_is(form, before[:, sequence, :, position - since], token(sequence, position))
                rows = torch.stack([token(sequence, p) for p in range(start, stop)])
                region.put_prompt(raw, sequence, start, stored(form, rows), length)
    running = list(range(len(lengths)))
    for number in range(1, new + 1):
        if len(running) > 1 and draw.random() < 0.1:
            running.remove(draw.choice(running))
        positions = [lengths[sequence] + number - 1 for sequence in running]
        rows = torch.stack([token(s, p) for s, p in zip(running, positions, strict=True)])
        region.append_at(raw, positions, number, running, stored(form, rows))
        read = [both(part, form) for part in region.segments(raw, number)]
        everything = torch.cat(read, dim=3)
        assert everything.shape[3] == layout.filled(number)
        assert torch.isfinite(everything[:, running]).all()
        for sequence, position in zip(running, positions, strict=True):
            for p in range(max(0, position + 1 - layout.tokens), position + 1):
                assert_is(form, everything[:, sequence, :, p % layout.tokens], token(sequence, p))


def both(segment: PlainSegment | PackedSegment, form: KVForm) -> Tensor:
    return torch.stack([segment.keys(form.dtype), segment.values(form.dtype)])


def assert_is(form: KVForm, found: Tensor, keys: Tensor) -> None:
    """found (2, G, D): these keys and their values, as the form holds them."""
    expected = torch.stack([form.decode(x) for x in stored(form, keys)])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", range(20))
def test_all_at_once_is_one_by_one(seed: int) -> None:
    """Prompts of one length, and what prompts share, written for all sequences together."""
    draw = random.Random(seed)
    length, shared, new = draw.randint(1, 20), draw.randint(0, 19), draw.randint(0, 9)
    shared = min(shared, length - 1)
    layout = any_layout(draw, length, new, 3, PLAIN)
    region = RingRegion(layout, PLAIN)
    one, other = (torch.zeros(layout.region_bytes, dtype=torch.uint8) for _ in range(2))
    same = torch.stack([token(0, p) for p in range(shared)]) if shared else torch.empty(0, HEADS, DIM)
    own = [torch.stack([token(s, p) for p in range(shared, length)]) for s in range(3)]
    if shared:
        region.put_shared(one, 0, stored(PLAIN, same))
    region.put_prompts(one, shared, stored(PLAIN, torch.cat(own)))
    for sequence in range(3):
        region.put_prompt(other, sequence, 0, stored(PLAIN, torch.cat((same, own[sequence]))), length)
    assert torch.equal(one, other)


@pytest.mark.parametrize("seed", range(25))
def test_slots_are_in_the_order_of_their_tokens(seed: int) -> None:
    """Ranges of slots, taken apart at the ends of segments and of the ring; each token's is where ``slot`` says."""
    draw = random.Random(seed)
    longest, new = draw.randint(1, 40), draw.randint(0, 40)
    layout = any_layout(draw, longest, new, 2, PLAIN)
    assert layout.tokens == min(layout.ring or 0, longest + new)
    first = draw.randint(0, longest + new)
    last = min(first + draw.randint(0, layout.tokens), longest + new)
    ranges = list(layout.slots(first, last))
    assert [(s, p) for s, a, b in ranges for p in range(a, b)] == [layout.slot(p) for p in range(first, last)]
    assert len({layout.slot(p) for p in range(first, last)}) == last - first
    assert layout.prompt_bytes <= layout.moved_bytes(max(new, 1)) <= layout.region_bytes
    assert layout.moved_bytes(new + 1) == layout.region_bytes


@pytest.mark.parametrize("seed", range(20))
def test_what_was_kept_goes_on_in_another_ring(seed: int) -> None:
    draw = random.Random(seed)
    layout = any_layout(draw, 9, 20, 1, PLAIN)
    region, raw = RingRegion(layout, PLAIN), torch.zeros(layout.region_bytes, dtype=torch.uint8)
    fed = draw.randint(0, 20)
    region.put_prompt(raw, 0, 0, stored(PLAIN, torch.stack([token(0, p) for p in range(9)])), 9)
    for number in range(1, fed + 1):
        region.append_at(raw, [8 + number], number, [0], stored(PLAIN, token(0, 8 + number)[None]))
    kept = region.fed(raw, 0, 9, fed)
    first = 9 + fed - kept[0].shape[2]
    window = layout.ring or 0
    after = ring_layout(1, window, 9 + fed + 3, 5, draw.choice([None, 1]), layout.token_bytes)
    again, memory = RingRegion(after, PLAIN), torch.zeros(after.region_bytes, dtype=torch.uint8)
    again.put_kept(memory, 0, kept, first)
    held = again.recent(memory, first, 9 + fed)[0]
    for position in range(first, 9 + fed):
        assert_is(PLAIN, held[:, 0, :, position - first], token(0, position))
