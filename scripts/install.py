"""Create the virtual environment and install into it, step by step: ``python scripts/install.py bench|test``.

Standard library only. On a machine without an NVIDIA GPU torch's processor-only build is installed, never the
much larger CUDA one; FLEXGEN_BENCH_TORCH (a pip requirement) overrides the choice.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = {"bench": "baselines,tracking", "test": "accuracy,baselines,tracking,dev,docs"}
MINIMUM = (3, 11)


class StepFailed(Exception):
    """A step that did not work: the command, and what the person at the keyboard can do."""

    def __init__(self, command: list[str], advice: str) -> None:
        super().__init__(f"command: {shlex.join(command)}\nwhat to do: {advice}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=sorted(EXTRAS))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    options = parser.parse_args()
    venv = options.venv.absolute()
    python = venv / "bin" / "python"
    steps = [
        ("check the Python version", check_python),
        (f"create the virtual environment {options.venv}", lambda: create_venv(venv, python)),
        ("install torch", lambda: install_torch(python)),
        (f"install flexgen-bench [{EXTRAS[options.what]}]", lambda: install_project(python, options.what)),
    ]
    for number, (name, step) in enumerate(steps, 1):
        print(f"==> step {number} of {len(steps)}: {name}", flush=True)
        try:
            step()
        except StepFailed as failure:
            print(f"\ninstallation failed at step {number} of {len(steps)}: {name}\n{failure}", file=sys.stderr)
            return 1
    (venv / f".installed-{options.what}").touch()
    if options.what == "test":  # holds all that the benchmark needs
        (venv / ".installed-bench").touch()
    return 0


def check_python() -> None:
    if sys.version_info < MINIMUM:
        minimum = ".".join(map(str, MINIMUM))
        raise StepFailed(
            [sys.executable, "--version"],
            f"this is Python {platform.python_version()}; install {minimum} or newer and run "
            f"make PYTHON=python{minimum}",
        )


def create_venv(venv: Path, python: Path) -> None:
    if python.exists() and run([str(python), "-m", "pip", "--version"], quiet=True):
        return
    command = [sys.executable, "-m", "venv", "--clear", str(venv)]
    if not run(command):
        raise StepFailed(
            command,
            "check that the folder can be written and that Python has its venv module "
            "(on Debian and Ubuntu: apt install python3-venv)",
        )


def install_torch(python: Path) -> None:
    installed = installed_version(python, "torch")
    choice = os.environ.get("FLEXGEN_BENCH_TORCH")
    if choice is None and installed is not None and (is_cpu_build(installed) or not wants_cpu_build()):
        print(f"torch {installed} is installed")
        return
    # Without torch's own line: beside a "+cpu" requirement pip would call it a conflict when it finds no such wheel.
    others = python.parent.parent / "constraints-without-torch.txt"
    lines = CONSTRAINTS.read_text().splitlines(keepends=True)
    others.write_text("".join(line for line in lines if not line.startswith("torch==")))
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-c", str(others)]
    pinned = pinned_torch()
    if choice is not None or not wants_cpu_build():
        command = [*pip, choice or pinned]
        if not run(command):
            raise StepFailed(command, "check the connection to the package index and the free disk space")
        return
    # The build for processors alone is not on the main index. Where the user's own pip settings already lead to it,
    # the first command finds it at once; the other index may be out of reach, so few retries.
    first = [*pip, f"{pinned}+cpu"]
    second = [*pip, "--retries", "1", "--timeout", "20", "--extra-index-url", CPU_INDEX, f"{pinned}+cpu"]
    if not run(first, quiet=True) and not run(second):
        raise StepFailed(
            second,
            f"no NVIDIA GPU was found, so the processor-only build of torch is wanted; it comes from {CPU_INDEX}. "
            "Connect to it, or download that wheel and set PIP_FIND_LINKS to its folder, or accept another "
            f"build with FLEXGEN_BENCH_TORCH='{pinned}' (several GB with CUDA)",
        )


def install_project(python: Path, what: str) -> None:
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-c",
        str(CONSTRAINTS),
        "-e",
        f"{ROOT}[{EXTRAS[what]}]",
    ]
    if not run(command):
        raise StepFailed(
            command,
            "read pip's message above: a package index that cannot be reached, a full disk, or a package that needs "
            "a compiler (on Debian and Ubuntu: apt install build-essential python3-dev). Then run make again; what is "
            "installed already is kept",
        )


def wants_cpu_build() -> bool:
    """Linux without a visible NVIDIA GPU. Elsewhere the default build holds no CUDA."""
    if platform.system() != "Linux":
        return False
    return shutil.which("nvidia-smi") is None and not Path("/dev/nvidia0").exists()


def is_cpu_build(version: str) -> bool:
    return version.endswith("+cpu")


def pinned_torch() -> str:
    return next(line for line in CONSTRAINTS.read_text().split() if line.startswith("torch=="))


def installed_version(python: Path, name: str) -> str | None:
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def run(command: list[str], quiet: bool = False) -> bool:
    output = subprocess.DEVNULL if quiet else None
    print(f"    {shlex.join(command)}", flush=True)
    try:
        return subprocess.run(command, check=False, stdout=output, stderr=output).returncode == 0
    except OSError as error:
        print(f"    {error}", file=sys.stderr)
        return False


if __name__ == "__main__":
    sys.exit(main())
