"""The words of a command line, as Hydra must have them."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence

from flexgen_bench.config.overrides import MULTIRUN, readable
from flexgen_bench.config.paths import conf_dir
from flexgen_bench.config.schema import AppConf
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.folders import is_gguf

# What Hydra reads as text, and so as the name of a file.
_NAME = re.compile(r"(?!(?:null|true|false)$)[A-Za-z_./][A-Za-z0-9_./-]*|[0-9]+[A-Za-z_./-][A-Za-z0-9_./-]*")
# Functions of Hydra that make several values of a group.
_SWEEP = re.compile(r"(?:choice|glob|shuffle|sort|tag)\(")
# Beginnings of a place on the disk, which is no name of a file in conf.
_PLACES = ("/", "~", ".")
_OPTIONAL = ("system", "suite")
# Hydra's own, whose value is the next word.
_OPTIONS_WITH_VALUE = (
    "--cfg",
    "-c",
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--experimental-rerun",
    "--info",
    "-i",
    "--package",
    "-p",
)


def prepared(arguments: Sequence[str]) -> list[str]:
    """A command line as Hydra must have it: paths quoted, no null groups, overrides behind options. Raises UserError
    for what it could not take."""
    check_groups(arguments)
    options = {w for before, w in itertools.pairwise(arguments) if before in _OPTIONS_WITH_VALUE}
    several = any(word in MULTIRUN for word in arguments)
    words = readable(without_null_groups(arguments), AppConf, several=several, skip=tuple(options))
    return overrides_last(words)


def check_groups(arguments: Sequence[str]) -> None:
    """Refuse what Hydra would not take as the name of a group's file: a bare number, a list, an empty name.

    ``model=a,b`` (several names for --multirun) passes; ``system=null`` means every system.
    """
    for argument in arguments:
        _, equals, value = argument.partition("=")
        key = key_of(argument)
        folder = conf_dir() / key
        optional = value == "null" and key in _OPTIONAL
        if not (equals and key and folder.is_dir()) or optional or _SWEEP.match(value):
            continue
        known = [path.stem for path in folder.glob("*.yaml")]
        for name in value.split(","):
            if name not in known and (not _NAME.fullmatch(name) or name.startswith(_PLACES)):
                raise _no_choice(key, value, known)


def _no_choice(key: str, name: str, known: Sequence[str]) -> UserError:
    error = unknown_choice(key, name, known)
    if key != "model" or not (name.startswith(_PLACES) or is_gguf(name)):
        return error
    place = shlex.quote(f"location={name}")
    return UserError(key, name, error.allowed, f"A checkpoint of your own: weights=path {place}")


def without_null_groups(arguments: Sequence[str]) -> list[str]:
    """Hydra takes no null for a group's choice: every system is the default, and a suite is taken out."""
    dropped = {"system=null": [], "suite=null": ["~suite"]}
    return [word for argument in arguments for word in dropped.get(argument, [argument])]


def overrides_last(arguments: Sequence[str]) -> list[str]:
    """The same with overrides behind options, in their order: Hydra's parser knows no overrides on both sides of
    ``--config-dir``. An option whose value is missing stays last, so that it is told."""
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


def merged(first: Sequence[str], then: Sequence[str]) -> list[str]:
    """``first``, with what ``then`` sets again left out (Hydra refuses a group chosen twice), and ``then``."""
    again = {key_of(line) for line in then}
    return [line for line in first if key_of(line) not in again] + list(then)
