"""The original's package, beside this project's: it brings a second top-level package named ``experimental``."""

from __future__ import annotations

from baselines.common.beside import Beside

PACKAGE = Beside("flexgen", "0.1.8", "flexgen/flex_opt.py", {"attr": "attrs", "tqdm": "tqdm"})
