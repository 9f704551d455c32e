"""One checkpoint folder for every system: from dummy weights, a package, the hub, or a path, in the cell's dtype.

Folders live under ``<cache>/checkpoints``. One is written under a temporary name, a shard at a time, and takes
its own name only when complete; a second process that wants the same one waits for the first.
"""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen_bench.checkpoints.gguf.header import parts_of
from flexgen_bench.checkpoints.writer import is_complete, needed_bytes, new_folder, write_repeated, write_weights
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.folders import is_gguf
from flexgen_bench.core.model import DType
from flexgen_bench.core.progress import Progress

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("flexgen_bench.stage")

# Part of every folder's name; a change of what is written must change it.
_FORMAT = 1
_READING = 2  # of users' own folders and the hub's: since which version their tensors are read as now
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Part of the names of folders that are made from a GGUF file.
_GGUF_FORMAT = 2


def checkpoint_folder(model: ModelSpec, dtype: DType, cache: Path) -> Path:
    """Where the checkpoint of ``model`` in ``dtype`` is kept. Equal models give equal folders."""
    identity = {"format": _FORMAT, "model": to_json(model), "dtype": dtype.value}
    if model.weights in (WeightSource.PATH, WeightSource.HUB):
        identity["reading"] = _READING
    if model.weights is WeightSource.PATH:
        identity["files"] = files_fingerprint(Path(model.location))
    if model.weights is WeightSource.TRAINED:
        identity["files"] = files_fingerprint(trained_folder(model.location, cache))
    if model.weights is WeightSource.PACKAGE or is_gguf(model.location):
        identity["gguf"] = _GGUF_FORMAT
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in model.shape.name)[:60]
    return cache.expanduser().absolute() / "checkpoints" / f"{name}-{model.weights}-{dtype}-{digest}"


def trained_folder(name: str, cache: Path) -> Path:
    """Where a model that was trained on this machine is kept."""
    return cache.expanduser().absolute() / "trained" / name


def is_prepared(model: ModelSpec, dtype: DType, cache: Path) -> bool:
    """Whether ``prepare_checkpoint`` would have nothing to do."""
    return is_complete(checkpoint_folder(model, dtype, cache))


def prepare_checkpoint(model: ModelSpec, dtype: DType, cache: Path, progress: Progress) -> Path:
    """A complete Hugging Face style folder of ``model`` with tensors of ``dtype``.

    It holds config.json, safetensors, and the tokenizer files where the source has them. A folder of the user's
    own that is already like this is returned as it is. Raises StoreError (naming what and where) for a
    source that cannot be reached or is damaged, and for a disk that is full or cannot be written; UserError
    for a path that is not there.
    """
    target = checkpoint_folder(model, dtype, cache)
    if is_complete(target):
        return target
    with locked(target):
        if is_complete(target):  # another process was faster
            return target
        if model.weights is WeightSource.DUMMY:
            _write_dummy(model, dtype, target, progress)
            return target
        source = _source(model, cache, progress)
        if is_gguf(source):
            _convert_gguf(model, dtype, source, target, progress)
            return target
        return _convert_folder(model, dtype, source, target, progress)


def _source(model: ModelSpec, cache: Path, progress: Progress) -> Path:
    if model.weights is WeightSource.PACKAGE:
        from flexgen_bench.checkpoints.packages import package_file

        return package_file(model.location, cache.expanduser().absolute(), progress)
    if model.weights is WeightSource.TRAINED:
        folder = trained_folder(model.location, cache)
        if not (folder / "config.json").exists():
            raise StoreError(
                f"{model.location} has not been trained on this machine. Run python scripts/train_small_opt.py "
                "(minutes), "
                "or use weights=dummy."
            )
        return folder
    if model.weights is WeightSource.HUB:
        from flexgen_bench.checkpoints.hub import hub_folder

        return hub_folder(model.location)
    path = Path(model.location)
    if not path.is_dir() and not (path.is_file() and is_gguf(path)):
        raise UserError("location", str(path), "an existing checkpoint folder or .gguf file")
    return path


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of a folder. The kernel releases it when this process ends, however it ends."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(target.parent / f".{target.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"cannot write in {target.parent}: {reason}. Choose another cache_dir.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("another process prepares %s; waiting for it", target.name)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write_dummy(model: ModelSpec, dtype: DType, target: Path, progress: Progress) -> None:
    from flexgen_bench.checkpoints.dummy_weights import REPEATED_FROM_BYTES, dummy_tensor, firsts
    from flexgen_bench.checkpoints.hf_config import expected_tensors, hf_config, other_types

    config = hf_config(model.shape, dtype)
    expected = expected_tensors(model.shape, config)
    others = other_types(model.shape, expected)

    def get(name: str) -> torch.Tensor:
        return dummy_tensor(name, expected[name], dtype, model.shape.num_layers, model.seed)

    if needed_bytes(expected, dtype, others) < REPEATED_FROM_BYTES:
        with new_folder(target, needed_bytes(expected, dtype, others)) as folder:
            config.save_pretrained(folder)
            write_weights(folder, expected, dtype, get, progress, others)
        return
    first_of = firsts(expected)
    stored = {name: shape for name, shape in expected.items() if first_of[name] == name}
    with new_folder(target, needed_bytes(stored, dtype, others)) as folder:
        config.save_pretrained(folder)
        write_repeated(folder, expected, dtype, get, first_of.__getitem__, progress, others)


def _convert_gguf(model: ModelSpec, dtype: DType, file: Path, target: Path, progress: Progress) -> None:
    from flexgen_bench.checkpoints.gguf.config import config_from_gguf
    from flexgen_bench.checkpoints.gguf.header import read_header
    from flexgen_bench.checkpoints.gguf.tensors import GGUFTensors
    from flexgen_bench.checkpoints.gguf.tokenizer import gguf_tokenizer
    from flexgen_bench.checkpoints.hf_config import check_same_model, expected_tensors, hf_config

    _log.info("reading %s", file.name)
    header = read_header(file)
    check_same_model(model.shape, config_from_gguf(header), file)
    config = hf_config(model.shape, dtype)
    expected = expected_tensors(model.shape, config)
    tensors = GGUFTensors(header, model.shape.num_heads, model.shape.num_kv_heads, dtype)
    tensors.check(expected)
    made = gguf_tokenizer(header, model.shape.max_positions)
    special = made.vocabulary
    for key, token in (("bos", special.bos), ("eos", special.eos), ("pad", special.pad)):
        setattr(config, f"{key}_token_id", token)
    with new_folder(target, needed_bytes(expected, dtype)) as folder:
        config.save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
        if special.ends:  # where every system looks for what ends a generation
            ends = {"eos_token_id": list(special.ends)}
            (folder / "generation_config.json").write_text(json.dumps(ends, indent=2))
        write_weights(folder, expected, dtype, tensors.get, progress)


def _convert_folder(model: ModelSpec, dtype: DType, folder: Path, target: Path, progress: Progress) -> Path:
    from flexgen_bench.checkpoints.hf_config import (
        check_same_model,
        check_same_shape,
        expected_tensors,
        hf_config,
        other_types,
    )
    from flexgen_bench.checkpoints.reader import read_config
    from flexgen_bench.checkpoints.source import open_source
    from flexgen_bench.models.stored_names import locate

    # Whether the embedding is tied, the tensors decide.
    ties = {"tie_word_embeddings": model.shape.tied_embeddings}
    check_same_model(model.shape, read_config(folder) | ties, folder)
    with open_source(folder) as source:
        check_same_shape(model.shape, source.shape, folder)
        expected = expected_tensors(model.shape, hf_config(model.shape, dtype))
        others = other_types(model.shape, expected)
        if model.weights is WeightSource.PATH and source.is_standard(expected, dtype.value, others):
            return folder
        if source.note:
            _log.warning("%s: %s", folder, source.note)
        own = locate(source.names, source.family.prefixes, expected).found
        name_of = {full: name for name, full in own.items()}
        with new_folder(target, needed_bytes(expected, dtype)) as made:
            for name in _TOKENIZER_FILES:
                if (folder / name).is_file():
                    _copy(folder / name, made / name)
            config = source.written_config() | {"dtype": dtype.value}
            (made / "config.json").write_text(json.dumps(config, indent=2))

            def get(full: str) -> torch.Tensor:
                return source.tensor(name_of[full]) if full in name_of else source.checkpoint.stored.tensor(full)

            write_weights(made, expected, dtype, get, progress, others)
    return target


def _copy(file: Path, target: Path) -> None:
    """A byte order mark stays behind: transformers cannot read JSON with one."""
    if file.suffix == ".json":
        target.write_bytes(file.read_bytes().removeprefix(codecs.BOM_UTF8))
    else:
        shutil.copyfile(file, target)


def files_fingerprint(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a user's files, so that a changed checkpoint is converted again."""
    files = sorted(path.iterdir()) if path.is_dir() else parts_of(path)
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
