"""What accuracy needs beyond a plain installation: lm-eval and ROUGE, which ``make bench`` does not install."""

from __future__ import annotations

from importlib.util import find_spec

from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.extras import how_to_install

_MODULES = ("lm_eval", "rouge_score")


def check_installed() -> None:
    """Raises CannotRun with the command that installs what is missing."""
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        raise CannotRun(f"accuracy is measured through lm-eval; {how_to_install(*missing)}")
