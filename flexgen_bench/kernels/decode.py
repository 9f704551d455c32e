"""Decode attention with torch's operators, on any device.

S sequences, H query heads, G KV heads, R = H / G query heads to a KV head, D head dim, T cached tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexgen_bench.core.score_mod import NO_MOD, ScoreMod
from flexgen_bench.kernels.score_mod import modified, softmax
from flexgen_bench.kernels.segments import Padding, Segment
from flexgen_bench.kernels.value_share import drop_small, kept


def attend_with_torch(
    q: Tensor,
    segments: Sequence[Segment],
    padding: Padding | None,
    scale: float,
    value_share: float = 1.0,
    slots: Sequence[int] | None = None,
    mod: ScoreMod = NO_MOD,
    sinks: Tensor | None = None,
    newest: Sequence[int] | None = None,
) -> Tensor:
    """See ``attention.decode_attention``."""
    if slots is None:
        return _attend(q, segments, padding, scale, value_share, mod, sinks, newest)
    outputs = []
    row = 0
    for start, stop in contiguous(slots):
        part = [segment.part(start, stop) for segment in segments]
        pad = padding and padding.part(start, stop)
        rows = slice(row, row + stop - start)
        outputs.append(_attend(q[rows], part, pad, scale, value_share, mod, sinks, newest and newest[rows]))
        row += stop - start
    if not outputs:
        return q.new_empty(0, q.shape[1] * q.shape[2])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(
    q: Tensor,
    segments: Sequence[Segment],
    padding: Padding | None,
    scale: float,
    value_share: float,
    mod: ScoreMod,
    sinks: Tensor | None,
    newest: Sequence[int] | None,
) -> Tensor:
    """All sequences of the segments. Query heads that share a KV head are rows of one matrix product, so that every
    key is read once."""
    sequences, heads, dim = q.shape
    groups = segments[0].heads
    folded = q.reshape(sequences * groups, heads // groups, dim)
    scores = []
    for segment in segments:
        keys = segment.keys(q.dtype).flatten(0, 1)
        # Scaled before they are rounded to q's type: unscaled scores may be beyond float16.
        room = q.new_empty(sequences * groups, heads // groups, segment.tokens)
        scores.append(room.baddbmm_(folded, keys.transpose(1, 2), beta=0, alpha=scale))
    mod = mod.over(sum(segment.tokens for segment in segments))
    if padding is not None and mod.is_none and not padding.of_all:
        first = scores[0].view(sequences, heads, -1)
        first.masked_fill_(~padding.mask[:, None, :], float("-inf"))
    joined = torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]
    if padding is not None and mod.is_none and padding.of_all:
        joined.view(sequences, heads, -1).masked_fill_(~padding.mask[:, None, :], float("-inf"))
    if not mod.is_none:
        joined = joined.float()
        distances = _distances(segments, padding, q.device)[:, None, None]
        modified(joined.view(sequences, heads, 1, -1), distances, mod)
    if sinks is None:
        weights = torch.softmax(joined, dim=-1, dtype=torch.float32)
    else:
        weights = softmax(joined.view(sequences, heads, 1, -1), sinks).view(joined.shape)
    if value_share < 1:
        _use_share(weights.view(sequences, heads, -1), segments, padding, value_share, mod, newest)
    pieces = torch.split(weights.to(q.dtype), [segment.tokens for segment in segments], dim=-1)
    out: Tensor | None = None
    for piece, segment in zip(pieces, segments, strict=True):
        values = segment.values(q.dtype).flatten(0, 1)
        out = torch.bmm(piece, values) if out is None else out.baddbmm_(piece, values)
    assert out is not None, "attention over no segment"
    return out.reshape(sequences, heads * dim)


def _distances(segments: Sequence[Segment], padding: Padding | None, device: torch.device) -> Tensor:
    """(S or 1, T over all segments): how far each token is behind the last one; -1 for slots without a token."""
    tokens = sum(segment.tokens for segment in segments)
    behind = torch.arange(tokens - 1, -1, -1, device=device)[None]
    if padding is None:
        return behind
    first = tokens if padding.of_all else segments[0].tokens
    empty = first - padding.mask.sum(1, keepdim=True)  # slots behind each prompt
    own = (behind[:, :first] - empty).masked_fill_(~padding.mask, -1)
    return torch.cat((own, behind[:, first:].expand(len(own), -1)), dim=1)


def _use_share(
    weights: Tensor,
    segments: Sequence[Segment],
    padding: Padding | None,
    value_share: float,
    mod: ScoreMod,
    newest: Sequence[int] | None,
) -> None:
    """weights (S, H, T over all segments): those of value rows that are not used become 0.

    No value row is skipped in memory: on an accelerator the rows are there already, and on a processor the native
    kernel reads only those it uses.
    """
    sequences, _, tokens = weights.shape
    first = segments[0].tokens
    lengths = [first] * sequences if padding is None else padding.lengths.tolist()
    later = 0 if padding is not None and padding.of_all else tokens - first
    last = newest or [tokens - 1 if later else length - 1 for length in lengths]
    drop_small(weights, last, [kept(value_share, mod.seen(n + later)) for n in lengths])


def contiguous(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of neighbours: [0, 1, 4, 5, 6] -> [(0, 2), (4, 7)]."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], slot + 1)
        else:
            runs.append((slot, slot + 1))
    return runs
