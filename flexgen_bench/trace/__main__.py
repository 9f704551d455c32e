"""``python -m flexgen_bench trace ...``: the command ``flexgen-bench trace ...``."""

import sys

from flexgen_bench.cli.trace import main

if __name__ == "__main__":
    sys.exit(main())
