"""CUDA C++ compiled at run time, by the NVRTC library that CUDA builds of torch bring along.

Called with ctypes: torch's own way (``torch.cuda._compile_kernel``) is private and young, and cuda-python comes with
recent torch only. A text that includes nothing needs neither headers nor a compiler on the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from flexgen_bench.kernels.native.build import builds_folder

OPTIONS = ("--std=c++17",)


class CannotCompile(Exception):
    """There is no NVRTC, or it refuses a text; the first line says which."""


def compiled(text: str, arch: str) -> bytes:
    """Machine code for one architecture (``sm_75``), from the folder of builds if text, architecture and compiler are
    those of an earlier call. Raises CannotCompile."""
    library = _library()
    key = hashlib.sha256("\0".join([text, arch, *OPTIONS, *map(str, _version(library))]).encode()).hexdigest()
    target = builds_folder() / f"cuda-{key[:16]}.cubin"
    if target.exists():
        return target.read_bytes()
    code = _compile(library, text, (f"--gpu-architecture={arch}", *OPTIONS))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when it is whole: two processes may write the same, and one may be killed.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        made.write_bytes(code)
        made.replace(target)
    return code


@functools.cache
def _library() -> ctypes.CDLL:
    library = _first(_names())
    if library is None:
        raise CannotCompile("libnvrtc is not on this machine: it comes with CUDA builds of torch, or with CUDA")
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    # It opens a second file by name alone, which from 13.0 on is not found beside it; one that is loaded is.
    builtins = f"libnvrtc-builtins.so.{'.'.join(map(str, _version(library)))}"
    _first([builtins, *_packaged(builtins)])
    return library


def _first(names: Iterable[str]) -> ctypes.CDLL | None:
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _names() -> Iterator[str]:
    """The library of torch's own CUDA first: what it makes is made for the driver that torch needs anyway."""
    import torch

    if torch.version.cuda:
        own = f"libnvrtc.so.{torch.version.cuda.partition('.')[0]}"
        yield own
        yield from _packaged(own)
    yield from _packaged("libnvrtc.so.*")
    yield "libnvrtc.so"


def _packaged(pattern: str) -> list[str]:
    """Files of NVIDIA's Python packages."""
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return sorted(str(path) for folder in folders for path in Path(folder).glob(f"*/lib/{pattern}"))


def _version(library: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _compile(library: ctypes.CDLL, text: str, options: tuple[str, ...]) -> bytes:
    program = ctypes.c_void_p()
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None))
    try:
        if library.nvrtcCompileProgram(program, len(options), given) != 0:
            said = _taken(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            errors = [line for line in said.splitlines() if "error" in line]
            raise CannotCompile("\n".join([*errors[:1], said]))
        return _taken(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _taken(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    room = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, room))
    return room.raw


def _check(library: ctypes.CDLL, status: int) -> None:
    if status != 0:
        raise CannotCompile(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")
