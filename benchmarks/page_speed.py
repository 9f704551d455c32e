"""How fast the local page is with ten thousand records: the first view, and a filter, in Chromium.

A view counts from the start of loading, a filter from the click on a value, both until what is shown has been painted.
The page is opened from disk. Records are copies of those in results/ (or --results), given other names of models,
systems and machines. Needs chromium, chromedriver and selenium (the extra ``dev``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexgen_bench.page.build import INDEX, PageBuilder
from flexgen_bench.page.gather import Gatherer
from flexgen_bench.store.reader import read_all

FIRST_VIEW_S, FILTER_S = 2.0, 0.1  # what they must stay below
_VIEWS = 5
_PAINTED = "return (window.page && page.painted) || 0"
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)


def write_records(templates: Sequence[Path], folder: Path, count: int) -> None:
    """Copies that differ in what people filter by; each has a name and a hash of its own."""
    (folder / "page").mkdir(parents=True)
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in templates]
    for n in range(count):
        document: dict[str, Any] = json.loads(json.dumps(documents[n % len(documents)]))
        spec = document["spec"]
        spec["model"]["shape"]["name"] += f"-{n % 37}"
        spec["system"] += f"-{n % 11}" if n % 3 else ""
        document["environment"]["cpu"] = {"model": f"CPU {n % 7}", "usable_cores": 2 << n % 4}
        name = f"{n:016x}"
        document |= {"run_id": name, "spec_hash": name, "suite": "page", "trace": ""}
        (folder / "page" / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")


def figures(address: str) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of each first view, and of each filter by what was clicked."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}", "--window-size=1400,900"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            views = [_first_view(driver, address) for _ in range(_VIEWS)]
            clicked: dict[str, list[float]] = {}
            for facet in ("System", "Model", "Machine", "Evidence"):
                for place in (0, 1, 0, 1):
                    clicked.setdefault(facet, []).append(_filter(driver, facet, place))
            for column in ("Generation", "Model", "Ended"):
                clicked[f"sort by {column}"] = [_sort(driver, column) for _ in range(4)]
        finally:
            driver.quit()
    return views, clicked


def _first_view(driver: Any, address: str) -> float:
    driver.get("about:blank")
    driver.get(address)
    return _until(driver, 0.0)


def _filter(driver: Any, facet: str, place: int) -> float:
    """Tick or untick a value of a facet."""
    return _clicked(
        driver,
        "const box = [...document.querySelectorAll('.facet')].find(d => d.textContent.startsWith(arguments[0]));"
        "const inputs = box.querySelectorAll('input'); inputs[Math.min(inputs.length - 1, arguments[1])].click();",
        facet,
        place,
    )


def _sort(driver: Any, column: str) -> float:
    find = "[...document.querySelectorAll('.sort')].find(b => b.textContent.startsWith(arguments[0])).click();"
    return _clicked(driver, find, column)


def _clicked(driver: Any, script: str, *arguments: Any) -> float:
    begun = float(driver.execute_script(f"const begun = performance.now(); {script} return begun;", *arguments))
    return _until(driver, begun) - begun / 1000


def _until(driver: Any, begun_ms: float) -> float:
    """When something was painted after ``begun_ms``, in seconds since loading began."""
    for _ in range(2000):
        painted = float(driver.execute_script(_PAINTED))
        if painted > begun_ms:
            return painted / 1000
        time.sleep(0.005)
    raise RuntimeError("nothing was painted")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--results", type=Path, default=Path("results"), help="records to copy")
    parser.add_argument("--folder", type=Path, help="keep records and page here, and use what is there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        made = folder / "results"
        if not made.is_dir():
            write_records([stored.path for stored in read_all(options.results)[0]], made, options.records)
        if not (folder / "page").is_dir():
            _build(made, folder / "page")
        views, clicked = figures((folder / "page" / INDEX).resolve().as_uri())
    print(f"first view: median {statistics.median(views):.2f} s, worst {max(views):.2f} s (bar {FIRST_VIEW_S} s)")
    for what, seconds in clicked.items():
        print(f"{what}: median {1000 * statistics.median(seconds):.0f} ms, worst {1000 * max(seconds):.0f} ms")
    worst = statistics.median([s for what, all_s in clicked.items() if not what.startswith("sort") for s in all_s])
    holds = statistics.median(views) < FIRST_VIEW_S and worst < FILTER_S
    print(f"filter: median {1000 * worst:.0f} ms (bar {1000 * FILTER_S:.0f} ms): {'holds' if holds else 'missed'}")
    return 0 if holds else 1


def _build(results: Path, out: Path) -> None:
    begun = time.monotonic()
    PageBuilder(Gatherer([results]), out, print, tables=()).build()
    print(f"built in {time.monotonic() - begun:.1f} s, {_size(out) / 1e6:.0f} MB")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    raise SystemExit(main())
