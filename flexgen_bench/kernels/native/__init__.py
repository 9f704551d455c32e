"""Kernels in C++ for the processor: compiled where they run, called through ctypes, never required."""
