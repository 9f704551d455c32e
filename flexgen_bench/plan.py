"""``python -m flexgen_bench.plan ARGS``: what ``python -m flexgen_bench ARGS`` would do, without doing it (``dry_run=true``)."""

from __future__ import annotations

import sys

from flexgen_bench.__main__ import main

if __name__ == "__main__":
    sys.argv.append("dry_run=true")
    sys.exit(main())
