"""Attention of a prefix tree (schedule/prefix_tree.py): rows attend to their ancestors and themselves, which prefixes
make common to many.

R rows of a prefix tree, H query heads, G KV heads, D head dim. Scores are dot products times ``scale``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flexgen_bench.core.score_mod import NO_MOD, ScoreMod
from flexgen_bench.kernels.score_mod import Tree, modified, modified_attention, softmax, visible
from flexgen_bench.kernels.value_share import drop_small, kept
from flexgen_bench.schedule.prefix_tree import Block, PrefixTree

# Pairs of a query and a key whose weights sparse attention holds at once, over all heads.
SPARSE_PAIRS = 1 << 22
# On a processor, grouped heads are slow for few queries (0.19 against 0.05 ms for 5 over 105 keys); then keys and
# values are repeated.
EXPANDED_ROWS = 16


class TreeMask:
    """Which rows see which, block by block; made when first needed, and the same in every layer."""

    def __init__(self, tree: PrefixTree) -> None:
        self.blocks = tree.blocks
        self._parents, self._decoded = tree.parents, tree.logit_rows
        self._positions = torch.tensor(tree.positions)
        self._masks: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._trees: dict[tuple[int, int, int, torch.device], Tree] = {}

    def decoded(self, start: int, stop: int) -> list[int]:
        """Which of the rows start .. stop-1 stand for tokens that are decoded, not part of a prompt, counted from
        ``start``: those that predict scored tokens."""
        low, high = (bisect_left(self._decoded, row) for row in (start, stop))
        return [row - start for row in self._decoded[low:high]]

    def tree(self, number: int, start: int, stop: int, like: Tensor) -> Tree:
        """Rows start .. stop-1 of a block as queries: their positions, those of their keys, and who sees whom."""
        key = (number, start, stop, like.device)
        if key not in self._trees:
            block = self.blocks[number]
            queries = self._positions[start:stop]
            keys = torch.cat([self._positions[a:b] for a, b in (*block.before, (block.start, stop))])
            seen = self._seen(block)[start - block.start : stop - block.start, : len(keys)]
            self._trees[key] = Tree(*(x.to(like.device) for x in (queries, keys, seen)))
        return self._trees[key]

    def of(self, number: int, like: Tensor) -> Tensor:
        """(rows of the block, keys): 0 where a row sees a key, else -inf. Keys are the block's ``before`` rows, then
        its own."""
        key = (number, like.dtype, like.device)
        if key not in self._masks:
            seen = self._seen(self.blocks[number])
            mask = torch.zeros(seen.shape, dtype=like.dtype)
            self._masks[key] = mask.masked_fill_(~seen, float("-inf")).to(like.device)
        return self._masks[key]

    def _seen(self, block: Block) -> Tensor:
        size, before = block.stop - block.start, sum(b - a for a, b in block.before)
        seen = torch.ones(size, before + size, dtype=torch.bool)
        own = seen[:, before:]
        own.tril_()
        if block.branches:
            for row in range(size):
                parent = self._parents[block.start + row] - block.start
                own[row, :row] = own[parent, :row] if parent >= 0 else False
        return seen


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    first: int,
    scale: float,
    value_share: float = 1.0,
    mod: ScoreMod = NO_MOD,
    sinks: Tensor | None = None,
) -> Tensor:
    """q (N, H, D): rows first .. first + N - 1 of the prefix tree; k, v (at least first + N, G, D): its rows from the
    beginning.
    Returns (N, H * D).

    value_share below 1: of a ``decoded`` row, each head uses only the value of the row itself and those with the
    largest weights (as ``decode_attention`` in kernels/attention.py does). sinks (H,): see ``score_mod.softmax``.
    """
    last = first + q.shape[0]
    mod = mod.over(last)
    outputs = []
    for number, block in enumerate(mask.blocks):
        start, stop = max(block.start, first), min(block.stop, last)
        if start >= stop:
            continue
        queries = q[start - first : stop - first]
        ranges = (*block.before, (block.start, stop))
        keys, values = (_rows(x, ranges) for x in (k, v))
        decoded = mask.decoded(start, stop) if value_share < 1 else []
        seen = None
        if decoded or block.before or block.branches or start > block.start:
            seen = mask.of(number, q)[start - block.start : stop - block.start, : keys.shape[0]]
        distances = None
        if mod.is_none and sinks is None:
            out = _attend(queries, keys, values, seen, scale)
        else:
            tree = mask.tree(number, start, stop, q)
            distances = tree.queries[:, None] - tree.keys
            k4, v4 = (x.transpose(0, 1)[None] for x in (keys, values))
            out = modified_attention(queries[None], k4, v4, mod, scale, tree, sinks)[0]
        if decoded and seen is not None:
            rows = torch.tensor(decoded, device=q.device)
            out[rows] = _attend_sparsely(
                queries[rows],
                keys,
                values,
                seen[rows],
                scale,
                value_share,
                mod,
                None if distances is None else distances[rows],
                sinks,
            )
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _rows(x: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    if len(ranges) == 1 or (len(ranges) == 2 and ranges[0][1] == ranges[1][0]):
        return x[ranges[0][0] : ranges[-1][1]]
    return torch.cat([x[start:stop] for start, stop in ranges])


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q (L, H, D), k and v (T, G, D); mask (L, T), or None for causal attention of equally many rows."""
    rows, heads, dim = q.shape
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    groups = heads // k.shape[1]
    if groups > 1 and (q.is_cuda or rows <= EXPANDED_ROWS):
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        groups = 1
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
    )
    return out[0].transpose(0, 1).reshape(rows, heads * dim)


def _attend_sparsely(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    value_share: float,
    mod: ScoreMod,
    distances: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same with few of the value rows. distances (L, T): of each key behind its query, if scores change by them."""
    rows, heads, dim = q.shape
    groups = heads // k.shape[1]
    k, v = (x.transpose(0, 1).repeat_interleave(groups, dim=0) for x in (k, v))
    piece = max(1, SPARSE_PAIRS // (heads * k.shape[1]))
    outputs = []
    for start in range(0, rows, piece):
        seen = mask[start : start + piece]
        scores = torch.matmul(q[start : start + piece].transpose(0, 1), k.transpose(1, 2)).float()
        scores *= scale
        if distances is not None:
            behind = distances[start : start + piece]
            scores = modified(scores, behind, mod)
            seen = seen.masked_fill(~visible(behind, mod), float("-inf"))
        weights = softmax(scores + seen.float(), sinks).transpose(0, 1)
        shown = (seen == 0).to("cpu")
        counts = shown.sum(1).tolist()
        own = [k.shape[1] - 1 - int(n) for n in shown.flip(1).int().argmax(1)]
        weights = drop_small(weights.contiguous(), own, [kept(value_share, n) for n in counts])
        out = torch.matmul(weights.transpose(0, 1).to(v.dtype), v)
        outputs.append(out.transpose(0, 1).reshape(-1, heads * dim))
    return torch.cat(outputs)
