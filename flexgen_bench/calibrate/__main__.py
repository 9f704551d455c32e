"""``python -m flexgen_bench calibrate ...``: the command ``flexgen-bench calibrate ...``."""

import sys

from flexgen_bench.cli.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
