"""``flexgen-bench lm-eval ARGS``: lm-eval's own command line, with the systems of this project as models."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flexgen_bench.accuracy.run import lm_eval


def main(arguments: Sequence[str]) -> int:
    """Returns when lm-eval has; exits with its status where it ends the process itself."""
    sys.argv = ["lm-eval", *arguments]
    lm_eval.main()
    return 0
