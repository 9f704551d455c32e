"""``python -m flexgen_bench.report ...``: the command ``flexgen-bench report ...``."""

import sys

from flexgen_bench.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
