"""The tables of papers as conf/table describes them, and what else their report needs from the
configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexgen_bench.config.build import to_lossy
from flexgen_bench.config.paths import conf_dir
from flexgen_bench.config.schema import FootnotesConf, LossyConf, SystemConf, TableConf
from flexgen_bench.config.typed import load_typed
from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.errors import unknown_choice


@dataclass(frozen=True)
class ConfiguredSystem:
    """A system as far as predictions go: see ``config.schema.SystemConf``."""

    name: str
    predictor: str | None = None
    constants: Mapping[str, float] = field(default_factory=dict)
    printed_as: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, list[str]] = field(default_factory=dict)


def paper_dir() -> Path:
    """The folder of what papers print: FlexGen's (tables.csv), and of its successors."""
    return conf_dir() / "paper"


def list_tables(own: Path | None = None) -> list[str]:
    """The names in conf/table, those in the folder ``own``/table among them."""
    folders = [conf_dir() / "table", *([own / "table"] if own is not None else [])]
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")}, key=_by_number)


def table_conf(name: str, own: Path | None = None) -> TableConf:
    """``table/<name>.yaml`` of the folder ``own``, or of conf. Raises UserError naming what is wrong with it."""
    if name not in list_tables(own):
        raise unknown_choice("table", name, list_tables(own))
    folders = [*([own] if own is not None else []), conf_dir()]
    path = next(p for f in folders if (p := f / "table" / f"{name}.yaml").is_file())
    table: TableConf = load_typed(TableConf, path, "table.")
    return table


def footnotes() -> Mapping[str, str]:
    """conf/paper/footnotes.yaml: texts by key."""
    conf: FootnotesConf = load_typed(FootnotesConf, paper_dir() / "footnotes.yaml", "footnotes.")
    return conf.notes


def configured_systems() -> list[ConfiguredSystem]:
    """Every system of conf/system."""
    models = []
    for path in sorted((conf_dir() / "system").glob("*.yaml")):
        conf: SystemConf = load_typed(SystemConf, path, "system.")
        models.append(
            ConfiguredSystem(conf.name, conf.predictor, conf.constants, conf.printed_as, conf.options, conf.choices)
        )
    return models


def engine_lossy(conf: LossyConf | None) -> Lossy | None:
    """What this project's engine may change of the results; None where it is not asked."""
    return None if conf is None else to_lossy(conf)


def _by_number(name: str) -> tuple[str, int, str]:
    """Sorts t2 before t15, and figures before tables."""
    letters = name.rstrip("0123456789")
    return letters, int(name[len(letters) :] or 0), name
