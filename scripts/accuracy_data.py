"""Write what the readers give into conf/accuracy: the ``data`` block of each task. For those who add or change a task.

python scripts/accuracy_data.py [--packages FOLDER] [TASK ...]: rows go into the cache, their number and hash into
<task>.yaml. Raise the task's version by hand if its rows have changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flexgen_bench.accuracy.data.prepare import Prepared, prepare
from flexgen_bench.accuracy.data.task_conf import accuracy_dir, read_packages, read_tasks
from flexgen_bench.config.paths import default_cache_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, default=None)
    parser.add_argument("tasks", nargs="*")
    options = parser.parse_intermixed_args()
    tasks = [t for t in read_tasks().values() if t.name == t.data_name]
    chosen = [t for t in tasks if not options.tasks or t.name in options.tasks]
    prepare(chosen, read_packages(), default_cache_dir(), given=options.packages, on_prepared=_write, any_hash=True)


def _write(done: Prepared) -> None:
    path = accuracy_dir() / f"{done.task}.yaml"
    head = path.read_text(encoding="utf-8").partition("\ndata:")[0].rstrip("\n")
    block = "".join(
        f"  {name}: {{items: {split.items}, sha256: {split.sha256}}}\n" for name, split in sorted(done.splits.items())
    )
    path.write_text(f"{head}\ndata:\n{block}", encoding="utf-8")
    print(f"{done.task}: " + ", ".join(f"{n} {s.items}" for n, s in sorted(done.splits.items())))


if __name__ == "__main__":
    main()
