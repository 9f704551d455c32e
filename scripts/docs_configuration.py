"""Write docs/reference/configuration.md from the schemas of the configuration:
``python scripts/docs_configuration.py``.

Keys, types and defaults come from the schemas, choices from conf/. What a key means stands here, and a key without a
meaning, or a meaning without a key, is an error: so the page cannot fall behind.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from flexgen_bench.config.schema import MISSING, AppConf, TableConf

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "configuration.md"
INTRO = """\
# Configuration

Written by `python scripts/docs_configuration.py` from the schemas; edit nothing here.

A group is a folder of YAML files in `conf/`: `model=opt-1.3b` takes `conf/model/opt-1.3b.yaml`, and `model.seed=1`
changes one key of it. Keys that are in no group are at the top. A required key has no default: every file of the group
states it. `--cfg job` shows what a command line comes to. The keys of `python -m flexgen_bench accuracy` are in its
`--help`.
"""
GROUPS = {
    "model": "A shape, and where its weights can come from.",
    "gpu": "A machine. `auto` is the one in front of you.",
    "workload": "What a system is asked for. All systems are given the same token ids.",
    "policy": (
        "Everything the engine may choose. With `auto: true` it chooses, and only `lossy` and "
        "`max_latency_s` are looked at."
    ),
    "system": "What is under test. None named: all of them.",
    "tracker": "Where runs are sent besides the disk ([Dashboards](../guides/dashboards.md)).",
    "suite": "A list of groups of cells; the cells of a group differ in the system alone.",
    "measure": "How each cell is measured. No files: keys of the command line and of suites.",
    "table": "A table of the paper ([how to add one](../guides/paper_tables.md#a-new-table)). Not part of a "
    "command line; fields are columns of "
    "`conf/paper/*.csv`.",
}
TOP = {
    "cell": "with a suite: only its cells of this name",
    "shard": "with a suite: `i/n`, the i-th of n parts of its cells, for n machines",
    "weights": "where weights come from: `dummy`, `package`, `hub` or `path`; null: the model's own default",
    "location": (
        "with `weights=path` the checkpoint folder or `.gguf` file; otherwise in place of the hub id or package name"
    ),
    "dtype": (
        "`float32`, `bfloat16`, `float16`, or `fastest`: what this machine computes fastest, the same for every system"
    ),
    "threads": "processor threads of every system; null: one for each physical core",
    "rerun": "measure finished cells again",
    "dry_run": "show what each cell would do; run nothing",
    "calibrate": "measure once what this machine sustains, so that predictions stand beside measurements",
    "json": "end with a line of JSON; null: where standard output is no terminal",
    "results_dir": "where records go",
    "cache_dir": "checkpoints, packed weights and downloads; null: `$FLEXGEN_BENCH_CACHE`, or `~/.cache/flexgen-bench`",
}
PLACEMENT = {"gpu": "share on the accelerator", "cpu": "share in host memory", "disk": "share on disk"}
LOSSY = {
    "weights": (
        "bits (8, 4, 3), null, a name such as `4-bit/outputs/mse`, or `{bits: 4, group_size: 64, along: "
        "outputs, scales: mse}`"
    ),
    "kv_cache": "bits of keys and values, or null",
    "group_size": "values that share a scale, where none is named",
    "value_share": "share of the value rows that attention reads",
    "activations": "8: bits of what 4-bit weights are multiplied with, in whole numbers; null: as it is",
}
MEANS: dict[str, dict[str, str]] = {
    "model": {
        "name": "names the shape in records and tables",
        "family": "a file of `flexgen_bench/models`",
        "num_layers": "decoder layers",
        "hidden_size": "width of hidden states",
        "num_heads": "query heads",
        "num_kv_heads": "heads of keys and values",
        "head_dim": "width of a head",
        "ffn_size": "inner width of the MLP",
        "vocab_size": "rows of the token table",
        "max_positions": "longest sequence",
        "tied_embeddings": "whether the head reads the token table",
        "options": "what else the family knows, such as its norms or rotary scaling",
        "weights": "where weights come from if the command line says nothing",
        "locations": "source of weights to hub id, package or path",
        "seed": "of dummy weights",
    },
    "gpu": {
        "name": "names the machine in records and tables",
        "accelerator": "`none`, `cuda`, `emulated`, or `auto`",
        "gpu_memory": (
            "bytes, text such as `16GB`, or a share such as `50% of weights` (of the model's, uncompressed, in the "
            "cell's dtype); null: what is there. On a CUDA device it is a cap for every system"
        ),
        "cpu_memory": (
            "host memory, page cache included, written likewise; null: what is there. On this machine it is a cap for "
            "every system"
        ),
        "disk": "room for offloaded files; null: what is free",
        "gpu_memory_is_cap": "the card is larger and held to `gpu_memory`: what its driver and a process' context take "
        "is outside of it",
        "device_match": "part of the device's name, for a profile that is one card's",
        "count": "devices that compute a model together, each a rank with layers of its own "
        "([guide](../guides/ranks.md)); `gpu_memory` is one device's",
        "layers_per_rank": "how many layers each of them has; null divides them",
        "tensor_parallel": "devices that share every layer, each with a slice of it "
        "([guide](../guides/ranks.md#sharing-every-layer)); `count` is 1 then",
        "links": "bytes per second of `disk_read`, `disk_write`, `h2d`, `d2h`; between ranks `net_out`, `net_in`",
        "rates": "what the machine sustains (`core/rates.py` has the units); without, it cannot be simulated",
        "sources": "where each constant comes from",
        "workload": "what is asked of it where the command line names none",
        "dtype": "the same of the dtype",
    },
    "workload": {
        "name": "names it in records and tables",
        "kind": "`synthetic` (random token ids) or `text` (passages of real text)",
        "num_prompts": "prompts in all",
        "prompt_len": "tokens of a prompt, or of the longest",
        "gen_len": "new tokens of each prompt",
        "min_prompt_len": "of the shortest prompt, for text",
        "seed": "of the prompts",
    },
    "policy": {
        "name": "names it on the command line",
        "auto": "whether the system chooses",
        "gpu_batch_size": "sequences computed together (a micro-batch)",
        "num_gpu_batches": "micro-batches that share a load of the weights",
        **{f"weights.{k}": f"weights: {v}" for k, v in PLACEMENT.items()},
        **{f"kv_cache.{k}": f"KV cache: {v}" for k, v in PLACEMENT.items()},
        **{f"activations.{k}": f"hidden states: {v}" for k, v in PLACEMENT.items()},
        "prefetch": "staging slots of streamed layers: layers on their way or in use at once",
        "overlap": "false: strictly one step after the other",
        "attention": (
            "of a KV cache that is not on the accelerator: it is moved there (`compute`), or the cpu attends (`cpu`)"
        ),
        "kv_moved": "where the cpu attends, the share of the cache in host memory that is moved to the accelerator",
        "schedule": "`block` by block, or `continuous`: new sequences start as soon as there is room",
        "prefill_chunk": "prompt tokens of a micro-batch computed at once; null: all",
        "offloaded": (
            "layers that are not on the accelerator are moved there (`move`), or computed where they lie (`in_place`)"
        ),
        **{
            f"experts.{k}": f"a mixture's experts: {v}; `policy.experts` null: with their layers, `{{cpu: 1}}`: apart"
            for k, v in PLACEMENT.items()
        },
        "expert_loads": "of experts placed apart `all` are loaded, or those that are `touched` (few sequences)",
        **{f"lossy.{k}": v for k, v in LOSSY.items()},
        "max_latency_s": "with `auto`: the longest that a block may take from its start to its last token; null: any",
    },
    "system": {
        "name": "names it on the command line and in records",
        "target": "`module:Class` behind the contract of a system; null: it can be predicted only",
        "follows_policy": "whether `policy=` is meant for it",
        "subject": "whether a command's exit status tells how it did, and only warns of the others",
        "predictor": "`module:Class` that says how fast it would be on a machine",
        "constants": "what the predictor is told, each explained in its file",
        "printed_as": "its name in the FlexGen paper, for quoted values",
        "options": "its own settings, `system.options.<key>=`",
        "choices": "what each option may be",
    },
    "tracker": {
        "name": "an entry of `flexgen_bench/trackers/registry.py`",
        "mode": "of Weights & Biases: `offline` (files for `wandb sync`), `online`; `WANDB_MODE=offline` overrules it",
        "project": "of Weights & Biases",
        "entity": "of Weights & Biases",
        "timeout_s": "how long beginning or ending a run may take; nothing is waited for in between",
    },
    "suite": {
        "cells[].name": "of the group of cells, for `cell=`",
        "cells[].overrides": "what all of its cells are: words of a command line",
        "cells[].systems": "its systems",
        "cells[].system_overrides": "system to words for that one alone",
        "cells[].matrix": (
            "names with values: the group is made once for each combination, `{name}` in its name and words the value"
        ),
    },
    "measure": {
        "repetitions": "measured repetitions",
        "warmup": "repetitions before those, kept apart",
        "time_limit_s": "a cell that takes longer is ended",
        "batch_sizes": (
            "batch sizes each system is tried with before it is measured with its best; `[]`: its own default"
        ),
        "tuning_gen_len": "tokens generated in such a try",
        "budget_s": (
            "seconds that a system may take for a cell, as predicted: above it, all systems get fewer "
            "tokens and prompts"
        ),
    },
    "table": {
        "title": "of the table",
        "printed": "ids in `conf/paper/*.csv` (column `table`)",
        "rows": "fields that make the rows",
        "columns": "fields that make the columns",
        "grids": "the field that cuts it in several",
        "select": "rows that are taken, by field, and their order",
        "extra": "cells of which nothing is printed",
        "labels": "shorter words for values",
        "machine": "a file of `conf/gpu`",
        "models": "printed name to the file of `conf/model`, where they differ",
        "systems{}.simulated_as": "the `printed_as` of the system that is simulated; null: its own name",
        **{f"systems{{}}.ours.{k}": f"what this engine may change beside it: {v}" for k, v in LOSSY.items()},
        "systems{}.mode": "the mode whose accuracy is looked up; null: none",
        "engine": "the file of `conf/system` that is this project's engine",
        "ours_missing": "what stands where this engine has no value",
        "predict": "printed quantity to what of a prediction it is",
        "accuracy{}.task": "the accuracy task looked up for a printed metric",
        "accuracy{}.metric": "its metric",
        "assumed[].where": "cells whose printed text is not enough, by field",
        "assumed[].policy": "the policy taken for them",
        "assumed[].num_prompts": "the number of prompts taken for them",
        "assumed[].unrounded": "the value before it was rounded",
        "assumed[].source": "where that is from",
        "no_ratio": "quantities that are not better by being more",
        "lines": "what is shown of each row",
        "decimals": "the paper's own; null: as they are",
        "notes[].text": "a footnote",
        "notes[].key": "or the key of one in `conf/paper/footnotes.yaml`",
        "notes[].where": "cells it is put at, by field; none: the whole table",
        "figures[].name": "a plot of the table's cells: its file",
        "figures[].title": "its title",
        "figures[].x": "a field or a quantity",
        "figures[].y": "a quantity",
        "figures[].series": "fields that make a line each",
        "figures[].where": "cells that are plotted, by field",
        "figures[].log": "logarithmic axes",
    },
}


@dataclass(frozen=True)
class Key:
    """A key of a group, as it is written after the group's name."""

    path: str
    kind: str
    default: str


def page() -> str:
    """The whole page."""
    hints = get_type_hints(AppConf)
    groups = {name: group_schema for name, hint in hints.items() if (group_schema := _schema(hint)) is not None}
    groups["table"] = TableConf
    single = [_key(f, hints[f.name], "") for f in fields(AppConf) if f.name not in groups]
    parts = [INTRO, "## Keys in no group\n", _table(single, TOP, "the top")]
    usual = _usual_choices()
    for name, schema in groups.items():
        choices = sorted(path.stem for path in (ROOT / "conf" / name).glob("*.yaml"))
        parts += [f"## {name}\n", GROUPS[name] + "\n"]
        if choices:
            chosen = f" Default: `{usual[name]}`." if usual.get(name) else ""
            parts.append(f"Choices: {', '.join(f'`{choice}`' for choice in choices)}.{chosen}\n")
        parts.append(_table(list(_keys(schema, "")), MEANS[name], name))
    return "\n".join(parts)


def _usual_choices() -> dict[str, str | None]:
    """Group -> the file that conf/config.yaml takes."""
    defaults = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    return {k: v for entry in defaults if isinstance(entry, dict) for k, v in entry.items()}


def _keys(schema: Any, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(schema)
    for field in fields(schema):
        hint = hints[field.name]
        inner, mark = _schema(hint), ""
        if inner is None and get_origin(hint) in (list, dict):
            inner, mark = _schema(get_args(hint)[-1]), "[]" if get_origin(hint) is list else "{}"
        if inner is None:
            yield _key(field, hint, prefix)
        else:
            yield from _keys(inner, f"{prefix}{field.name}{mark}.")


def _schema(hint: Any) -> Any:
    """The dataclass that a type is, or may be; None if it is something else."""
    kinds = get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    return next((k for k in kinds if isinstance(k, type) and is_dataclass(k)), None)


def _key(field: Field[Any], hint: Any, prefix: str) -> Key:
    default = field.default
    if default is NO_DEFAULT and field.default_factory is not NO_DEFAULT:
        default = field.default_factory()
    is_required = default is NO_DEFAULT or (isinstance(default, str) and default == MISSING)
    return Key(f"{prefix}{field.name}", _kind(hint), "required" if is_required else _value(default))


def _kind(hint: Any) -> str:
    words = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "any", type(None): "null"}
    if hint in words:
        return words[hint]
    inner = [_kind(kind) for kind in get_args(hint)]
    if get_origin(hint) is list:
        return f"list of {inner[0]}"
    if get_origin(hint) is dict:
        return f"mapping to {inner[1]}"
    return " or ".join(inner) if inner else str(getattr(hint, "__name__", hint))


def _value(default: Any) -> str:
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, dict | list) and not default:
        return "`{}`" if isinstance(default, dict) else "`[]`"
    if isinstance(default, dict):
        return ", ".join(f"`{key}: {value}`" for key, value in default.items())
    if isinstance(default, list):
        return ", ".join(f"`{value}`" for value in default)
    return f"`{default}`" if default != "" else "empty"


def _table(keys: list[Key], means: dict[str, str], owner: str) -> str:
    paths = [key.path for key in keys]
    unexplained, gone = set(paths) - set(means), set(means) - set(paths)
    if unexplained or gone:
        raise SystemExit(
            f"{owner}: keys without a meaning {sorted(unexplained)}; meanings without a key {sorted(gone)}"
        )
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{key.path}` | {key.kind} | {key.default} | {means[key.path]} |" for key in keys]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
