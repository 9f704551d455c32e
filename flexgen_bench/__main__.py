"""``python -m flexgen_bench [COMMAND] ...``."""

import sys

from flexgen_bench.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
