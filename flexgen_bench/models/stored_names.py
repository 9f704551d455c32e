"""Under which names a checkpoint stores a model's tensors, and what else it holds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from flexgen_bench.models.family import Inventory, PackedTensor

# Tensors that transformers itself leaves out without a word (``_adjust_missing_and_unexpected_keys``, and OPT's old
# ``_keys_to_ignore_on_load_unexpected``): buffers that are computed from the config, and a version number.
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$|(^|\.)position_ids$|(^|\.)decoder\.version$")
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


def locate(sources: Collection[str], prefixes: tuple[str, ...], names: Collection[str]) -> StoredNames:
    """Look for each source under each prefix in turn."""
    found: dict[str, str] = {}
    for source in sources:
        name = next((p + source for p in prefixes if p + source in names), None)
        if name is not None:
            found[source] = name
    rest = set(names) - set(found.values())
    heads = {name for name in rest if _OTHER_HEADS.search(name)}
    unexpected = {name for name in rest - heads if not _HARMLESS.search(name)}
    return StoredNames(
        found,
        tuple(source for source in sources if source not in found),
        tuple(sorted(unexpected)),
        tuple(sorted(heads)),
    )


def _tensors(inventory: Inventory) -> Iterator[PackedTensor]:
    for unit in (inventory.tables, inventory.embed, *inventory.layers, inventory.head):
        yield from unit
