"""Options that would be ignored, because another is missing or excludes them: each is refused with what to do about it.

An option says what is wanted. One that changes nothing where it stands has been misunderstood, so it is refused instead
of being silently dropped. What a suite states for its cells is not looked at: some of its systems may have no use for
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flexgen_bench.config.schema import AppConf
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import Accelerator

# Of a policy that the system chooses, these are looked at.
_OF_AUTO = ("name", "auto", "max_latency_s", "lossy")
_COMPRESSED = ("weights", "kv_cache")


@dataclass(frozen=True)
class CommandLine:
    """A configuration with the keys that the user has written himself. named: its system was asked for, not just all of
    them."""

    conf: AppConf
    given: frozenset[str]
    named: bool

    def keys(self, prefix: str) -> list[str]:
        """Those of them that are ``prefix`` or lie below it."""
        return sorted(k for k in self.given if k == prefix or k.startswith(f"{prefix}."))


@dataclass(frozen=True)
class Rule:
    """keys: the options that are ignored in a configuration, if any. allowed, action: of the error."""

    keys: Callable[[CommandLine], list[str]]
    allowed: str
    action: str


def _of_a_policy(line: CommandLine) -> list[str]:
    system = line.conf.system
    if not line.named or system is None or system.follows_policy:
        return []
    return [k for k in line.keys("policy") if not k.startswith("policy.lossy")]


def _of_another_policy(line: CommandLine) -> list[str]:
    if not line.conf.policy.auto:
        return []
    return [k for k in line.keys("policy") if k != "policy" and k.split(".")[1] not in _OF_AUTO]


def _latency(line: CommandLine) -> list[str]:
    return [] if line.conf.policy.auto else line.keys("policy.max_latency_s")


def _group_size(line: CommandLine) -> list[str]:
    lossy = line.conf.policy.lossy
    used = any(getattr(lossy, name) is not None for name in _COMPRESSED)
    return [] if used else line.keys("policy.lossy.group_size")


def _location(line: CommandLine) -> list[str]:
    conf = line.conf
    dummy = (conf.weights or conf.model.weights) == "dummy"
    return line.keys("location") if dummy else []


def _shortest(line: CommandLine) -> list[str]:
    return [] if line.conf.workload.kind == "text" else line.keys("workload.min_prompt_len")


def _tuning(line: CommandLine) -> list[str]:
    return [] if line.conf.measure.batch_sizes else line.keys("measure.tuning_gen_len")


def _gpu_memory(line: CommandLine) -> list[str]:
    none = line.conf.gpu.accelerator == Accelerator.NONE.value
    return line.keys("gpu.gpu_memory") if none else []


def _tracker(line: CommandLine) -> list[str]:
    keys = [k for k in line.keys("tracker") if k not in ("tracker", "tracker.name")]
    return keys if line.conf.tracker.name == "none" else []


RULES = (
    Rule(
        _of_a_policy,
        "left out with a system that follows no policy",
        "Its own settings are system.options (see its file in conf/system); or leave system out.",
    ),
    Rule(
        _of_another_policy,
        "left out with policy=auto, which chooses it",
        "Start from another policy, e.g. policy=half-disk.",
    ),
    Rule(
        _latency,
        "left out with a policy that is given: its times are what they are",
        "Take policy=auto, which looks for a policy that keeps to it.",
    ),
    Rule(
        _group_size,
        "given with something that is compressed in groups",
        "Add policy.lossy.weights=4 or policy.lossy.kv_cache=4.",
    ),
    Rule(
        _location,
        "given with weights that are read from somewhere; weights=dummy makes random ones",
        "Add weights=path for a folder or .gguf file, or weights=hub for a hub id.",
    ),
    Rule(
        _shortest,
        "left out where all prompts have prompt_len tokens",
        "Take a workload of text, e.g. workload=mixed-text.",
    ),
    Rule(_tuning, "given with batch sizes to try", "Add measure.batch_sizes=[8,32]."),
    Rule(
        _gpu_memory,
        "left out on a machine without accelerator",
        "Take gpu=emulated, or gpu.cpu_memory for a cap on host memory.",
    ),
    Rule(_tracker, "left out where nothing is sent anywhere", "Add tracker=wandb."),
)
# What is no part of what a cell is: a run with another one would pass for the same.
_OF_A_FILE = "system.environment"

# What says how something is measured, on this machine.
_MEASURING = ("measure", "threads", "rerun", "calibrate", "tracker")


def refuse_ignored(conf: AppConf, given: frozenset[str], named: bool) -> None:
    """Raises UserError for the first option of a cell outside a suite that would change nothing."""
    line = CommandLine(conf, given, named)
    for rule in RULES:
        for key in rule.keys(line):
            value = value_of(conf, key)
            if value is not None:  # null asks for nothing
                raise UserError(key, value, rule.allowed, rule.action)


def refuse_environment(conf: AppConf, given: frozenset[str]) -> None:
    """Raises UserError for variables of a system's process: records of the same cell would not be of the same run."""
    for key in CommandLine(conf, given, False).keys(_OF_A_FILE):
        raise UserError(
            key,
            value_of(conf, key),
            "left as the system's file has it",
            "Write a file of another name in conf/system, whose results are told apart.",
        )


def refuse_unmeasured(conf: AppConf, given: frozenset[str], machine: str) -> None:
    """Raises UserError for an option about measuring, of a machine that is only simulated here."""
    for prefix in _MEASURING:
        for key in CommandLine(conf, given, False).keys(prefix):
            if value_of(conf, key) is None:
                continue
            raise UserError(
                key,
                value_of(conf, key),
                f"left out where nothing is measured: gpu={machine} is simulated here",
                "It is for a machine that is here: gpu=auto.",
            )


def refuse_unthrottled(conf: AppConf, given: frozenset[str]) -> None:
    """Raises UserError for the bandwidth of a link that is as fast as it is: only an emulated accelerator's can be
    set."""
    for key in CommandLine(conf, given, False).keys("gpu.links"):
        raise UserError(
            key,
            value_of(conf, key),
            "left out on a machine that is measured: its links are as fast as they are",
            "Take gpu=emulated, whose links are throttled, or a machine that is simulated.",
        )


def value_of(conf: AppConf, key: str) -> Any:
    """What a configuration has under a dotted key; of a group, its name."""
    value: Any = conf
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return getattr(value, "name", value)
