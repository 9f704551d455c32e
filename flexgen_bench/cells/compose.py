"""From a command line to cells: which suite applies, and what each of its cells is composed of.

Hydra composes; this module decides what it composes, and says in our words what Hydra objects to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from flexgen_bench.cells.local import Local, Unmeasured
from flexgen_bench.cells.words import key_of, merged
from flexgen_bench.checkpoints.hf_config import check_same_shape
from flexgen_bench.checkpoints.shape_of_weights import shape_at
from flexgen_bench.config.build import FASTEST, cell_spec, shape_of, system_model
from flexgen_bench.config.cell import Cell
from flexgen_bench.config.compose_errors import NOT_COMPOSED, user_error
from flexgen_bench.config.ignored_options import refuse_environment, refuse_ignored
from flexgen_bench.config.matrix import every_group
from flexgen_bench.config.paths import conf_dir
from flexgen_bench.config.schema import AppConf, CellGroupConf, SystemConf
from flexgen_bench.config.typed import app_conf, typed_conf
from flexgen_bench.core.cell import WeightSource
from flexgen_bench.core.errors import StoreError, UserError, unknown_choice
from flexgen_bench.core.folders import expanded, is_gguf
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.shard import Shard

CONFIG_NAME = "config"
# What a command line says about the run, and not about a cell.
_NOT_OF_THE_CELL = ("suite", "system", "cell", "shard", "rerun", "dry_run", "json")


@dataclass(frozen=True)
class Plan:
    """What a command line asks for. ``suite`` is "" where cells were asked for one by one."""

    suite: str
    cells: tuple[Cell, ...]


def plan(
    conf: AppConf, overrides: Sequence[str], suite: str, local: Local | None = None, *, is_sweep: bool = False
) -> Plan:
    """The cells of a command line, whose overrides are ``overrides`` and whose suite group is ``suite``.

    Naming a model or a system asks for just that, unless a suite is named too: then it is laid over each of
    the suite's cells. A machine may state its usual workload and dtype, for command lines that name none. local:
    settles what cells leave open. is_sweep: this is one run of a ``--multirun``. Must be called while Hydra is
    initialised. Raises UserError.
    """
    local = local or Unmeasured()
    suite = suite_of(conf, overrides, suite)
    if conf.suite is None or not suite:
        if conf.cell is not None:
            raise UserError(
                "cell", conf.cell, "given with a suite, whose cells have names", "Add suite=..., or leave cell out."
            )
        if conf.shard is not None:
            raise UserError(
                "shard", conf.shard, "given with a suite, whose cells are divided", "Add suite=..., or leave shard out."
            )
        names = [conf.system.name] if conf.system else system_names()
        of_machine = {"workload": conf.gpu.workload, "dtype": conf.gpu.dtype}
        usual = [f"{key}={value}" for key, value in of_machine.items() if value]
        group = CellGroupConf(name="", overrides=usual, systems=names)
        # Of several systems, one after the other, some may have no use for an option.
        named = conf.system is not None
        cells = _cells(group, overrides, local, named=named, refuses=named and not is_sweep)
        return Plan("", tuple(cells))
    systems = [conf.system.name] if conf.system else None
    known = every_group(conf.suite.cells)
    groups = [g for g in known if conf.cell in (None, g.name)]
    if not groups:
        raise unknown_choice("cell", str(conf.cell), [g.name for g in known])
    groups = _in_shard(groups, conf.shard)
    cells = [cell for group in groups for cell in _cells(group, overrides, local, systems, suite)]
    if not cells:
        raise UserError("suite", suite, "a suite that holds cells for the system asked for")
    return Plan(suite, tuple(cells))


def _in_shard(groups: list[CellGroupConf], text: str | None) -> list[CellGroupConf]:
    """The cells that are this machine's part. Whole ones: systems are compared on one machine. Raises UserError."""
    if text is None:
        return groups
    shard = Shard.parse(text, "shard", "=")
    if shard.count > len(groups):
        raise UserError("shard", text, f"at most {len(groups)} parts: so many cells there are to divide")
    return [group for position, group in enumerate(groups) if shard.has(position)]


def suite_of(conf: AppConf, overrides: Sequence[str], suite: str) -> str:
    """The suite that a command line runs; "" where it asks for cells one by one."""
    given = {key_of(override) for override in overrides}
    one_by_one = conf.suite is None or ("suite" not in given and given & {"model", "system", "location"})
    return "" if one_by_one else suite


def command_cells(overrides: Sequence[str]) -> tuple[Cell, ...]:
    """The cells of a command line that names a model, for callers that do not come through it. Raises UserError.

    Initialises Hydra, and leaves it as it was.
    """
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return plan(composed(overrides), overrides, "").cells


def system_names() -> list[str]:
    """Every system in conf/system (and in the user's own --config-dir)."""
    options: list[str] = GlobalHydra.instance().config_loader().get_group_options("system")
    return sorted(options)


def _cells(
    group: CellGroupConf,
    overrides: Sequence[str],
    local: Local,
    systems: Sequence[str] | None = None,
    suite: str = "",
    named: bool = True,
    refuses: bool = False,
) -> list[Cell]:
    """The cells of a group, of the ``systems`` (None: all of them). refuses: options that their systems have no
    use for are refused."""
    unknown = set(group.system_overrides) - set(group.systems)
    if unknown:
        raise unknown_choice(f"system_overrides of cell {group.name}", min(unknown), group.systems)
    user = [o for o in overrides if key_of(o) not in _NOT_OF_THE_CELL]
    chosen = [name for name in group.systems if systems is None or name in systems]
    if not chosen:
        return []
    lines = {name: merged(_lines(group, name), user) for name in chosen}
    confs = _composed_alike(lines)
    given = frozenset() if suite else frozenset(map(key_of, overrides))
    for conf in confs.values():
        refuse_ignored(conf, given, refuses)
        refuse_environment(conf, frozenset(map(key_of, user)))
    cells = {name: _cell(group, conf, lines[name], local) for name, conf in confs.items()}
    changes, note = _settled(group, confs, cells, local, user)
    settled_cells = []
    for name in chosen:
        final = merged(lines[name], changes)
        # (A dtype that was left open is settled in the cell already.)
        cell = _cell(group, composed(final), final, local) if note else cells[name]
        # A record that is made again must land in the same suite, where its table finds it.
        place = [f"suite={suite}", f"cell={group.name}", f"system={name}"] if suite else None
        command = final if place is None else merged([*place, *user], changes)
        settled = replace(cell, overrides=tuple(command), named=named, note=note, given=given)
        settled_cells.append(settled)
    return settled_cells


def _composed_alike(lines: Mapping[str, Sequence[str]]) -> dict[str, AppConf]:
    """The configurations of cells, each composed of its overrides. Where they differ in the system alone, so do the
    configurations: the rest is composed once."""
    confs: dict[str, AppConf] = {}
    composed_of: dict[tuple[str, ...], AppConf] = {}
    for name, own in lines.items():
        rest = tuple(line for line in own if not _is_of_system(line))
        if rest in composed_of:
            confs[name] = _with_system(composed_of[rest], name, own)
        else:
            confs[name] = composed_of[rest] = composed(own)
    return confs


def _is_of_system(line: str) -> bool:
    key = key_of(line)
    return key == "system" or key.startswith("system.")


def _with_system(conf: AppConf, name: str, lines: Sequence[str]) -> AppConf:
    """The configuration with another system, whose own overrides are among ``lines``."""
    own = [line for line in lines if key_of(line) != "system" and (_is_of_system(line) or line.startswith("hydra."))]
    try:
        system: SystemConf = typed_conf(SystemConf, compose(f"system/{name}", overrides=own).system)
    except (UserError, *NOT_COMPOSED):  # what is wrong is said of the whole
        return composed(lines)
    return replace(conf, system=system)


def _lines(group: CellGroupConf, system: str) -> list[str]:
    return [*group.overrides, f"system={system}", *group.system_overrides.get(system, [])]


def _cell(group: CellGroupConf, conf: AppConf, lines: Sequence[str], local: Local) -> Cell:
    assert conf.system is not None
    keys = frozenset(map(key_of, lines))
    return Cell(
        group.name,
        cell_spec(conf, local.fastest, _shape_of_weights(conf, keys)),
        tuple(lines),
        system_model(conf.system),
        keys,
        subject=conf.system.subject,
        conf=conf,
    )


def _settled(
    group: CellGroupConf, confs: Mapping[str, AppConf], cells: Mapping[str, Cell], local: Local, user: Sequence[str]
) -> tuple[list[str], str]:
    """The overrides that say what was left open, so that the command of a record asks for just what it holds; and why
    something was left out of the workload. user: the overrides of the command line."""
    conf, cell = next(iter(confs.values())), next(iter(cells.values()))
    changes = [f"dtype={cell.spec.dtype}"] if conf.dtype == FASTEST else []
    if conf.measure.budget_s is None:
        return changes, ""
    # Systems that are not measured today are asked as well: what is left out is the same whoever is. Options of a
    # system are only its own.
    of_all = [override for override in user if not key_of(override).startswith("system.")]
    others = {n: merged(_lines(group, n), of_all) for n in group.systems if n not in cells}
    everyone = dict(cells) | {n: _cell(group, composed(own), own, local) for n, own in others.items()}
    prefix = "workload."
    stated = {key_of(o).removeprefix(prefix) for o in user if key_of(o).startswith(prefix)}
    fit = local.fitted(everyone, conf.measure.budget_s, stated)
    changes += [f"{prefix}{name}={value}" for name, value in fit.changes.items()]
    return [*changes, "measure.budget_s=null"] if fit.note else changes, fit.note


def _shape_of_weights(conf: AppConf, keys: frozenset[str]) -> ModelShape | None:
    """The shape of the model in ``location``, where no model is named; None where one is, or nothing is to be read. A
    model that is named must be the one that is there. Raises UserError."""
    is_named = any(key.split(".")[0] == "model" for key in keys)
    is_path = conf.weights == WeightSource.PATH.value
    if conf.location is None or (is_named and not is_path):
        return None
    if not is_path:
        raise UserError(
            "location",
            conf.location,
            "given with the model that it holds",
            "Add model=..., or weights=path for a folder or .gguf file.",
        )
    if not conf.location:  # of $UNSET, say; as a path it would be the folder that one is in
        raise UserError("location", conf.location, "the checkpoint folder or .gguf file", "Add location=/path/to/it.")
    place = expanded(conf.location, "location")
    is_there = is_gguf(place) if place.is_file() else (place / "config.json").is_file()
    if is_named and not is_there:  # refused where the cell is made
        return None
    try:
        shape = shape_at(place)
        if is_named:
            check_same_shape(shape_of(conf.model), shape, place)
    except StoreError as error:
        raise UserError("location", conf.location, f"a model that can be read ({error})") from error
    return None if is_named else shape


def composed(overrides: Sequence[str]) -> AppConf:
    """The typed configuration of some overrides. Raises UserError in our words for what Hydra refuses."""
    try:
        return app_conf(compose(CONFIG_NAME, overrides=list(overrides)))
    except NOT_COMPOSED as error:
        raise user_error(error) from error


def composed_as(name: str, schema: type[Any], overrides: Sequence[str]) -> Any:
    """The configuration conf/``name``.yaml under some overrides, as an instance of ``schema``. Raises UserError.

    Initialises Hydra, and leaves it as it was.
    """
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            return typed_conf(schema, compose(name, overrides=list(overrides)))
        except NOT_COMPOSED as error:
            raise user_error(error, schema) from error
