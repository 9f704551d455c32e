"""Write the page: its own files, a charting library, and data files that are read as the reader asks for them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexgen_bench import __version__
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.folders import make_writable
from flexgen_bench.page.accuracy import gather_accuracy
from flexgen_bench.page.columns import columns, last_ended
from flexgen_bench.page.detail import shared, whole_or_problem
from flexgen_bench.page.gather import Broken, Gatherer, PageRow
from flexgen_bench.page.lanes import lanes
from flexgen_bench.page.papers import paper_tables
from flexgen_bench.page.pictures import compact, document
from flexgen_bench.page.scripts import script
from flexgen_bench.store.whole_file import write_text

ASSETS = Path(__file__).with_name("assets")
INDEX = "index.html"
DATA = "data"
# Cells of a file that is read when one of them is opened: some 100 KB.
CELLS_A_FILE = 25


@dataclass
class PageBuilder:
    """Builds a page of results folders, and builds it anew as they change.

    tell: gets a line now and then while it works. tables: names of the papers' tables on it (None: all).
    """

    gatherer: Gatherer
    out: Path
    tell: Callable[[str], None] = print
    tables: Sequence[str] | None = None
    _lanes: dict[Path, dict[str, Any]] = field(default_factory=dict)

    def build(self) -> Path:
        """Write everything; the page's path.

        Raises UserError if ``out`` is no folder that can be written to, StoreError if a file cannot be written.
        """
        make_writable(self.out, "--out")
        if any(self.out.iterdir()) and not (self.out / DATA / "rows.js").is_file():
            raise UserError("--out", str(self.out), "an empty folder, or one that holds a page", "Choose another one.")
        if (self.out / DATA).is_symlink():
            raise StoreError(f"{self.out / DATA} is a link. Choose another folder.")
        self.write_data()
        try:
            shutil.copytree(ASSETS, self.out, dirs_exist_ok=True)
        except (OSError, shutil.Error) as error:
            raise StoreError(f"cannot write {self.out}: {error}. Choose another folder.") from error
        return self.out / INDEX

    def write_data(self) -> int:
        """Write the data files alone; how many records they hold."""
        rows, broken = self.gatherer.gather()
        self.tell(f"{len(rows)} records" + (f", {len(broken)} that cannot be used" if broken else ""))
        accuracy = gather_accuracy(self.gatherer.folders)
        losses = accuracy.losses(rows)
        traces = dict(self._write_lanes(rows))
        written = {*traces.values()}
        for place, first in enumerate(range(0, len(rows), CELLS_A_FILE)):
            few = enumerate(rows[first : first + CELLS_A_FILE], start=first)
            details = [
                whole_or_problem(
                    of,
                    losses.get(of.row.stored.record.run_id, ()),
                    traces.get(at, ""),
                    self._lanes.get(of.row.stored.path),
                )
                for at, of in few
            ]
            broken += [Broken(one["file"], one["problem"]) for one in details if "problem" in one]
            self._write(f"cells-{place}.js", shared(details))
            written.add(f"cells-{place}.js")
        unusable = sorted([*broken, *accuracy.broken], key=lambda b: b.file)
        small = {
            "rows": self._overview(rows, len(unusable)),
            "pictures": {**compact(document(rows, accuracy.by_folder), rows), "stamp": _stamp(rows)},
            "broken": [{"file": b.file, "message": b.message} for b in unusable],
            "accuracy": accuracy.tables(),
            "papers": self._papers(rows),
        }
        for name, data in small.items():
            self._write(f"{name}.js", data)
            written.add(f"{name}.js")
        self._remove_others(written)
        return len(rows)

    def _overview(self, rows: Sequence[PageRow], unusable: int) -> dict[str, Any]:
        return {
            "version": __version__,
            "folders": [str(folder) for folder in self.gatherer.folders],
            "stamp": _stamp(rows),
            "last_ended": last_ended(rows),
            "broken": unusable,
            "cells_a_file": CELLS_A_FILE,
            "columns": columns(rows),
        }

    def _papers(self, rows: Sequence[PageRow]) -> dict[str, Any]:
        if self.tables is not None and not self.tables:
            return {"legend": [], "tables": [], "errors": ["They are left out (--tables)."]}
        # Of one folder, as reports are: a table's values would else come from two without saying so.
        first = self.gatherer.folders[0]
        newest = [r.row.stored for r in rows if r.newest and r.folder == str(first)]
        return paper_tables(newest, first, self.tables)

    def _write_lanes(self, rows: Sequence[PageRow]) -> Iterator[tuple[int, str]]:
        """(row, name of its file) of every traced run."""
        traced = [place for place, of in enumerate(rows) if of.row.stored.record.trace]
        for count, place in enumerate(traced, start=1):
            of = rows[place]
            path = of.row.stored.path
            if path not in self._lanes:
                found = lanes(of)
                if found is None:
                    continue
                self._lanes[path] = found
            if count % 200 == 0:
                self.tell(f"lanes of {count} of {len(traced)} runs")
            name = f"lanes-{place}.js"
            self._write(name, {**self._lanes[path], "run_id": of.row.stored.record.run_id})
            yield place, name

    def _write(self, name: str, data: Any) -> None:
        write_text(self.out / DATA / name, script(name.removesuffix(".js"), data), "Choose another folder.")

    def _remove_others(self, written: set[str]) -> None:
        """Data files of an earlier page, which nothing names any more. Other files are nobody's business here."""
        for path in (self.out / DATA).glob("*.js"):
            ours = path.name.partition("-")[0] in ("cells", "lanes")
            if ours and path.name not in written:
                path.unlink(missing_ok=True)


def _stamp(rows: Sequence[PageRow]) -> str:
    """Equal for equal rows in equal order: files that were made together have the same."""
    runs = "\n".join(of.row.stored.record.run_id for of in rows)
    return hashlib.sha256(runs.encode(errors="backslashreplace")).hexdigest()[:16]
