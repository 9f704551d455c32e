"""Which optional part of this package brings a module that is missing."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "flexgen-bench"


def how_to_install(*modules: str) -> str:
    """One sentence: what is missing and the command that installs it."""
    names = [module.partition(".")[0] for module in modules]
    wanted = [extra_of(name) for name in names]
    targets = {f"'{DISTRIBUTION}[{extra}]'" if extra else name for name, extra in zip(names, wanted, strict=True)}
    missing = ", ".join(names)
    return f"not installed: {missing}. Install it with: pip install {' '.join(sorted(targets))}"


def extra_of(module: str) -> str | None:
    """The extra of this package that requires the distribution of ``module``; None if none does."""
    return requirements().get(_normal(module))


def requirements() -> dict[str, str | None]:
    """Each distribution this package requires and the (first) extra it belongs to, None for the core."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        lines = _declared()
    extras: dict[str, str | None] = {}
    for line in lines:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", line)
        assert name is not None, line
        extras.setdefault(_normal(name.group()), extra.group(1) if extra else None)
    return extras


def _declared() -> list[str]:
    """The same from the checkout's pyproject.toml; nothing where there is none."""
    path = Path(__file__).resolve().parent.parent.parent / "pyproject.toml"
    if not path.is_file():
        return []
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    if project.get("name") != DISTRIBUTION:
        return []
    extras = project.get("optional-dependencies", {})
    return [
        *project.get("dependencies", []),
        *(f"{line}; extra == '{extra}'" for extra, lines in extras.items() for line in lines),
    ]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
