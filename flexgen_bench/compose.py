"""From a command line to cells: which suite applies, and what each of its cells is composed of.

Hydra composes; this module decides what it composes, and says in our words what Hydra objects to.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from yaml import YAMLError

from flexgen_bench.conf_schema import AppConf, CellGroupConf
from flexgen_bench.config import app_conf, cell_spec, conf_dir, system_model, typed_conf
from flexgen_bench.core.cell import CellSpec, WeightSource
from flexgen_bench.core.errors import StoreError, UserError, unknown_choice
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.simulated import SIMULATED_ONLY, SystemModel
from flexgen_bench.ignored_options import refuse_ignored
from flexgen_bench.runner.shape_of_weights import shape_at

CONFIG_NAME = "config"
COMMAND = "python -m flexgen_bench"
# What Hydra reads as text, and so as the name of a file.
_NAME = re.compile(
    r"(?!(?:null|true|false)$)[A-Za-z_./][A-Za-z0-9_./-]*|[0-9]+[A-Za-z_./-][A-Za-z0-9_./-]*"
)
_OPTIONAL = ("system", "suite")
# Hydra's own, whose value is the next word.
_OPTIONS_WITH_VALUE = (
    "--cfg", "-c", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp",
    "--experimental-rerun", "--info", "-i", "--package", "-p",
)  # fmt: skip
# What a command line says about the run, and not about a cell.
_NOT_OF_THE_CELL = ("suite", "system", "cell", "rerun", "dry_run", "json")


@dataclass(frozen=True)
class Cell:
    """A cell with its name in the suite ("" outside one) and the overrides that choose it again.

    model: what predicts its system. keys: what the command line or the suite says, where the rest is default; given: of a cell outside a suite, what the command line says. named: its system was asked for,
    not just all of them.
    """

    name: str
    spec: CellSpec
    overrides: tuple[str, ...]
    model: SystemModel = field(default_factory=SystemModel)
    keys: frozenset[str] = frozenset()
    named: bool = True
    conf: AppConf = field(default_factory=AppConf, repr=False, compare=False)
    given: frozenset[str] = frozenset()

    @property
    def num_prompts(self) -> int | None:
        """Prompts of a simulated run; None, as in the paper, for as many as a block of the system holds."""
        return self.spec.workload.num_prompts if "workload.num_prompts" in self.keys else None

    @property
    def lossy_is_given(self) -> bool:
        """Whether somebody has said what may change of the results."""
        given = any(key.startswith("policy.lossy") for key in self.keys)
        return given or not self.spec.lossy.is_exact

    @property
    def can_run(self) -> bool:
        """Whether there is anything to run, on any machine."""
        return self.spec.target != SIMULATED_ONLY

    @property
    def command(self) -> str:
        """What to type to measure this cell again."""
        return f"{COMMAND} {shlex.join([*self.overrides, 'rerun=true'])}"


@dataclass(frozen=True)
class Plan:
    """What a command line asks for. ``suite`` is "" where cells were asked for one by one."""

    suite: str
    cells: tuple[Cell, ...]


def plan(conf: AppConf, overrides: Sequence[str], suite: str) -> Plan:
    """The cells of a command line, whose overrides are ``overrides`` and whose suite group is ``suite``.

    Naming a model or a system asks for just that, unless a suite is named too: then it is laid over each of
    the suite's cells. A machine may state its usual workload and dtype, for command lines that name none. Must be called while Hydra is initialised. Raises UserError.
    """
    given = {key_of(override) for override in overrides}
    if conf.suite is None or ("suite" not in given and given & {"model", "system", "location"}):
        if conf.cell is not None:
            raise UserError(
                "cell", conf.cell, "given with a suite, whose cells have names", "Add suite=..., or leave cell out."
            )  # fmt: skip
        names = [conf.system.name] if conf.system else system_names()
        of_machine = {"workload": conf.gpu.workload, "dtype": conf.gpu.dtype}
        usual = [f"{key}={value}" for key, value in of_machine.items() if value]
        group = CellGroupConf(name="", overrides=usual, systems=names)
        cells = _cells(group, overrides, named=conf.system is not None)
        return Plan("", tuple(cells))
    wanted = [conf.system.name] if conf.system else None
    groups = [g for g in conf.suite.cells if conf.cell in (None, g.name)]
    if not groups:
        raise unknown_choice("cell", str(conf.cell), [g.name for g in conf.suite.cells])
    cells = [cell for group in groups for cell in _cells(group, overrides, wanted, suite)]
    if not cells:
        raise UserError("suite", suite, "a suite that holds cells for the system asked for")
    return Plan(suite, tuple(cells))


def command_cells(overrides: Sequence[str]) -> tuple[Cell, ...]:
    """The cells of a command line that names a model, for callers that do not come through it. Raises UserError.

    Initialises Hydra, and leaves it as it was.
    """
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return plan(composed(overrides), overrides, "").cells


def check_groups(arguments: Sequence[str]) -> None:
    """Refuse what Hydra would not take as the name of a group's file: a bare number, a list, an empty name.

    ``model=a,b`` (several names for --multirun) passes; ``system=null`` means every system.
    """
    for argument in arguments:
        _, equals, value = argument.partition("=")
        key = key_of(argument)
        folder = conf_dir() / key
        optional = value == "null" and key in _OPTIONAL
        if not (equals and key and folder.is_dir()) or optional or "(" in value:
            continue
        known = [path.stem for path in folder.glob("*.yaml")]
        for name in value.split(","):
            if name not in known and not _NAME.fullmatch(name):
                raise unknown_choice(key, name, known)


def without_null_groups(arguments: Sequence[str]) -> list[str]:
    """Hydra takes no null for a group's choice: every system is the default, and a suite is taken out."""
    dropped = {"system=null": [], "suite=null": ["~suite"]}
    return [word for argument in arguments for word in dropped.get(argument, [argument])]


def overrides_last(arguments: Sequence[str]) -> list[str]:
    """The same with overrides behind options, in their order: Hydra's parser knows no overrides on both sides of ``--config-dir``. An option
    whose value is missing stays last, so that it is told."""
    if arguments and arguments[-1] in _OPTIONS_WITH_VALUE:
        return [*overrides_last(arguments[:-1]), arguments[-1]]
    before: list[str] = []
    overrides: list[str] = []
    previous = ""
    for word in arguments:
        is_override = not word.startswith("-") and previous not in _OPTIONS_WITH_VALUE
        (overrides if is_override else before).append(word)
        previous = word
    return before + overrides


def key_of(override: str) -> str:
    """``+gpu.cpu_memory=2GiB`` -> ``gpu.cpu_memory``."""
    return override.partition("=")[0].lstrip("+~")


def system_names() -> list[str]:
    """Every system in conf/system (and in the user's own --config-dir)."""
    options: list[str] = GlobalHydra.instance().config_loader().get_group_options("system")
    return sorted(options)


def _cells(
    group: CellGroupConf,
    overrides: Sequence[str],
    wanted: Sequence[str] | None = None,
    suite: str = "",
    named: bool = True,
) -> list[Cell]:
    unknown = set(group.system_overrides) - set(group.systems)
    if unknown:
        raise unknown_choice(f"system_overrides of cell {group.name}", min(unknown), group.systems)
    user = [o for o in overrides if key_of(o) not in _NOT_OF_THE_CELL]
    cells = []
    for name in group.systems:
        if wanted is None or name in wanted:
            own = [f"system={name}", *group.system_overrides.get(name, [])]
            lines = merged([*group.overrides, *own], user)
            # A record that is made again must land in the same suite, where its table finds it.
            chosen = (
                [f"suite={suite}", f"cell={group.name}", f"system={name}", *user]
                if suite
                else lines
            )
            conf = composed(lines)
            assert conf.system is not None
            keys = frozenset(map(key_of, lines))
            given = frozenset() if suite else frozenset(map(key_of, overrides))
            if not suite:
                refuse_ignored(conf, given, named)
            cells.append(
                Cell(
                    group.name,
                    cell_spec(conf, _shape_of_weights(conf, keys)),
                    tuple(chosen),
                    system_model(conf.system),
                    keys,
                    named,
                    conf,
                    given,
                )
            )
    return cells


def _shape_of_weights(conf: AppConf, keys: frozenset[str]) -> ModelShape | None:
    """The shape of the model in ``location``, where no model is named; None where one is, or is not asked for. Raises UserError."""
    if conf.location is None or any(key.split(".")[0] == "model" for key in keys):
        return None
    if conf.weights != WeightSource.PATH.value:
        raise UserError(
            "location", conf.location, "given with the model that it holds", "Add model=..., or weights=path for a folder or .gguf file."
        )  # fmt: skip
    try:
        return shape_at(Path(conf.location).expanduser())
    except StoreError as error:
        raise UserError("location", conf.location, f"a model that can be read ({error})") from error


def merged(first: Sequence[str], then: Sequence[str]) -> list[str]:
    """``first``, with what ``then`` sets again left out (Hydra refuses a group chosen twice), and ``then``."""
    again = {key_of(line) for line in then}
    return [line for line in first if key_of(line) not in again] + list(then)


def composed(overrides: Sequence[str]) -> AppConf:
    """The typed configuration of some overrides. Raises UserError in our words for what Hydra refuses."""
    try:
        return app_conf(compose(CONFIG_NAME, overrides=list(overrides)))
    except (HydraException, YAMLError) as error:
        raise user_error(error) from error


def composed_as(name: str, schema: type[Any], overrides: Sequence[str]) -> Any:
    """The configuration conf/``name``.yaml under some overrides, as an instance of ``schema``. Raises UserError.

    Initialises Hydra, and leaves it as it was.
    """
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            return typed_conf(schema, compose(name, overrides=list(overrides)))
        except (HydraException, YAMLError) as error:
            raise user_error(error, schema) from error


def user_error(error: HydraException | YAMLError, schema: type[Any] = AppConf) -> UserError:
    """What Hydra objects to, naming the key and what is allowed; or a file that is no YAML. schema: of the configuration, for the keys there are."""
    if isinstance(error, YAMLError):
        return _unreadable(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return unknown_choice(group or "config", name, error.options or [])
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    quoted = lines[0].split("'") if lines else []
    if "Could not override" in lines[0] and len(quoted) > 2:
        key = quoted[1].rstrip(".")
        return _unknown_key(key, lines, schema)
    action = "Run with --help for the groups and keys."
    return UserError(
        "command line", " ".join(lines)[:190], "key=value overrides that exist", action
    )


def _unreadable(error: YAMLError) -> UserError:
    """Names the group and the file with the line."""
    reason = " ".join(str(error).split())
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return UserError("configuration", None, f"of readable YAML files ({reason})")
    path = Path(mark.name)
    where = f"{path}, line {mark.line + 1}"
    return UserError(path.parent.name, where, f"a readable YAML file ({reason})")


def _unknown_key(key: str, lines: list[str], schema: type[Any]) -> UserError:
    parent = key.rpartition(".")[0]
    hint = "Run with --help for the groups and keys, with --cfg job for those of your choices."
    if parent.startswith("policy") and key.rpartition(".")[2] in _keys_of(parent, schema):
        hint = "policy=auto has only max_latency_s, which others have not: to set the rest start from another, e.g. policy=half-disk."
        return UserError("key", key, "a key of the policy chosen", hint)
    if parent.startswith("system"):
        hint = "Options belong to one system: name it with system=..., and see its file in conf/system."
        return UserError("key", key, "a key of the system chosen", hint)
    known = _keys_of(parent, schema)
    if known:
        return unknown_choice(
            "key", key, [f"{parent}.{name}" if parent else name for name in known]
        )
    return UserError("key", key, "a key of the configuration", hint)


def _keys_of(path: str, schema: type[Any]) -> list[str]:
    """The keys of a part of the configuration such as ``workload``; none for free mappings like options."""
    owner: Any = schema
    for name in filter(None, path.split(".")):
        hint = get_type_hints(owner).get(name)
        classes = [t for t in (hint, *get_args(hint)) if is_dataclass(t)]
        if not classes:
            return []
        owner = classes[0]
    return sorted(f.name for f in fields(owner))
