"""What Hydra, OmegaConf and YAML object to, in our words: the key or the file, and what is allowed."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra.errors import HydraException, MissingConfigException
from yaml import YAMLError

from flexgen_bench.config.schema import AppConf
from flexgen_bench.config.typed import ConfError, conf_error
from flexgen_bench.core.errors import UserError, unknown_choice

# What Hydra and OmegaConf raise for a configuration that cannot be composed. UserErrors are ValueErrors, too, but not
# of this kind.
NOT_COMPOSED = (HydraException, ConfError, YAMLError, UnicodeDecodeError, OSError)


def user_error(error: Exception, schema: type[Any] = AppConf) -> UserError:
    """What Hydra objects to, one of ``NOT_COMPOSED``, naming the key and what is allowed; or a file that is no YAML.
    schema: of the configuration, for the keys there are."""
    if isinstance(error, ConfError):
        return conf_error(schema, error)
    # An override that begins like an interpolation and is none.
    if isinstance(error.__cause__, ConfError) and "${" in str(error):
        return conf_error(schema, error.__cause__)
    if isinstance(error, YAMLError):
        return _unreadable(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing(error)
    if isinstance(error, HydraException):
        return _objection(error, schema)
    reason = " ".join(str(error).split())
    return UserError("configuration", None, f"of readable YAML files in UTF-8 ({reason})")


def _missing(error: MissingConfigException) -> UserError:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    if error.options:
        return unknown_choice(group or "config", name, error.options)
    return UserError(group or "--config-name", name, "the name of a YAML file that exists")


def _objection(error: Exception, schema: type[Any]) -> UserError:
    """What Hydra says of an override, of a key or of a folder."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    quoted = lines[0].split("'") if lines else []
    if "Could not override" in lines[0] and len(quoted) > 2:
        key = quoted[1].rstrip(".")
        return _unknown_key(key, lines, schema)
    action = "Run with --help for the groups and keys."
    return UserError("command line", " ".join(lines)[:190], "key=value overrides that exist", action)


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
        hint = (
            "policy=auto has only max_latency_s, which others have not: to set the rest start from another, e.g. "
            "policy=half-disk."
        )
        return UserError("key", key, "a key of the policy chosen", hint)
    if parent.startswith("system"):
        hint = "Options belong to one system: name it with system=..., and see its file in conf/system."
        return UserError("key", key, "a key of the system chosen", hint)
    known = _keys_of(parent, schema)
    if known:
        return unknown_choice("key", key, [f"{parent}.{name}" if parent else name for name in known])
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
