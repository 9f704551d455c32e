"""Readers: what a package's files hold, as rows. Add one by listing its function in ``READERS``.

A reader takes the folder with the unpacked files and the task's options, and gives the rows of ``test`` and, where
examples are shown, ``fewshot``. Prompts are not its business; conf/accuracy holds those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from flexgen_bench.accuracy.data import synthetic, synthetic_natural
from flexgen_bench.accuracy.data.readers import (
    arrow,
    bigbench,
    king_james,
    matching,
    mmlu,
    olmo,
    products,
    restaurants,
    reviews,
    wikipedia,
)
from flexgen_bench.accuracy.data.rows import Rows

Reader = Callable[..., Rows]

READERS: Mapping[str, Reader] = {
    "arrow": arrow.read,
    "bbq": bigbench.bbq,
    "bigbench_choices": bigbench.choices,
    "cnn_dm": bigbench.cnn_dm,
    "copying": synthetic.copying,
    "coqa": olmo.coqa,
    "error_detection": restaurants.error_detection,
    "gsm8k": olmo.gsm8k,
    "hellaswag": arrow.hellaswag,
    "imputation": restaurants.imputation,
    "king_james": king_james.read,
    "lookup": synthetic.lookup,
    "mmlu": mmlu.read,
    "olmo_docs": olmo.docs,
    "pattern_reasoning": synthetic.reasoning,
    "product_titles": products.titles,
    "publications": matching.publications,
    "restaurants": matching.restaurants,
    "rule_reasoning": synthetic_natural.reasoning,
    "snippets": reviews.snippets,
    "wikipedia": wikipedia.read,
    "xsum": bigbench.xsum,
}


def read(reader: str, folder: Path | None, options: Mapping[str, object]) -> Rows:
    """Rows of a source. folder: None for one that is generated."""
    function = READERS[reader]
    return function(**options) if folder is None else function(folder, **options)
