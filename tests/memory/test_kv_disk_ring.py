"""The cache of a window's tokens on disk: what is read, with the unfinished segment in memory, is what every sequence's
newest token sees, in the order of the distance from it."""

from __future__ import annotations

import random

import pytest
import torch

from flexgen_bench.memory.kv_cache import KVForm
from flexgen_bench.memory.kv_disk_ring import DiskRingRegion
from flexgen_bench.schedule.kv_disk_ring import DiskRing
from tests.memory.test_kv_ring import DIM, HEADS, PACKED, PLAIN, assert_is, both, stored, token


@pytest.mark.parametrize("form", [PLAIN, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("seed", range(25))
def test_it_holds_the_last_tokens_of_every_sequence(seed: int, form: KVForm) -> None:
    """Prompts of any lengths in chunks of any lengths, then new tokens, while sequences leave. Only what is read comes
    from the file: the buffer is full of NaN before every token, the file where nothing was written."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 15) for _ in range(3)]
    window, longest, new = draw.randint(1, 14), max(lengths), draw.choice([1, 2, draw.randint(1, 30)])
    row = DIM * 4 if form.compression is None else form.compression.row_bytes(DIM)
    segment = draw.randint(1, window)
    layout = DiskRing(3, 0, new, segment, 2 * HEADS * row, ring=window, longest=longest)
    region = DiskRingRegion(layout, form)
    raw, file = (torch.full((layout.region_bytes,), 255, dtype=torch.uint8) for _ in range(2))
    step = draw.randint(1, 15)
    for start in range(0, longest, step):
        for sequence, length in enumerate(lengths):
            stop = min(start + step, length)
            if start < stop:
                since = max(0, start - window + 1)
                before = form.decode(region.recent(raw, sequence, since, start, length)) if since < start else None
                for position in range(since, start):
                    assert before is not None
                    assert_is(form, before[:, :, position - since], token(sequence, position))
                rows = torch.stack([token(sequence, p) for p in range(start, stop)])
                region.put_prompt(raw, sequence, start, stored(form, rows), length)
    file[: layout.prompt_bytes] = raw[: layout.prompt_bytes]
    tail = torch.zeros(layout.tail_bytes, dtype=torch.uint8)
    running = list(range(3))
    for number in range(1, new + 1):
        if len(running) > 1 and draw.random() < 0.1:
            running.remove(draw.choice(running))
        raw.fill_(255)
        read = 0
        for a, b in layout.extents(number):
            raw[a:b] = file[a:b]
            read += b - a
        assert read == layout.read_bytes(number) <= layout.moved_bytes(number) <= layout.moved_region_bytes
        positions = [lengths[sequence] + number - 1 for sequence in running]
        rows = torch.stack([token(s, p) for s, p in zip(running, positions, strict=True)])
        region.append_loose(tail, number, running, stored(form, rows))
        everything = torch.cat([both(part, form) for part in region.window(raw, tail, number)], dim=3)
        assert everything.shape[3] == layout.filled(number) == min(window, longest + number)
        assert torch.isfinite(everything[:, running]).all()
        for sequence, position in zip(running, positions, strict=True):
            for distance in range(min(window, position + 1)):
                assert_is(form, everything[:, sequence, :, distance], token(sequence, position - distance))
        if number % segment == 0 and number < new:  # the unfinished segment is finished
            offset = layout.segment_offset(number // segment - 1)
            file[offset : offset + layout.segment_bytes] = tail
