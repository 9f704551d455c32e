"""Machine code on a CUDA device: loaded into the context that torch uses, and launched on torch's streams."""

from __future__ import annotations

import ctypes
import functools

import torch


class CannotLaunch(Exception):
    """The driver refuses to load or to launch; the text is its own."""


class Kernel:
    """A function of one structure, on one device. May be launched by several threads, and while a graph is recorded."""

    def __init__(self, code: bytes, name: str, device: int) -> None:
        """Raises CannotLaunch."""
        self._context = _context(device)
        _check(_driver().cuCtxSetCurrent(self._context))
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(module), code))  # stays loaded as long as the process lives
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        self._function = function

    def launch(self, blocks: int, threads: int, argument: ctypes.Structure, stream: int) -> None:
        """On a stream (``torch.cuda.Stream.cuda_stream``) of the device, which becomes the thread's present one. The
        argument is copied, but not what it points to."""
        driver = _driver()
        # A thread's first call may come before any of torch's that would do this; again it costs next to nothing.
        _check(driver.cuCtxSetCurrent(self._context))
        given = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        on = ctypes.c_void_p(stream)
        _check(driver.cuLaunchKernel(self._function, blocks, 1, 1, threads, 1, 1, 0, on, given, None))


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CannotLaunch(str(error)) from error


@functools.cache
def _context(device: int) -> ctypes.c_void_p:
    """The device's primary context, which torch uses as well. It is kept as long as the process lives."""
    torch.cuda.init()
    number, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuDeviceGet(ctypes.byref(number), device))
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), number))
    return context


def _check(status: int) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise CannotLaunch(f"CUDA driver: {text.value.decode() if text.value else status}")
