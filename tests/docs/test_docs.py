"""README and docs name files and functions that exist, their generated parts are up to date, and the site builds
without a dead link."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import flexgen_bench

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "flexgen_bench"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
FOLDERS = ("examples", "benchmarks", "baselines", "conf/paper")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / folder / "README.md" for folder in FOLDERS), *DOCS]
_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*\.(?:py|sh|md|cpp|csv)\b")
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
_NAMED = re.compile(r"`([\w/]+\.py): (\w+)`")
# What a path may begin at. A bare name stands in the row or sentence of its folder: it has to be somewhere.
PLACES = (ROOT, PACKAGE, PACKAGE / "kernels")
SOURCES = ("flexgen_bench", "baselines", "benchmarks", "conf", "docs", "examples", "reports", "scripts", "tests")
NAMES = {path.name for folder in SOURCES for path in (ROOT / folder).rglob("*.*")}


def code_in(page: Path) -> list[str]:
    return _CODE.findall(_FENCED.sub("", page.read_text(encoding="utf-8")))


def exists(name: str) -> bool:
    if "/" not in name:
        return name in NAMES or (ROOT / name).is_file()
    return any((place / name).exists() or any(place.glob(name)) for place in PLACES)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    """After files had moved, pages went on naming the old ones."""
    found = [name for code in code_in(page) for name in _FILE.findall(code)]
    gone = {name for name in found if not exists(name)}
    assert not gone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_functions_that_are_named_exist(page: Path) -> None:
    for file, name in _NAMED.findall(page.read_text(encoding="utf-8")):
        path = PACKAGE / file
        assert path.is_file(), file
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        assert name in {node.name for node in tree if isinstance(node, kinds)}, f"{file}: {name}"


@pytest.mark.parametrize("page", [p for p in PAGES if p not in DOCS], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_outside_of_the_site(page: Path) -> None:
    """Those of docs/ are checked when the site is built."""
    links = _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8")))
    gone = [x for x in links if not x.startswith("http") and not (page.parent / x).exists()]
    assert not gone


def test_the_architecture_names_every_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert packages
    assert not {name for name in packages if f"`{name}/`" not in page}


def test_the_readme_is_short() -> None:
    """Everything else has a page of its own. It had grown to 301 lines."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 140


def test_the_configuration_page_is_that_of_the_schemas() -> None:
    module = script("docs_configuration")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: make docs"


def test_the_pictures_are_those_of_the_records() -> None:
    module = script("docs_pictures")
    for name in module.PICTURES:
        stored = (module.IMAGES / f"{name}.svg").read_text(encoding="utf-8")
        assert stored == module.draw(name), "run: make docs"
        assert ": MEASURED</title>" in stored


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_the_site_builds_and_a_dead_link_does_not(tmp_path: Path) -> None:
    """``mkdocs --quiet`` counts no warnings, so a strict build with it let dead links through."""
    pytest.importorskip("material", reason="the extra docs is not installed")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    answer = build(tmp_path, tmp_path / "site")
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "site" / "guides" / "measure" / "index.html").is_file()
    page = tmp_path / "docs" / "quickstart.md"
    page.write_text(page.read_text() + "\n[x](guides/plan.md#nowhere) [y](gone.md)\n")
    answer = build(tmp_path, tmp_path / "site")
    assert answer.returncode != 0
    assert "nowhere" in answer.stderr
    assert "gone.md" in answer.stderr


def test_one_version() -> None:
    """pyproject.toml states it; the installed package and the command line tell it."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert flexgen_bench.__version__ == version("flexgen-bench") == stated
    told = subprocess.run(
        [sys.executable, "-m", "flexgen_bench", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (told.returncode, told.stdout) == (0, f"flexgen-bench {stated}\n"), told.stderr


def test_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= set(citation)
    assert "FlexGen" in citation["references"][0]["title"]


def test_hooks_are_the_linters_of_ci() -> None:
    """A hook that is missing lets pass what CI refuses."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    for command in re.findall(r"-m (\w+(?: \w+)?(?: --check)?)", lint):
        assert any(f"-m {command}" in hook["entry"] for hook in hooks), command
