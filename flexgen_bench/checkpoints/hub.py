"""Checkpoints from the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path

from flexgen_bench.core.errors import StoreError

_log = logging.getLogger("flexgen_bench.stage")
_WITHOUT_WEIGHTS = ["*.json", "tokenizer*", "*.txt", "*.model", "*.jinja"]


def hub_folder(repository: str) -> Path:
    """Download ``repository`` (safetensors, else pickles; config; tokenizer) or find it in the hub's cache.

    Raises StoreError saying why it cannot be had and what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    _log.info("downloading %s from the Hugging Face hub", repository)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=[*_WITHOUT_WEIGHTS, "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            # Pickles only where there is nothing better: they are several times the download.
            folder = Path(snapshot_download(repository, allow_patterns=[*_WITHOUT_WEIGHTS, "*.bin"]))
    except GatedRepoError as error:
        raise StoreError(
            f"{repository} asks for its licence to be accepted: do so on the hub, then run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise StoreError(f"the hub has no repository {repository!r} that you may read") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise StoreError(
            f"cannot download {repository}: the Hugging Face hub is not reachable from here "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Use weights=dummy for speed alone, a model "
            "that a package carries (model=smollm2-135m), or weights=path location=/your/checkpoint."
        ) from error
    return folder
