"""Run as a program: start the same ``flexgen-bench batch`` again and again, each time killed at a random moment, until
its file is whole; the number of kills, as JSON. Children are forked, so that only the first start is slow."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path


def check(path: Path, lines: int) -> int:
    """Of every whole line of the file: it is JSON, and the only one for its position. How many there are."""
    if not path.exists():
        return 0
    raw = path.read_bytes().split(b"\n")[:-1]
    ids = [json.loads(line)["id"] for line in raw]
    assert len(set(ids)) == len(ids) <= lines, "an answer twice"
    return len(ids)


def main() -> None:
    arguments, lines, kills = sys.argv[3:], int(sys.argv[1]), int(sys.argv[2])
    # What a run imports, so that a child starts at once; no thread is started here.
    import torch
    import transformers  # noqa: F401

    from flexgen_bench.batch import plan, progress, run, scan  # noqa: F401
    from flexgen_bench.cli import batch

    torch.set_num_threads(1)
    out = Path(arguments[arguments.index("-o") + 1])
    draw, killed, jobs, moments = random.Random(5), 0, 0, []
    while killed < kills or check(out, lines) < lines:
        if check(out, lines) == lines:  # whole before enough kills: once more from the start
            jobs += 1
            for old in (out, out.with_name(f"{out.name}.state.json")):
                old.rename(old.with_name(f"{jobs}.{old.name}"))
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os._exit(batch.main(arguments))
        # Some are killed while the model opens, most a moment after so many more answers.
        begin, size, more = time.monotonic(), check(out, lines), draw.choice([0, 1, 1, 3, 9, 20])
        wait = draw.random() * (0.5 if more == 0 else 0.02)
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if more and (not out.exists() or check(out, lines) < min(size + more, lines)):
                begin = time.monotonic()
            elif time.monotonic() - begin > wait:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                killed += 1
                moments.append(check(out, lines))
                break
            time.sleep(0.001)
    assert batch.main(arguments) == 0  # also puts the answers in order
    print(json.dumps({"kills": killed, "moments": moments, "jobs": jobs}))


if __name__ == "__main__":
    main()
