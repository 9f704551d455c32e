"""Under which names a checkpoint stores a model's tensors, and what else it holds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from flexgen_bench.models.inventory import Inventory, PackedTensor

# Tensors that transformers itself leaves out without a word (``_adjust_missing_and_unexpected_keys``, and OPT's old
# ``_keys_to_ignore_on_load_unexpected``): buffers that are computed from the config, and a version number.
# The same of GPT-NeoX, GPT-J and CodeGen in checkpoints before transformers 5: causal masks that are stored like
# weights.
_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb|rotary_pos_emb)\.inv_freq$|(^|\.)position_ids$|(^|\.)decoder\.version$"
    r"|(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask|embed_positions)$"
)
# Heads that answer another question than which token comes next.
_OTHER_HEADS = re.compile(r"^(v_head|value_head|score|classifier|qa_outputs)\.")


@dataclass(frozen=True)
class StoredNames:
    """found: the name in the checkpoint by the family's own. missing: of the family's. unexpected: of the checkpoint's,
    which no tensor of the model is made of. other_heads: those that belong to heads that are not used."""

    found: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_heads: tuple[str, ...]


def expected_sources(inventory: Inventory) -> dict[str, tuple[int, ...]]:
    """Every checkpoint tensor of a model by the family's own name, with its shape."""
    return {
        source: (rows, *tensor.spec.shape[1:])
        for tensor in _tensors(inventory)
        for source, rows in zip(tensor.sources, tensor.source_rows, strict=True)
    }


def other_sources(own: Inventory, other: Inventory) -> dict[str, tuple[str, int, int]]:
    """For each checkpoint tensor of a model where it is in one with ``other`` names: (name, first row, one after its
    last row). The same weights, which may be stacked there that are apart here."""
    places = {}
    for mine, theirs in zip(_tensors(own), _tensors(other), strict=True):
        stops = list(accumulate(theirs.source_rows))
        skipped = theirs.firsts or (0,) * len(stops)
        ranges = list(zip(theirs.sources, theirs.source_rows, stops, skipped, strict=True))
        for source, rows, stop in zip(mine.sources, mine.source_rows, accumulate(mine.source_rows), strict=True):
            name, count, last, skip = next(r for r in ranges if r[2] - r[1] <= stop - rows and stop <= r[2])
            if (name, count) != (source, rows):
                begin = skip + stop - rows - (last - count)
                places[source] = (name, begin, begin + rows)
    return places


def locate(sources: Collection[str], prefixes: tuple[str, ...], names: Collection[str]) -> StoredNames:
    """Look for each source under each prefix in turn."""
    stored_name_of: dict[str, str] = {}
    for source in sources:
        name = next((p + source for p in prefixes if p + source in names), None)
        if name is not None:
            stored_name_of[source] = name
    rest = set(names) - set(stored_name_of.values())
    heads = {name for name in rest if _OTHER_HEADS.search(name)}
    unexpected = {name for name in rest - heads if not _HARMLESS.search(name)}
    return StoredNames(
        stored_name_of,
        tuple(source for source in sources if source not in stored_name_of),
        tuple(sorted(unexpected)),
        tuple(sorted(heads)),
    )


def _tensors(inventory: Inventory) -> Iterator[PackedTensor]:
    for unit in (inventory.tables, inventory.embed, *inventory.layers, inventory.head):
        yield from unit
