"""Measures what this machine sustains (core/rates.py) with the engine's own code, and keeps it:
``python -m flexgen_bench calibrate``.

``store.py`` is what others read measurements with; it knows no torch.
"""
