"""lm-eval's ``custom_dataset`` of our tasks: the same function feeds this project and lm-eval's own command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexgen_bench.accuracy.data.rows import read_rows
from flexgen_bench.core.errors import StoreError


def load(
    rows_of: Mapping[str, Mapping[str, str]],
    where: Mapping[str, str] | None = None,
    first: int | None = None,
    **_metadata: Any,
) -> Any:
    """A ``datasets.DatasetDict`` of checked rows, in their fixed order.

    rows_of: split -> ``path`` and ``sha256`` of its rows. where: keep rows whose fields have these values. first: keep
    that many items of ``test``. Whatever else lm-eval passes (a task's metadata, the model's arguments) is not about
    data. Raises StoreError if a file is missing or holds other rows than the task was written for.
    """
    from datasets import Dataset, DatasetDict

    splits = {}
    for name, file in rows_of.items():
        rows = read_rows(Path(file["path"]), file["sha256"])
        kept = [row for row in rows if all(row[k] == v for k, v in (where or {}).items())]
        if name == "test" and first is not None:
            kept = kept[:first]
        if not kept and name == "test":
            raise StoreError(f"{file['path']} has no rows where {dict(where or {})}")
        splits[name] = Dataset.from_list([dict(row) for row in kept])
    return DatasetDict(splits)
