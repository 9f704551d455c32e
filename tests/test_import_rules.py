"""Who may import whom (docs: README, "Layout"), judged from the source text."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flexgen_bench"
FILES = sorted(PACKAGE.rglob("*.py"))
TORCH_FREE = ("core", "schedule", "planner", "store", "report", "models", "trace")
HEAVY = {"torch", "transformers", "accelerate", "deepspeed", "safetensors", "tokenizers"}
MAY_IMPORT_HEAVY = ("kernels", "memory", "engine")
# Measured rates are read wherever something is predicted, also without torch.
READS_RATES = [
    PACKAGE / "calibrate" / f"{name}.py"
    for name in ("store", "effort", "stable", "profile", "table")
]
BASELINES = sorted(p.name for p in (ROOT / "baselines").iterdir() if (p / "__init__.py").is_file())


def part_of(path: Path) -> str:
    """``flexgen_bench/store/reader.py`` -> ``store``; a module of the package itself -> its own name."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path, *, at_import_time: bool) -> set[str]:
    """Dotted names of imported modules, those under TYPE_CHECKING left out.

    at_import_time: only what is executed when the module is imported, so nothing inside functions.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
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
    return found


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def uses(path: Path, *parts: str) -> set[str]:
    """The imports of ``path``, anywhere in it, that lie in one of the package's ``parts``."""
    prefixes = tuple(f"flexgen_bench.{part}" for part in parts)
    found = imports(path, at_import_time=False)
    return {n for n in found if n in prefixes or n.startswith(tuple(f"{p}." for p in prefixes))}


def test_there_are_files() -> None:
    assert len(FILES) > 20
    assert {"accelerate", "deepspeed", "transformers"} <= set(BASELINES)
    assert set(READS_RATES) <= set(FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module(path: Path) -> None:
    part = part_of(path)
    everywhere = tops(imports(path, at_import_time=False))
    first = tops(imports(path, at_import_time=True))
    if part not in MAY_IMPORT_HEAVY:
        assert not first & HEAVY, "starting must stay quick: import these where they are used"
    if part in TORCH_FREE:
        assert not everywhere & HEAVY, f"{part} works without torch"
    if path in READS_RATES:
        assert not everywhere & HEAVY, "measured rates are read without torch"
        assert not uses(path, *MAY_IMPORT_HEAVY), "these load torch"
    if part in ("report", "store", "trace"):
        assert not uses(path, "engine", "runner", "systems"), "tables come from records alone"
    if part == "models":
        assert not uses(path, "memory", "engine", "runner", "systems")
    if part == "memory":
        assert not uses(path, "models", "engine", "runner", "systems")
    if part == "core":
        others = {p.name for p in PACKAGE.iterdir()} - {"core"}
        assert not uses(path, *(name.removesuffix(".py") for name in others)), (
            "core knows only itself"
        )
    if path.name != "config.py" or path.parent != PACKAGE:
        assert "omegaconf" not in everywhere, "config.py alone knows OmegaConf"
    command_line = ("__main__.py", "compose.py", "compose_errors.py", "overrides.py")
    if path not in [PACKAGE / name for name in command_line]:
        assert "hydra" not in everywhere, "the command line alone knows Hydra"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_baseline_is_named(path: Path) -> None:
    """No import of a baseline, and no comparison or table by its name (``transformers`` is also a library)."""
    names = imports(path, at_import_time=False)
    assert "baselines" not in tops(names)
    assert not tops(names) & (set(BASELINES) - {"transformers"})
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
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
    assert uses(bad, "runner") == {"flexgen_bench.runner", "flexgen_bench.runner.suite"}
