"""Draw the pictures of README and docs from stored records: ``python scripts/docs_pictures.py``.

Each is what ``python -m flexgen_bench trace`` draws of that run. Evidence and machine stand in the picture.
"""

from __future__ import annotations

from pathlib import Path

from flexgen_bench.trace.chart import chart
from flexgen_bench.trace.runs import find_run

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
# Picture -> the hash of the run's cell.
PICTURES = {
    "capped-run": "f3869f1cd3c4138b",  # OPT-1.3B from disk under a cap of 2.25 GiB, two cores
    "gpu-run": "96a66efdc3d26055",  # OPT-6.7B on an H100 held to 16 GB
}


def draw(name: str) -> str:
    """The picture of this name, as SVG."""
    return chart(find_run(PICTURES[name], ROOT / "results"))


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name in PICTURES:
        path = IMAGES / f"{name}.svg"
        path.write_text(draw(name), encoding="utf-8", newline="\n")
        print(path.relative_to(ROOT))
