"""``python -m flexgen_bench accuracy ...``: the command ``flexgen-bench accuracy ...``."""

import sys

from flexgen_bench.cli.accuracy import main

if __name__ == "__main__":
    sys.exit(main())
