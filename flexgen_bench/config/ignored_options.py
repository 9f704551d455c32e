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
class Asked:
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

    keys: Callable[[Asked], list[str]]
    allowed: str
    action: str


def _of_a_policy(asked: Asked) -> list[str]:
    system = asked.conf.system
    if not asked.named or system is None or system.follows_policy:
        return []
    return [k for k in asked.keys("policy") if not k.startswith("policy.lossy")]


def _of_another_policy(asked: Asked) -> list[str]:
    if not asked.conf.policy.auto:
        return []
    return [k for k in asked.keys("policy") if k != "policy" and k.split(".")[1] not in _OF_AUTO]


def _latency(asked: Asked) -> list[str]:
    return [] if asked.conf.policy.auto else asked.keys("policy.max_latency_s")


def _group_size(asked: Asked) -> list[str]:
    lossy = asked.conf.policy.lossy
    used = any(getattr(lossy, name) is not None for name in _COMPRESSED)
    return [] if used else asked.keys("policy.lossy.group_size")


def _location(asked: Asked) -> list[str]:
    conf = asked.conf
    dummy = (conf.weights or conf.model.weights) == "dummy"
    return asked.keys("location") if dummy else []


def _shortest(asked: Asked) -> list[str]:
    return [] if asked.conf.workload.kind == "text" else asked.keys("workload.min_prompt_len")


def _tuning(asked: Asked) -> list[str]:
    return [] if asked.conf.measure.batch_sizes else asked.keys("measure.tuning_gen_len")


def _gpu_memory(asked: Asked) -> list[str]:
    none = asked.conf.gpu.accelerator == Accelerator.NONE.value
    return asked.keys("gpu.gpu_memory") if none else []


def _tracker(asked: Asked) -> list[str]:
    keys = [k for k in asked.keys("tracker") if k not in ("tracker", "tracker.name")]
    return keys if asked.conf.tracker.name == "none" else []


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

# What says how something is measured, on this machine.
_MEASURING = ("measure", "threads", "rerun", "calibrate", "tracker")


def refuse_ignored(conf: AppConf, given: frozenset[str], named: bool) -> None:
    """Raises UserError for the first option of a cell outside a suite that would change nothing."""
    asked = Asked(conf, given, named)
    for rule in RULES:
        for key in rule.keys(asked):
            value = value_of(conf, key)
            if value is not None:  # null asks for nothing
                raise UserError(key, value, rule.allowed, rule.action)


def refuse_unmeasured(conf: AppConf, given: frozenset[str], machine: str) -> None:
    """Raises UserError for an option about measuring, of a machine that is only simulated here."""
    for prefix in _MEASURING:
        for key in Asked(conf, given, False).keys(prefix):
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
    for key in Asked(conf, given, False).keys("gpu.links"):
        raise UserError(
            key,
            value_of(conf, key),
            "left out on a machine that is measured: its links are as fast as they are",
            "Take gpu=emulated, whose links are throttled, or a machine that is simulated.",
        )


def value_of(conf: AppConf, key: str) -> Any:
    """What a configuration has under a dotted key; of a group, its name."""
    found: Any = conf
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else getattr(found, name, None)
    return getattr(found, "name", found)
