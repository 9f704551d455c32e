"""A rank that rank 0 has started: ``python -m flexgen_bench.ranks RANK RANKS HOST PORT PARENT``, which reads the way to
rank 0's door from its standard input."""

from __future__ import annotations

import os
import sys


def main() -> None:
    from flexgen_bench.ranks.children import end_with

    rank, ranks, port, parent = (int(sys.argv[i]) for i in (1, 2, 4, 5))
    end_with(parent)
    way = sys.stdin.readline().strip()
    if not way:  # rank 0 has ended before it had told
        os._exit(1)
    from flexgen_bench.core.errors import CannotRun
    from flexgen_bench.ranks.member import serve_child
    from flexgen_bench.ranks.rendezvous import find

    try:
        serve_child(find(sys.argv[3], port), rank, ranks, way)
    except (CannotRun, EOFError, OSError) as error:  # rank 0 has ended, and has told why if it could
        print(f"rank {rank}: {error or 'rank 0 has ended'}", file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    main()
    # What was told is done: threads that a library left running must not hold the process up.
    sys.stderr.flush()
    os._exit(0)
