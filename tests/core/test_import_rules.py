"""Who may import whom: rooms have ranks (docs/architecture.md), nothing imports upward, no file is part of a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "flexgen_bench"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up. A file imports from its own room and from those before it.
RANKS = (
    "core",
    "schedule",
    "store",
    "models",
    "planner",
    "machine",
    "kernels",
    "checkpoints",
    "memory",
    "config",
    "published",
    "engine",
    "calibrate",
    "requests",
    "ranks",
    "llm",
    "batch",
    "chat",
    "serve",
    "systems",
    "runner",
    "accuracy",
    "report",
    "compare",
    "paper",
    "trace",
    "pictures",
    "page",
    "trackers",
    "cells",
    "cli",
)
# What works on a machine without torch, wherever an import stands.
TORCH_FREE = (
    "core",
    "schedule",
    "store",
    "models",
    "planner",
    "published",
    "report",
    "compare",
    "paper",
    "trackers",
    "trace",
    "pictures",
    "page",
    "machine",
)
HEAVY = {"torch", "transformers", "accelerate", "deepspeed", "safetensors", "tokenizers"}
# Rooms of tensors. Everywhere else these are imported where they are used, so that starting stays quick.
MAY_IMPORT_HEAVY = ("kernels", "checkpoints", "memory", "engine", "ranks")
# Figures come from records alone, whatever has been run to get them.
OF_RECORDS = ("store", "report", "paper", "trace", "pictures", "page")
LONGEST = 350
BASELINES = sorted(p.name for p in (ROOT / "baselines").iterdir() if (p / "__init__.py").is_file())


def room_of(path: Path) -> str:
    """``flexgen_bench/store/reader.py`` -> ``store``. What starts a process by ``python -m`` belongs to the command
    line."""
    parts = path.relative_to(PACKAGE).parts
    return "cli" if parts[-1] == "__main__.py" else parts[0] if len(parts) > 1 else ""


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@cache
def imports(path: Path, at_import_time: bool = False, typing_too: bool = False) -> frozenset[str]:
    """Dotted names of imported modules.

    at_import_time: only what is executed when the module is imported, so nothing inside functions. typing_too: also
    what is under TYPE_CHECKING.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing_too:
            for child in node.orelse:
                visit(child)
            return
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return frozenset(found)


def tops(names: frozenset[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def own(path: Path) -> set[str]:
    """The files of this package that a file imports, types included, as modules."""
    return {name for name in imports(path, typing_too=True) if name in MODULES and MODULES[name] != path}


def circles(graph: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Modules that import each other, in whatever number of steps (Tarjan's components of more than one)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> Iterator[list[str]]:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in number:
                yield from visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            found = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(found) > 1:
                yield found

    for name in sorted(graph):
        if name not in number:
            yield from visit(name)


def test_there_are_files() -> None:
    assert len(FILES) > 20
    assert {"accelerate", "deepspeed", "transformers"} <= set(BASELINES)
    assert {room_of(path) for path in FILES} - {""} == set(RANKS), "every room has a rank"


def test_no_file_is_in_a_circle() -> None:
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert list(circles({name: own(path) - packages for name, path in MODULES.items()})) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file(path: Path) -> None:
    room, everywhere = room_of(path), tops(imports(path))
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST, "one idea a file"
    if room:
        allowed = RANKS[: RANKS.index(room) + 1]
        upward = {name for name in own(path) if room_of(MODULES[name]) not in ("", *allowed)}
        assert not upward, f"{room} lies below these"
    if room not in MAY_IMPORT_HEAVY:
        assert not tops(imports(path, at_import_time=True)) & HEAVY, (
            "starting must stay quick: import these where they are used"
        )
    if room in TORCH_FREE:
        assert not everywhere & HEAVY, f"{room} works without torch"
    if room in OF_RECORDS:
        runs = {name for name in own(path) if room_of(MODULES[name]) in ("engine", "runner", "systems")}
        assert not runs, "tables come from records alone"
    if room != "config":
        assert "omegaconf" not in everywhere, "config alone knows OmegaConf"
    if room not in ("config", "cells", "cli"):
        assert "hydra" not in everywhere, "what is composed is composed before anything runs"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_baseline_is_named(path: Path) -> None:
    """No import of a baseline, and no comparison or table by its name (``transformers`` is also a library)."""
    names = imports(path)
    assert "baselines" not in tops(names)
    assert not tops(names) & (set(BASELINES) - {"transformers"})
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name | ast.Attribute):
            text = node.id if isinstance(node, ast.Name) else node.attr
            assert text not in set(BASELINES) - {"transformers"}
        if isinstance(node, ast.Constant):
            assert node.value not in BASELINES, f"line {node.lineno} names a system"


def test_the_rules_see_violations(tmp_path: Path) -> None:
    """The tests above once passed because nothing was found at all."""
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy\n"
        "try:\n    import torch\nfinally:\n    pass\ndef f():\n    from flexgen_bench.runner import suite\n"
    )
    assert imports(bad, at_import_time=True) == {"typing", "typing.TYPE_CHECKING", "torch"}
    assert {"flexgen_bench.runner", "flexgen_bench.runner.suite"} <= imports(bad)
    assert "numpy" in imports(bad, typing_too=True)
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}})) == [["b", "c"]]
