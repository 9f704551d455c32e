"""``key=value`` words of a command line that opens a model: ``model=smollm2 policy=all-cpu dtype=float32``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flexgen_bench.accuracy.run.arguments import lm_options
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.parsing import parse_bytes

if TYPE_CHECKING:
    from flexgen_bench.core.progress import Progress
    from flexgen_bench.llm.llm import LLM

# Short names of trained models that come from the package index.
SHORT = {"smollm2": "smollm2-135m"}
WORDS = {
    "model": "a name from conf/model, a checkpoint folder, a .gguf file or a hub id; smollm2 is a small one to try",
    "gpu": "a name from conf/gpu (default: auto)",
    "memory": "most host memory of the whole process, e.g. 4GiB; layers that have no room stay on disk",
    "policy": "a name from conf/policy; default: chosen for the work",
    "dtype": "float32, bfloat16 or float16; default: the checkpoint's own",
    "threads": "of computing; default: all cores",
    "ranks": "processes that compute it together, each with a device and a part of the layers (docs/guides/ranks.md)",
    "weights": "bits of compressed weights: 4 or 8 (changes answers a little)",
    "weights_group": "of how many weights a scale is (default: 64)",
    "kv_cache": "bits of a compressed KV cache",
    "kv_cache_group": "as weights_group",
    "value_share": "of sparse attention",
    "cache_dir": "where weights are kept",
}
_WORD = re.compile(r"([a-z_]+)=(.*)", re.DOTALL)


def divided(arguments: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """The other arguments, and the words. UserError for a word that is there twice."""
    others: list[str] = []
    words: dict[str, str] = {}
    for argument in arguments:
        word_match = _WORD.fullmatch(argument)
        if word_match is None:
            others.append(argument)
        elif word_match[1] in words:
            raise UserError(word_match[1], word_match[2], f"given once (it is {words[word_match[1]]!r} already)")
        else:
            words[word_match[1]] = word_match[2]
    return others, words


def check_words(words: Mapping[str, str], further: Sequence[str] = ()) -> None:
    """UserError for a word that nothing heeds, and for a command without a model."""
    for key in words:
        if key not in WORDS and key not in further:
            raise unknown_choice("argument", key, [*WORDS, *further])
    if not words.get("model"):
        raise UserError("model", words.get("model"), "named", "For example: model=smollm2")


def open_llm(words: Mapping[str, str], progress: Progress | None = None) -> LLM:
    """The model that words name; weights are downloaded and converted if need be, and ``progress`` is told."""
    from flexgen_bench.llm.llm import LLM

    given: dict[str, Any] = {key: number(value) for key, value in words.items() if key in WORDS and key != "memory"}
    given["model"] = SHORT.get(words["model"], words["model"])
    if "threads" in given and not isinstance(given["threads"], int):
        raise UserError("threads", words["threads"], "an integer of at least 1")
    ranks = given.pop("ranks", None)
    options = lm_options(given, {})
    return LLM(
        options["model"],
        policy=options["policy"],
        gpu=options["gpu"] if "memory" not in words else _capped(options["gpu"], words["memory"]),
        dtype=options["dtype"],
        threads=options["threads"],
        cache_dir=options["cache_dir"],
        lossy=options["lossy"],
        progress=progress,
        ranks=ranks,
    )


def _capped(hardware: HardwareProfile, memory: str) -> HardwareProfile:
    """A machine of which no more than this is used."""
    most = parse_bytes(memory, "memory")
    stated = hardware.cpu_memory_bytes
    return replace(hardware, cpu_memory_bytes=most if stated is None else min(most, stated))


def number(text: str) -> int | float | str:
    """A number where the text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def words_help() -> str:
    """One line a word."""
    return "\n".join(f"  {key + '=':<17} {what}" for key, what in WORDS.items())
