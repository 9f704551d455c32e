"""lm-eval's own command line, with this suite's systems as a model:
``python -m flexgen_bench lm-eval run --model flexgen ...``.

lm-eval 0.4.13 has no way to find models of other packages (its registry takes entry points, but nothing looks for any),
so its ``lm_eval`` command alone cannot know this one. This registers it and hands the command line over unchanged.
"""

from __future__ import annotations

import sys

from flexgen_bench.accuracy.run.needs import check_installed
from flexgen_bench.core.errors import CannotRun

NAME = "flexgen"


def register() -> None:
    """Make ``flexgen`` a name of lm-eval's models, as its own are: the class is loaded when it is asked for."""
    import lm_eval.models  # noqa: F401  (its own models come first: an empty registry is what makes it look for them)
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target="flexgen_bench.accuracy.run.lm:SystemLM")


def main() -> None:
    """``lm_eval`` with our model; exits with status 1 and a line that says what to install where it is missing."""
    try:
        check_installed()
    except CannotRun as error:
        sys.exit(f"error: {error}")
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
