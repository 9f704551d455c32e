"""Modes: named ways to change a model's numbers, one YAML file each in conf/accuracy/modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flexgen_bench.checkpoints.gguf.file_types import FileType
from flexgen_bench.config.paths import choice_file, choices
from flexgen_bench.config.typed import load_typed
from flexgen_bench.core.accuracy import EXACT_MODE
from flexgen_bench.core.codec import from_json
from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.errors import UserError, unknown_choice

_GROUP = "accuracy/modes"


@dataclass
class ModeConf:
    """conf/accuracy/modes: see ``Mode``. lossy: as JSON, defaults left out."""

    title: str = "???"
    dtype: str | None = None
    lossy: dict[str, Any] = field(default_factory=dict)
    weight_format: str | None = None


@dataclass(frozen=True)
class Mode:
    """title: in a report's words. dtype: of what is not compressed; None: that of the run. weight_format: the weights
    are rounded to it beforehand, and computed with as plain numbers."""

    name: str
    title: str
    lossy: Lossy
    dtype: str | None = None
    weight_format: FileType | None = None

    @property
    def is_reference(self) -> bool:
        return self.name == EXACT_MODE


def list_modes() -> list[str]:
    """The names in conf/accuracy/modes."""
    return choices(_GROUP)


def load_mode(name: str) -> Mode:
    """The mode of that name. Raises UserError listing the names for an unknown one, and for values that no mode can
    have."""
    path = choice_file(_GROUP, name, "mode")
    conf: ModeConf = load_typed(ModeConf, path, "mode.")
    try:
        lossy = from_json(Lossy, conf.lossy, "mode.lossy")
    except UserError as error:
        raise UserError(f"{path.name}: {error.field}", error.value, error.allowed, error.action) from error
    if name == EXACT_MODE and not (lossy.is_exact and conf.weight_format is None):
        raise UserError(f"{path.name}: mode.lossy", conf.lossy, "empty: it is what others are compared with")
    if conf.weight_format is None:
        return Mode(name, conf.title, lossy, conf.dtype)
    if conf.weight_format not in list(FileType):
        raise unknown_choice(f"{path.name}: mode.weight_format", conf.weight_format, FileType)
    if lossy.weights is not None:
        raise UserError(f"{path.name}: mode.lossy.weights", str(lossy.weights), "none beside a weight_format")
    return Mode(name, conf.title, lossy, conf.dtype, FileType(conf.weight_format))


def load_modes(names: Sequence[str]) -> list[Mode]:
    """Several, each once; the uncompressed one first if it is among them."""
    modes = [load_mode(name) for name in dict.fromkeys(names)]
    return sorted(modes, key=lambda mode: not mode.is_reference)
